"""Whether a student becomes the champion of its name: the rule alone, from what was measured of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ddil_ray.ablation.statistics import Interval, lower_is_better, paired_difference
from ddil_ray.evaluation.scoring import GROUPS
from ddil_ray.finished import REFLECTED, FinishedRun, decides_scores

__all__ = ["GATES", "Evidence", "Verdict", "evidence_of", "judge"]

GATES = ("kid_teacher", "kid_data", "paired_error", "clip_score")
"""Scores that may decide: those that groups of samples have too, which say how far chance moves them."""


@dataclass(frozen=True)
class Evidence:
    """What was measured of a student, and by what."""

    steps: int
    """That it is made for, and was measured at."""
    scores: Mapping[str, float]
    groups: Mapping[str, Sequence[float]]
    """See `evaluation.scoring.Measured`."""
    benchmark: Mapping[str, str]
    """Settings that say what scores are measured against and with, and what the evaluation says of itself."""

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """What `to_json` gave."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """What the gate says."""

    passes: bool
    reason: str


def evidence_of(run: FinishedRun, steps: int) -> Evidence | None:
    """What `run` measured of its student at its own number of `steps`; None where it did not."""
    scores = run.metrics["scores"].get("student", {}).get(str(steps))
    if scores is None:
        return None
    settings = {k: v for k, v in run.arm_settings.items() if decides_scores(k) or k.startswith(REFLECTED)}
    about = {f"about.{name}": str(value) for name, value in run.metrics["about"].items()}
    groups = run.metrics.get("groups", {}).get("student", {}).get(str(steps), {})
    return Evidence(steps, scores, groups, settings | about)


def judge(student: Evidence, champion: Evidence | None, score: str) -> Verdict:
    """Whether `student` is better than `champion` by `score`, and by more than chance explains.

    Both were measured from the same noises, so their scores are compared group by group of these: the student passes
    where the 95 % interval of the mean difference leaves 0 on its better side. It fails where they were not measured
    alike, since nothing then says which is better.

    Args:
        student: the one that would be champion.
        champion: the present one; without one, a student passes that others can be compared with.
        score: one of `GATES`.
    """
    if champion is None:
        lacking = _lacking("it", student, score)
        return Verdict(lacking is None, f"there was no champion{'' if lacking is None else f', but {lacking}'}")
    unlike = _unlike(student, champion, score)
    if unlike is not None:
        return Verdict(False, f"the two cannot be compared: {unlike}")
    lower = lower_is_better(score)
    paired = paired_difference(champion.groups[score], student.groups[score], lower_better=lower)
    means = f"{score} is {student.scores[score]:.4g}, and {champion.scores[score]:.4g} of the champion"
    found = f"{means}; they differ by {_shown(paired.difference)} over {GROUPS} groups of samples"
    low, high = paired.difference.low, paired.difference.high
    assert low is not None
    assert high is not None
    if high < 0 if lower else low > 0:
        return Verdict(True, f"it is better: {found}")
    gain = -paired.difference.mean if lower else paired.difference.mean
    return Verdict(False, f"{'its lead may be chance' if gain > 0 else 'it is not better'}: {found}")


def _unlike(student: Evidence, champion: Evidence, score: str) -> str | None:
    """Why their scores say nothing of which is better; None where they do."""
    if student.steps != champion.steps:
        return f"it samples with {student.steps} steps, and the champion with {champion.steps}"
    for key in {**champion.benchmark, **student.benchmark}:
        own, other = (of.benchmark.get(key, "unset") for of in (student, champion))
        if own != other:
            return f"`{key}` was {own} where it was measured, and {other} where the champion was"
    return _lacking("it", student, score) or _lacking("the champion", champion, score)


def _lacking(who: str, evidence: Evidence, score: str) -> str | None:
    if len(evidence.groups.get(score, ())) == GROUPS:
        return None
    return (
        f"{who} has no {score} by groups of samples, which takes `evaluation.num_samples` of at least {2 * GROUPS}, "
        "and for kid_data data, for clip_score `evaluation.clip`"
    )


def _shown(difference: Interval) -> str:
    return f"{difference.mean:.3g} (95 % interval {difference.low:.3g} to {difference.high:.3g})"
