"""The report page: tables, charts and pictures in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Cell", "Figure", "Gallery", "Note", "Part", "Strip", "Table", "write_page"]


@dataclass(frozen=True)
class Figure:
    """An SVG element, a picture file to be embedded, or a PNG file's bytes."""

    caption: str
    content: str | Path | bytes
    source: str = ""
    """Where the numbers stand beside the page, as in `report.json: cost`."""

    def html(self) -> Markup:
        """The figure's element."""
        if isinstance(self.content, str):
            return Markup(self.content)  # nosec B704 - made by `ddil_ray.report.charts`
        content = self.content.read_bytes() if isinstance(self.content, Path) else self.content
        encoded = base64.b64encode(content).decode()
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(encoded, self.caption)


@dataclass(frozen=True)
class Strip:
    """Pictures side by side."""

    caption: str
    figures: Sequence[Figure]
    source: str = ""


@dataclass(frozen=True)
class Gallery:
    """Cards of pictures that belong together, such as what several models make of one prompt."""

    caption: str
    cards: Sequence[Strip]


@dataclass(frozen=True)
class Cell:
    """A table cell that says whether it is good news."""

    text: str
    detail: str = ""
    """Written smaller below."""
    mood: str = ""
    """`better`, `worse` or nothing."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    source: str = ""
    names: int = 1
    """How many columns on the left name the row."""
    folded: bool = False
    """Shown when it is asked for."""


@dataclass(frozen=True)
class Note:
    """A sentence; a warning stands out."""

    text: str
    warning: bool = False


Part = Figure | Strip | Gallery | Table | Note


def write_page(
    path: Path,
    *,
    title: str,
    summary: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Part]]],
) -> None:
    """Write a page of titled sections; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("ddil_ray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    kinds = {"figure": Figure, "strip": Strip, "gallery": Gallery, "table": Table, "note": Note, "cell": Cell}
    for name, kind in kinds.items():
        environment.tests[name] = lambda part, kind=kind: isinstance(part, kind)
    page = environment.get_template("page.html").render(title=title, summary=summary, sections=sections)
    path.write_text(page)
