"""The report page: tables, charts and pictures in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Figure", "Table", "write_page"]


@dataclass(frozen=True)
class Figure:
    """An SVG element, or a picture file to be embedded."""

    caption: str
    content: str | Path

    def html(self) -> Markup:
        """The figure's element."""
        if isinstance(self.content, str):
            return Markup(self.content)  # made by `line_chart`
        encoded = base64.b64encode(self.content.read_bytes()).decode()
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(encoded, self.caption)


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_page(
    path: Path,
    *,
    title: str,
    summary: Sequence[str],
    sections: Sequence[tuple[str, Sequence[Figure | Table]]],
) -> None:
    """Write a page of titled sections; all text is escaped."""
    environment = Environment(
        loader=PackageLoader("ddil_ray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.tests["table"] = lambda part: isinstance(part, Table)
    page = environment.get_template("page.html").render(title=title, summary=summary, sections=sections)
    path.write_text(page)
