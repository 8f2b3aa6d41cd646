"""Options that several commands share, and how results are printed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ddil_ray.errors import ConfigError
from ddil_ray.redact import redact, redacted

__all__ = [
    "AllowCode",
    "AsJson",
    "Config",
    "Overrides",
    "Verbose",
    "print_json",
    "print_lines",
    "print_table",
    "quiet_libraries",
    "writable",
]

Config = Annotated[str, typer.Argument(help="YAML file (path or fsspec URL) or the name of a preset.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as dotted.key=value.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Verbose = Annotated[bool, typer.Option(help="Show what Ray says.")]


def _allow(allowed: bool) -> bool:
    if allowed:
        from ddil_ray.factory import allow_code

        allow_code()
    return allowed


AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", callback=_allow, help="Let settings of the form module.path:factory import and run code."
    ),
]
"""Acts when it is parsed; commands only have to take it."""


def writable(folder: Path, option: str) -> Path:
    """`folder`, made if it is not there.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ConfigError(f"`{option}` must be a folder that can be written, but {folder} failed: {error}.") from error


def quiet_libraries() -> None:
    """Keep diffusers and transformers from showing bars and advice between this command's own lines."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for logging in (of_diffusers, of_transformers):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def print_json(content: Any) -> None:
    """Print `content` on standard output, without secrets."""
    typer.echo(json.dumps(redacted(content), indent=2))


def print_lines(*lines: str) -> None:
    """Print text that a user may copy: never wrapped, and without secrets."""
    for line in lines:
        typer.echo(redact(line))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table that is as wide as it needs to be."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
