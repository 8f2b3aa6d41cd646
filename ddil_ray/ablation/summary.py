"""From outcomes to report.json: every number of the page, and where each came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ddil_ray.ablation.outcome import Failure, Outcome
from ddil_ray.ablation.statistics import (
    compare_laws,
    interval,
    lower_is_better,
    paired_difference,
    time_counts,
)

__all__ = ["TEACHER", "Study", "paired", "summarise"]

TEACHER = "teacher, undistilled"
"""Stands among the arms in `quality`: the teacher with as few steps."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Runs to be compared."""

    title: str
    arms: Sequence[str]
    """The baseline first."""
    outcomes: Sequence[Outcome]
    failures: Sequence[Failure] = ()
    notes: Sequence[str] = ()
    """Warnings that the reader must see."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How the arms came about."""

    @property
    def groups(self) -> list[dict[str, str]]:
        """What is compared inside, in order of appearance."""
        return list({str(o.group): dict(o.group) for o in self.outcomes}.values())

    def of(self, group: Mapping[str, str], arm: str) -> dict[int, Outcome]:
        """The runs of an arm by seed."""
        found = [o for o in self.outcomes if o.group == group and o.arm == arm]
        return {o.seed: o for o in sorted(found, key=lambda o: o.seed)}


def paired(
    runs: Sequence[Mapping[str, Any]], baseline: str, arm: str, *, score: str, steps: int
) -> tuple[list[float], list[float]]:
    """(baseline's, arm's) values of a score over the seeds that both have, from the `runs` of one group."""

    def values(name: str) -> dict[int, float]:
        return {r["seed"]: r["scores"][str(steps)][score] for r in runs if r["arm"] == name}

    first, second = values(baseline), values(arm)
    seeds = sorted(first.keys() & second.keys())
    return [first[s] for s in seeds], [second[s] for s in seeds]


def summarise(study: Study) -> dict[str, Any]:
    """The content of report.json; its keys are what captions on the page name."""
    parts: dict[str, Callable[[Study, dict[str, str]], Iterator[Row]]] = {
        "comparisons": _comparisons,
        "quality": _quality,
        "shift": _shift,
        "times": _times,
        "laws": _laws,
        "cost": _cost,
    }
    about = next((dict(o.about) for o in study.outcomes), {})
    return {
        "title": study.title,
        "baseline": study.arms[0],
        "arms": list(study.arms),
        "groups": study.groups,
        "seeds": sorted({o.seed for o in study.outcomes}),
        "about": about,
        "settings": dict(study.settings),
        "notes": list(study.notes),
        **{key: [row for group in study.groups for row in rows(study, group)] for key, rows in parts.items()},
        "runs": [_run(o) for o in study.outcomes],
        "failures": [asdict(f) for f in study.failures],
    }


def _run(outcome: Outcome) -> Row:
    return {
        "group": dict(outcome.group),
        "arm": outcome.arm,
        "seed": outcome.seed,
        "folder": outcome.where,
        "scores": {str(steps): dict(values) for steps, values in outcome.scores.items()},
        "seconds": dict(outcome.seconds),
    }


def _pairs(study: Study, group: dict[str, str]) -> Iterator[tuple[str, list[Outcome], list[Outcome]]]:
    """Every other arm with (baseline's runs, its own runs) over the seeds that both have."""
    baseline = study.of(group, study.arms[0])
    for arm in study.arms[1:]:
        runs = study.of(group, arm)
        seeds = [seed for seed in runs if seed in baseline]
        if seeds:
            yield arm, [baseline[s] for s in seeds], [runs[s] for s in seeds]


def _comparisons(study: Study, group: dict[str, str]) -> Iterator[Row]:
    for arm, baseline, runs in _pairs(study, group):
        for steps, score in _measured([*baseline, *runs]):
            lower = lower_is_better(score)
            both = ([o.scores[steps][score] for o in side] for side in (baseline, runs))
            found = asdict(paired_difference(*both, lower_better=lower))
            direction = {True: "lower", False: "higher", None: "neither"}[lower]
            yield {"group": group, "arm": arm, "steps": steps, "score": score, "better_is": direction, **found}


def _quality(study: Study, group: dict[str, str]) -> Iterator[Row]:
    for arm in study.arms:
        runs = list(study.of(group, arm).values())
        for steps, score in _measured(runs):
            found = interval([o.scores[steps][score] for o in runs])
            yield {"group": group, "arm": arm, "steps": steps, "score": score, **asdict(found), "seeds": len(runs)}
    some = next(o for o in study.outcomes if o.group == group)
    for steps, scores in some.teacher.items():
        for score, value in scores.items():
            found = interval([value])
            yield {"group": group, "arm": TEACHER, "steps": steps, "score": score, **asdict(found), "seeds": 1}


def _measured(outcomes: Sequence[Outcome]) -> list[tuple[int, str]]:
    """(steps, score) that all have, by steps."""
    have = [[(n, score) for n, scores in o.scores.items() for score in scores] for o in outcomes]
    return sorted((key for key in have[0] if all(key in other for other in have)), key=lambda k: k[0]) if have else []


_SHIFT = {
    "energy": "shift/energy/step_",
    "floor": "shift/floor/step_",
    "frechet": "shift/frechet/step_",
    "error_visited": "shift/error_visited/step_",
    "error_forward": "shift/error_forward/step_",
}


def _shift(study: Study, group: dict[str, str]) -> Iterator[Row]:
    """The last measurement of every phase, per step of the student, mean over seeds."""
    for arm in study.arms:
        runs = [_last_by_phase(o.records) for o in study.of(group, arm).values()]
        for phase in sorted({phase for last in runs for phase in last}):
            records = [last[phase] for last in runs if phase in last]
            steps = sum(name.startswith(_SHIFT["energy"]) for name in records[0])
            after = max(int(r["step"]) for r in records)
            for k in range(1, steps + 1):
                row: Row = {"group": group, "arm": arm, "phase": phase, "student_steps": steps, "step": k}
                for name, prefix in _SHIFT.items():
                    values = [r[f"{prefix}{k}"] for r in records if f"{prefix}{k}" in r]
                    if values:
                        row[name] = asdict(interval(values))
                yield {**row, "after": after}


def _last_by_phase(records: Sequence[Mapping[str, float]]) -> dict[int, Mapping[str, float]]:
    """The last measurement of every phase; none of weights that a phase has begun with, before it trained them."""
    ends = {int(r["phase"]): r["step"] for r in records if "loss" in r}
    measured = (r for r in records if f"{_SHIFT['energy']}1" in r)
    return {int(r["phase"]): r for r in measured if r["step"] > ends.get(int(r["phase"]) - 1, 0)}


def _times(study: Study, group: dict[str, str]) -> Iterator[Row]:
    for arm in study.arms:
        counts = _counts(study.of(group, arm).values())
        if sum(counts):
            shares = [count / sum(counts) for count in counts]
            yield {"group": group, "arm": arm, "rows": [round(count) for count in counts], "shares": shares}


def _laws(study: Study, group: dict[str, str]) -> Iterator[Row]:
    for arm, baseline, runs in _pairs(study, group):
        first, second = _counts(baseline), _counts(runs)
        if sum(first) and sum(second):
            yield {"group": group, "arm": arm, **asdict(compare_laws(first, second))}


def _counts(outcomes: Any) -> list[float]:
    """Rows of each quarter of t over runs."""
    each = [time_counts(o.records, batch_size=o.batch_size, reuse=o.reuse) for o in outcomes]
    return [sum(counts) for counts in zip(*each, strict=True)]


def _cost(study: Study, group: dict[str, str]) -> Iterator[Row]:
    for arm in study.arms:
        runs = [o.seconds for o in study.of(group, arm).values() if o.seconds]
        if runs:
            seconds = {part: asdict(interval([s[part] for s in runs])) for part in runs[0]}
            total = asdict(interval([sum(s.values()) for s in runs]))
            yield {"group": group, "arm": arm, "seconds": seconds, "total": total}
