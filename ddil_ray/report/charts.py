"""Charts as SVG that takes the colours of the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

__all__ = ["Line", "bar_chart", "curve_chart", "line_chart", "point_chart", "stacked_chart"]

_INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
_COLOURS = ("#3b82c4", "#d9822b", "#3a9d5d", "#c2497e", "#8064c8", "#8a8f98", "#a8893a", "#2fa3a0")
_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Line:
    """Points of one series, joined in a `curve_chart`."""

    name: str | None
    """In the legend; None leaves the line out of it."""
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Ends of the bar at every point; no bars where None."""
    colour: int | None = None
    """Number of the series that it shares a colour with; by default its own place, from 0."""
    dashed: bool = False
    plain: bool = False
    """In the page's text colour: for what the others are seen against."""


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
    lines = [Line(name, *points, colour=i) for i, (name, points) in enumerate(series.items())]
    beside = [
        Line(None, *dashed[name], colour=i, dashed=True) for i, name in enumerate(series) if dashed and name in dashed
    ]
    return curve_chart([*lines, *beside], x=x, y=y, log_y=log_y)


def curve_chart(lines: Sequence[Line], *, x: str, y: str, log_y: bool = False, whole_x: bool = False) -> str:
    """An SVG element with lines, and bars where they have them.

    Args:
        lines: the series.
        x, y: names of the axes.
        log_y: logarithmic y, for positive values.
        whole_x: few x, evenly spaced, each named on the axis: numbers of steps.
    """
    places = {value: i for i, value in enumerate(sorted({value for line in lines for value in line.x}))}
    with _canvas(x, y, entries=sum(line.name is not None for line in lines)) as (axes, svg):
        for i, line in enumerate(lines):
            aside = 0.04 * (i - (len(lines) - 1) / 2)  # so that bars at one place do not hide each other
            xs = [places[value] + aside for value in line.x] if whole_x else line.x
            look = _look(line, i) | {"marker": None if line.plain or len(xs) >= 12 else _MARKERS[_number(line, i)]}
            axes.plot(xs, line.y, label=line.name, linewidth=1.5, markersize=4, **look)
            if line.low is not None and line.high is not None:
                axes.vlines(xs, line.low, line.high, color=look["color"], linewidth=1)
        if log_y:
            axes.set_yscale("log")
            _name_ticks(axes.yaxis)
        if whole_x:
            axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
    return svg[0]


def point_chart(lines: Sequence[Line], labels: Sequence[Sequence[str]], *, x: str, y: str, log_x: bool = False) -> str:
    """An SVG element with points, each with its label beside it."""
    with _canvas(x, y, entries=len(lines)) as (axes, svg):
        for i, (line, names) in enumerate(zip(lines, labels, strict=True)):
            look = _look(line, i) | {"marker": _MARKERS[_number(line, i)], "linestyle": ":"}
            axes.plot(line.x, line.y, label=line.name, linewidth=0.7, markersize=5, **look)
            for a, b, name in zip(line.x, line.y, names, strict=True):
                axes.annotate(name, (a, b), (4, 3), textcoords="offset points", color=look["color"], fontsize=8)
        if log_x:
            axes.set_xscale("log")
            _name_ticks(axes.xaxis)
    return svg[0]


def bar_chart(series: Mapping[str, Sequence[float]], *, groups: Sequence[str], x: str, y: str) -> str:
    """An SVG element with a bar per series in each of the `groups` along x."""
    width = 0.8 / len(series)
    with _canvas(x, y, entries=len(series)) as (axes, svg):
        for i, (name, heights) in enumerate(series.items()):
            places = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
            axes.bar(places, heights, width * 0.9, label=name, color=_COLOURS[i % len(_COLOURS)])
        axes.set_xticks(range(len(groups)), groups)
    return svg[0]


def stacked_chart(parts: Mapping[str, Sequence[float]], *, rows: Sequence[str], x: str) -> str:
    """An SVG element with a horizontal bar for each of the `rows`, made of `parts`, the first row on top."""
    with _canvas(x, "", entries=len(parts), height=0.6 + 0.3 * len(rows)) as (axes, svg):
        ends = [0.0] * len(rows)
        for i, (name, widths) in enumerate(parts.items()):
            axes.barh(rows, widths, 0.7, ends, label=name, color=_COLOURS[i % len(_COLOURS)])
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        axes.invert_yaxis()
    return svg[0]


def _number(line: Line, place: int) -> int:
    return (place if line.colour is None else line.colour) % len(_COLOURS)


def _look(line: Line, place: int) -> dict[str, Any]:
    return {
        "color": _INK if line.plain else _COLOURS[_number(line, place)],
        "linestyle": "--" if line.dashed else "-",
    }


def _name_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... on a logarithmic axis, however short it is."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _canvas(x: str, y: str, *, entries: int, height: float = 2.7) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; the list holds their SVG once the block is left.

    Args:
        x, y: names of the axes.
        entries: of the legend below, left out where there is one.
        height: in inches, without the legend.
    """
    svg: list[str] = []
    columns = 2 if entries > 3 else entries
    legend = 0.22 * -(-entries // max(1, columns)) + 0.1 if entries > 1 else 0.0
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        canvas = Canvas(figsize=(4.8, height + legend), layout="constrained")
        axes = canvas.add_subplot()
        yield axes, svg
        if entries > 1:
            canvas.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK, fontsize=9)
        axes.set_xlabel(x, color=_INK)
        axes.set_ylabel(y, color=_INK)
        axes.tick_params(colors=_INK, which="both")
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    svg.append(re.sub(r"^.*?(?=<svg)", "", text, count=1, flags=re.DOTALL))
