"""What a finished run gives to a comparison, and the folder it is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ddil_ray.ablation.grid import GridRun
from ddil_ray.folder import write_json

__all__ = ["Failure", "Outcome", "read_outcome", "write_outcome"]

Record = Mapping[str, float]
Scores = Mapping[int, Mapping[str, float]]
"""Steps -> score by name."""


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    group: Mapping[str, str]
    """What it shares with the runs it is compared with, as axis -> option."""
    arm: str
    seed: int
    scores: Scores
    """Of the student."""
    teacher: Scores
    """Of the teacher at the same few steps, undistilled."""
    records: Sequence[Record]
    """Metrics of training, as in metrics.jsonl."""
    batch_size: int
    reuse: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by what it was spent on; empty where it is not known."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What a reader must know beside the scores."""
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """First samples as PNG files, by name: `student-<n>-steps`, `teacher-<n>-steps`, `teacher-reference`."""
    where: str = ""
    """Its folder, as the report names it."""


@dataclass(frozen=True)
class Failure:
    """A run that gave nothing."""

    group: Mapping[str, str]
    arm: str
    seed: int
    error: str


def write_outcome(out: Path, run: GridRun, outcome: Outcome) -> Outcome:
    """Keep `outcome` in the run's folder, and tell it where that is.

    metrics.json comes last and whole, so a folder that has it is finished.
    """
    folder = run.folder(out)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for name, content in outcome.pictures.items():
        (folder / "samples" / f"{name}.png").write_bytes(content)
    part = folder / "metrics.json.part"
    write_json(
        part,
        {
            "options": dict(run.options),
            "seed": run.seed,
            "config_hash": run.key,
            "config": run.config.model_dump(mode="json"),
            "scores": {"student": outcome.scores, "teacher": outcome.teacher},
            "about": outcome.about,
            "seconds": outcome.seconds,
            "records": outcome.records,
        },
    )
    os.replace(part, folder / "metrics.json")
    return replace(outcome, where=folder.relative_to(out).as_posix())


def read_outcome(out: Path, run: GridRun) -> Outcome | None:
    """What `write_outcome` kept; None where there is nothing, or it came from other settings."""
    folder = run.folder(out)
    path = folder / "metrics.json"
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    if kept["config_hash"] != run.key:
        return None
    return Outcome(
        group=run.group,
        arm=run.arm,
        seed=run.seed,
        scores=by_steps(kept["scores"]["student"]),
        teacher=by_steps(kept["scores"]["teacher"]),
        records=kept["records"],
        batch_size=run.config.trainer.batch_size,
        reuse=run.config.replay.reuse,
        seconds=kept["seconds"],
        about=kept["about"],
        pictures={p.stem: p.read_bytes() for p in sorted((folder / "samples").glob("*.png"))},
        where=folder.relative_to(out).as_posix(),
    )


def by_steps(scores: Mapping[str, Mapping[str, float]]) -> dict[int, dict[str, float]]:
    """Scores as JSON has them, with steps as numbers again."""
    return {int(steps): dict(values) for steps, values in scores.items()}
