"""`ddil-ray ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddil_ray.cli.options import (
    AllowCode,
    AsJson,
    Config,
    Overrides,
    Verbose,
    print_json,
    print_lines,
    print_table,
    writable,
)

__all__ = ["ablate", "print_comparisons"]


def ablate(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and report; default: ablations/<name>.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the runs, start nothing.")] = False,
    verbose: Verbose = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid of paired runs, as many at once as fit, and report what its options change.

    The same command again does what is missing only.

    Examples:

    `ddil-ray ablate ablation/priors`

    `ddil-ray ablate ablation/priors base=my-teacher.yaml settings.trainer.steps=2000 resources.num_gpus=1`
    """
    from ddil_ray.ablation.grid import check_runs, grid_runs
    from ddil_ray.config import AblationConfig, load_config
    from ddil_ray.errors import RunFailedError

    spec = load_config(config, overrides or [], kind=AblationConfig)
    if dry_run:
        runs = grid_runs(spec)
        check_runs(runs)
        if as_json:
            print_json([{**run.options, "seed": run.seed} for run in runs])
        else:
            print_lines(*(run.label for run in runs), f"{len(runs)} runs. Nothing was started.")
        return
    folder = writable(out or Path("ablations", spec.name), "--out")

    from ddil_ray.runtime.ablation import ablate as ablate_on_ray
    from ddil_ray.tracking import View

    report = ablate_on_ray(spec, folder, view=View(), verbose=verbose)
    print_comparisons(report, folder, as_json=as_json)
    if report["failures"]:
        first = report["failures"][0]
        raise RunFailedError(
            f"{len(report['failures'])} runs failed and are left out of the report; the first with {first['error']}. "
            "The same command again tries them again."
        )


def print_comparisons(report: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """Print the main comparisons and where the report is."""
    from ddil_ray.ablation.page import TERMINAL_HEADER, terminal_rows

    if as_json:
        print_json({"folder": str(folder), **report})
        return
    print_table(f"{report['title']}: against {report['baseline']}", TERMINAL_HEADER, terminal_rows(report))
    for note in (*report["notes"], *(f"{f['arm']}, seed {f['seed']}: {f['error']}" for f in report["failures"])):
        print_lines(f"warning  {note}")
    if any(law["differs"] for law in report["laws"]):
        print_lines("warning  arms were trained on different times t; see the report")
    print_lines(f"report   {folder / 'report.html'}", f"numbers  {folder / 'report.json'}, {folder / 'report.csv'}")
