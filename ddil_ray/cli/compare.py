"""`ddil-ray compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ddil_ray.cli.ablate import print_comparisons
from ddil_ray.cli.options import AsJson, writable

__all__ = ["compare"]


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Folders or fsspec URLs of finished runs; the first is a baseline.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and report.csv.")] = Path("comparison"),
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: those that differ in nothing but seed are one arm, arms are paired by seed.

    Example:

    `ddil-ray compare runs/forward-0 runs/forward-1 runs/ddil-0 runs/ddil-1 --out comparison`
    """
    from ddil_ray.ablation.folders import study_of
    from ddil_ray.ablation.report import write_report

    study = study_of(runs)
    folder = writable(out, "--out")
    print_comparisons(write_report(folder, study), folder, as_json=as_json)
