"""What paired runs say: intervals over seeds, paired differences, and whether two arms saw the same law of t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ddil_ray.tracking.journal import training_records

__all__ = [
    "Interval",
    "LawDifference",
    "PairedDifference",
    "compare_laws",
    "interval",
    "lower_is_better",
    "paired_difference",
    "time_counts",
]

Record = Mapping[str, float]

_LOWER = ("frechet", "fid", "kid", "paired_error", "energy")
_HIGHER = ("coverage", "recall", "density", "precision", "vendi", "clip", "lpips")
_P, _TOTAL_VARIATION = 1e-3, 0.02
"""Two laws of t are called different where chance explains them with less than `_P`, and they differ by more than
`_TOTAL_VARIATION`: the first alone would warn of differences too small to matter in long runs, the second alone of
noise in short ones. Both bounds are ours."""


def lower_is_better(score: str) -> bool | None:
    """Whether a smaller value of `score` is better; None where neither is."""
    if score.startswith(_LOWER):
        return True
    return False if score.startswith(_HIGHER) else None


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval by Student's t; without one where there is one seed."""

    mean: float
    low: float | None
    high: float | None


def interval(values: Sequence[float]) -> Interval:
    """The mean of one or more `values` and its interval."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Interval(mean, None, None)
    half = float(stats.t.ppf(0.975, len(sample) - 1) * stats.sem(sample))
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class PairedDifference:
    """How an arm differs from its baseline over the seeds that both have."""

    of_baseline: Interval
    of_arm: Interval
    difference: Interval
    """Of arm - baseline, seed by seed."""
    ratio: Interval | None
    """Of arm / baseline, seed by seed; None where a baseline is not above 0."""
    better: int | None
    """Seeds where the arm is better; None where the score has no better side."""
    seeds: int


def paired_difference(
    baseline: Sequence[float], arm: Sequence[float], *, lower_better: bool | None = True
) -> PairedDifference:
    """`arm` against `baseline`, which list the same seeds in the same order."""
    first, second = np.asarray(baseline, dtype=np.float64), np.asarray(arm, dtype=np.float64)
    gain = first - second if lower_better else second - first
    return PairedDifference(
        of_baseline=interval(first.tolist()),
        of_arm=interval(second.tolist()),
        difference=interval((second - first).tolist()),
        ratio=interval((second / first).tolist()) if bool((first > 0).all()) else None,
        better=None if lower_better is None else int((gain > 0).sum()),
        seeds=len(first),
    )


def time_counts(records: Sequence[Record], *, batch_size: int, reuse: int) -> list[float]:
    """Rows of each quarter of t that a run was trained on, over all its sources; a row that is used again counts once.

    Args:
        records: with `step` and the shares `states/share_<source>` and `states/t_<source>/quarter_<n>`.
        batch_size: rows per step.
        reuse: times each row is trained on.
    """
    counts, before = np.zeros(4), 0.0
    for record in training_records(records):
        rows = (record["step"] - before) * batch_size / reuse
        before = record["step"]
        for name, share in record.items():
            source = name.removeprefix("states/share_")
            if source != name:
                quarters = [record[f"states/t_{source}/quarter_{n}"] for n in (1, 2, 3, 4)]
                counts += rows * share * np.asarray(quarters)
    return [float(count) for count in counts]


@dataclass(frozen=True)
class LawDifference:
    """How the times of two arms differ."""

    total_variation: float
    """Half the summed differences of the shares of the quarters, in [0, 1]."""
    p_value: float
    """Of a chi-square test that both counts are of one law."""
    differs: bool
    """Whether a reader must be warned: the arms' scores may differ because of t alone."""


def compare_laws(first: Sequence[float], second: Sequence[float]) -> LawDifference:
    """Compare rows by quarter of t of two arms; each must have some."""
    table = np.asarray([first, second], dtype=np.float64)
    shares = table / table.sum(1, keepdims=True)
    variation = float(np.abs(shares[0] - shares[1]).sum() / 2)
    seen = table[:, table.sum(0) > 0]
    p_value = float(stats.chi2_contingency(seen).pvalue) if seen.shape[1] > 1 else 1.0
    return LawDifference(variation, p_value, p_value < _P and variation > _TOTAL_VARIATION)
