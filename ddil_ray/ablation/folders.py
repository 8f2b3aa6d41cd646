"""Finished run folders of `ddil-ray distill` as outcomes to compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ddil_ray.ablation.outcome import Outcome, by_steps
from ddil_ray.ablation.summary import Study
from ddil_ray.errors import ConfigError
from ddil_ray.finished import REFLECTED, FinishedRun, decides_scores, read_finished
from ddil_ray.storage import open_url
from ddil_ray.tracking.journal import parse_records

__all__ = ["study_of"]


@dataclass(frozen=True)
class _Run(FinishedRun):
    """A finished run, and how it went."""

    records: list[dict[str, float]]
    pictures: dict[str, bytes]


def study_of(urls: Sequence[str]) -> Study:
    """The runs in the folders or fsspec URLs `urls`, as arms of one comparison; the first run's arm is the baseline.

    Raises:
        ConfigError: a folder holds no finished run, or runs cannot be compared.
    """
    runs = [_read(url.rstrip("/")) for url in urls]
    arms: dict[str, list[_Run]] = {}
    for run in runs:
        arms.setdefault(json.dumps(run.arm_settings), []).append(run)
    if len(arms) < 2:
        raise ConfigError(
            "RUN_DIR must name runs of two arms, but all of these differ in nothing but seed. Add a run with other "
            "settings."
        )
    baseline, *others = arms.values()
    for arm in others:
        _check_comparable(baseline[0], arm[0])
    for arm in arms.values():
        _check_seeds(baseline, arm)
    named = {arm[0].config.name: arm for arm in arms.values()}
    if len(named) < len(arms):
        named = {arm[0].url: arm for arm in arms.values()}
    return Study(
        title="Comparison of runs",
        arms=list(named),
        outcomes=[_outcome(name, run) for name, arm in named.items() for run in arm],
        notes=_notes(named),
        settings={"arms": {name: _differences(baseline[0], arm[0]) for name, arm in named.items()}},
    )


def _read(url: str) -> _Run:
    finished = read_finished(url, "RUN_DIR")
    fs, root = open_url(url)
    journal = f"{root}/metrics.jsonl"
    return _Run(
        **vars(finished),
        records=parse_records(fs.cat_file(journal)) if fs.exists(journal) else [],
        pictures={p.rpartition("/")[2].removesuffix(".png"): fs.cat_file(p) for p in fs.glob(f"{root}/samples/*.png")},
    )


def _check_comparable(baseline: _Run, other: _Run) -> None:
    for key, (first, second) in _differing(baseline, other).items():
        if decides_scores(key):
            raise ConfigError(
                f"`{key}` must be the same in all runs, as scores are measured against it, but is {first} in "
                f"{baseline.url} and {second} in {other.url}. Run one of them again with the other's."
            )


def _check_seeds(baseline: Sequence[_Run], arm: Sequence[_Run]) -> None:
    seeds = [run.config.seed for run in arm]
    for run in arm:
        if seeds.count(run.config.seed) > 1:
            twins = " and ".join(r.url for r in arm if r.config.seed == run.config.seed)
            raise ConfigError(f"`seed` must differ between runs of one arm, but is {run.config.seed} in {twins}.")
    if not {run.config.seed for run in baseline} & set(seeds):
        raise ConfigError(
            f"`seed` must be one that the baseline has too, but is {', '.join(map(str, seeds))} in "
            f"{arm[0].url} and {', '.join(str(r.config.seed) for r in baseline)} in {baseline[0].url}."
        )


def _differing(baseline: _Run, other: _Run) -> dict[str, tuple[str, str]]:
    first, second = baseline.arm_settings, other.arm_settings
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return {key: (first.get(key, "unset"), second.get(key, "unset")) for key in keys}


def _differences(baseline: _Run, other: _Run) -> dict[str, str]:
    return {key: value for key, (_, value) in _differing(baseline, other).items()}


def _notes(named: dict[str, list[_Run]]) -> list[str]:
    baseline, *others = named.items()
    return [
        f"{name} and {baseline[0]} differ in `{key}`: each was measured against a teacher of its own threshold."
        for name, arm in others
        for key in _differing(baseline[1][0], arm[0])
        if key.startswith(REFLECTED)
    ]


def _outcome(name: str, run: _Run) -> Outcome:
    return Outcome(
        group={},
        arm=name,
        seed=run.config.seed,
        scores=by_steps(run.metrics["scores"]["student"]),
        teacher=by_steps(run.metrics["scores"]["teacher"]),
        records=run.records,
        batch_size=run.config.trainer.batch_size,
        reuse=run.config.replay.reuse,
        about=run.metrics["about"],
        pictures=run.pictures,
        where=run.url,
    )
