"""report.json, report.csv and report.html of a comparison."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddil_ray.ablation.page import Pictures, group_name, sections, summary_lines
from ddil_ray.ablation.summary import Study, summarise
from ddil_ray.folder import write_json
from ddil_ray.report import write_page

__all__ = ["write_report"]


def write_report(out: Path, study: Study) -> dict[str, Any]:
    """Write the three files to the folder `out`; the content of report.json."""
    report = summarise(study)
    write_json(out / "report.json", report)
    with (out / "report.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        axes = list(dict.fromkeys(axis for group in report["groups"] for axis in group))
        writer.writerow([*axes, "arm", "seed", "steps", "score", "value"])
        writer.writerows(_csv_rows(report, axes))
    write_page(
        out / "report.html",
        title=study.title,
        summary=summary_lines(report),
        sections=sections(report, _pictures(study)),
    )
    return report


def _csv_rows(report: dict[str, Any], axes: list[str]) -> Iterator[list[Any]]:
    """One row per run, steps and score."""
    for run in report["runs"]:
        for steps, scores in run["scores"].items():
            for score, value in scores.items():
                options = [run["group"].get(axis, "") for axis in axes]
                yield [*options, run["arm"], run["seed"], steps, score, value]


def _pictures(study: Study) -> Pictures:
    """The samples of the first seed of every arm."""
    first: dict[tuple[str, str], dict[str, bytes]] = {}
    for outcome in sorted(study.outcomes, key=lambda o: o.seed):
        first.setdefault((group_name(outcome.group), outcome.arm), dict(outcome.pictures))
    return first
