"""Line charts as SVG that takes the colours of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure as Canvas

__all__ = ["line_chart"]

_INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
_COLOURS = ("#3b82c4", "#d9822b", "#3a9d5d", "#b5507a", "#8064c8", "#8a8f98")


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    log_y: bool = False,
    dashed: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> str:
    """An SVG element with one line per series, `name: (xs, ys)`, and a dashed one in its colour where `dashed` has it.

    A NaN among the ys interrupts the line.
    """
    canvas = Canvas(figsize=(6.4, 3.0), layout="constrained")
    axes = canvas.add_subplot()
    for (name, (xs, ys)), colour in zip(series.items(), _COLOURS * len(series), strict=False):
        axes.plot(xs, ys, label=name, color=colour, linewidth=1.5, marker="o" if len(xs) < 12 else None, markersize=4)
        if dashed and name in dashed:
            axes.plot(*dashed[name], color=colour, linewidth=1, linestyle="dashed")
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    if log_y:
        axes.set_yscale("log")
    axes.tick_params(colors=_INK, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.patch.set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, labelcolor=_INK)
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(_INK, "currentColor")
    return re.sub(r"^.*?(?=<svg)", "", svg, count=1, flags=re.DOTALL)
