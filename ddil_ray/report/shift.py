"""Figures and a table of the covariate shift that was measured while a student trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ddil_ray.report.charts import line_chart
from ddil_ray.report.page import Figure, Table

__all__ = ["shift_parts"]

Record = Mapping[str, float]
Series = dict[str, tuple[list[float], list[float]]]

_CHARTS = (
    ("Energy distance of visited to forward states; dashed, what chance exceeds in 5 % of cases",
     "shift/energy/", "shift/floor/", "energy distance", False),
    ("Frechet distance of visited to forward states", "shift/frechet/", None, "Frechet distance", False),
    ("Error of the student on the states it visits; dashed, on forward states",
     "shift/error_visited/", "shift/error_forward/", "mean squared error", True),
    ("Spread of visited states", "rollout/spread/", None, "standard deviation", False),
    ("Share of the student's x_0 beyond the range of the data", "rollout/clip_share/", None, "share", False),
)  # fmt: skip
"""(caption, figure, dashed figure, y axis, whether it is logarithmic)."""

_COLUMNS = {
    "shift/energy": "energy distance",
    "shift/floor": "by chance",
    "shift/frechet": "Frechet",
    "shift/error_visited": "error visited",
    "shift/error_forward": "error forward",
    "rollout/spread": "spread",
    "rollout/clip_share": "beyond range",
}


def shift_parts(records: Sequence[Record]) -> list[Figure | Table]:
    """Curves of every step of the student over training, and the last measurement of each phase; empty without any.

    Args:
        records: of a run, of which those of `ddil_ray.training.shift` are taken.
    """
    # A run that went on from a checkpoint may have measured a step twice: the last time counts.
    measured = list({(r["phase"], r["step"]): r for r in records if "rollout/nonfinite" in r}.values())
    measured.sort(key=lambda r: (r["phase"], r["step"]))
    parts: list[Figure | Table] = []
    for caption, name, dashed, y, log_y in _CHARTS:
        found = _by_step(measured, name)
        if found:
            beside = _by_step(measured, dashed) if dashed else {}
            parts.append(Figure(caption, line_chart(found, x="training step", y=y, log_y=log_y, dashed=beside)))
    if measured:
        last = {r["phase"]: r for r in measured}
        rows = [row for record in last.values() for row in _rows(record)]
        header = ["phase", "measured at", "student step", *_COLUMNS.values(), "not finite"]
        parts.append(Table("Last measurement of each phase", header, rows))
    return parts


def _by_step(measured: Sequence[Record], prefix: str) -> Series:
    """Curves of one figure by step of the student, with a gap between phases: their steps are not the same."""
    names = sorted({k for r in measured for k in r if k.startswith(prefix)}, key=_number)
    series: Series = {}
    for name in names:
        xs, ys = series.setdefault(f"step {_number(name)}", ([], []))
        phase = -1.0
        for record in (r for r in measured if name in r):
            if xs and record["phase"] != phase:
                xs.append(record["step"])
                ys.append(math.nan)
            phase = record["phase"]
            xs.append(record["step"])
            ys.append(record[name])
    return series


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])


def _rows(record: Record) -> list[list[str]]:
    steps = sorted({_number(name) for name in record if "/step_" in name})
    where = [f"{record['phase'] + 1:.0f}", f"{record['step']:.0f}"]
    values = ((step, [record.get(f"{name}/step_{step}", math.nan) for name in _COLUMNS]) for step in steps)
    nonfinite = f"{record['rollout/nonfinite']:.0f}"
    return [[*where, str(step), *(f"{value:.3g}" for value in row), nonfinite] for step, row in values]
