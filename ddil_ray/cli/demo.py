"""`ddil-ray demo`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddil_ray.cli.options import AsJson, print_json, print_lines, print_table, writable

if TYPE_CHECKING:
    from ddil_ray.config import RunConfig

__all__ = ["Output", "Scale", "demo"]

_PRESETS = {"pd": "digits-pd", "lcm": "digits-lcm"}

Output = Annotated[str, typer.Option(help="Folder for the runs.")]
Scale = Annotated[float, typer.Option(min=0.01, help="Share of the usual training steps and samples.")]


def demo(output: Output = "runs", scale: Scale = 1.0, as_json: AsJson = False) -> None:
    """Distil the shipped digits teacher by PD and LCM, forward-only and with DDIL, and compare.

    The DDIL students are made on Ray; the forward-only baselines by the same loop in this process, without Ray.
    """
    from ddil_ray.cli.comparing import FORWARD_ONLY, Comparison, scaled
    from ddil_ray.runtime.cluster import connected
    from ddil_ray.tracking import View
    from ddil_ray.training.recipe import Recipe

    folder = writable(Path(output, time.strftime("demo-%Y%m%d-%H%M%S")), "--output")
    view, started = View(), time.monotonic()

    def config_of(method: str, arm: str, *more: str) -> RunConfig:
        settings = [
            f"name={method}-{arm}",
            f"output={folder}",
            f"evaluation.num_samples={max(32, round(500 * scale))}",
            "evaluation.teacher_steps=32",
            *more,
        ]
        return scaled(_PRESETS[method], scale, settings)

    usual = Recipe(config_of("pd", "ddil"))
    view.say(f"Measuring the teacher (builtin:digits, guidance w = {usual.student_guidance:g}).")
    comparison = Comparison(usual, folder)
    for method in _PRESETS:
        view.say(f"{method}, forward-only: in this process.")
        comparison.in_process(f"{method} forward-only", config_of(method, "forward-only", *FORWARD_ONLY))
    with connected(usual.config):
        for method in _PRESETS:
            view.say(f"{method}, DDIL: on Ray.")
            comparison.on_ray(f"{method} ddil", config_of(method, "ddil", "evaluation.enabled=false"))
    comparison.report(
        "Digits: forward-only distillation and DDIL",
        [
            "One seed each, equal updates. Frechet distances and the paired error are better lower, the rest higher.",
            "The paired error compares a sample with the teacher's from the same noise.",
        ],
    )
    if as_json:
        print_json({"folder": str(folder), "scores": comparison.measured, "about": comparison.about})
        return
    table = comparison.table(time.monotonic() - started)
    print_table(table.caption, table.header, table.rows)
    print_lines(
        f"report   {folder}/report.html",
        f"grids    {comparison.grids}",
        f"student  {folder}/pd-ddil/student",
        "next     " + f"ddil-ray sample {folder}/pd-ddil/student --steps 1 --out samples.png",
        "         " + f"ddil-ray sample {folder}/lcm-ddil/student --steps 4 --class-label 3 --out threes.png",
        "         " + comparison.look,
        "         ddil-ray distill digits-pd trainer.steps=1000 name=longer",
    )
