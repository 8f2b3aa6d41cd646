"""`ddil-ray demo-t2i`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddil_ray.cli.demo import Output, Scale
from ddil_ray.cli.options import AsJson, print_json, print_lines, print_table, writable

if TYPE_CHECKING:
    from ddil_ray.tracking import View

__all__ = ["demo_t2i"]

_PRESET = "emoji-t2i-lcm"
_STEPS = 4
_SEED = 1
_NEW = "new-prompts"
_NEW_PROMPTS = [
    "red cat face", "blue heart with arrow", "crying dog face", "green apple with smiling face", "dog in a car",
    "smiling moon with glasses", "black horse", "yellow fish", "purple star", "cat with glasses", "blue car",
]  # fmt: skip


def demo_t2i(
    output: Output = "runs",
    scale: Scale = 1.0,
    prompt: Annotated[list[str], typer.Option(help="Text to show in the report; repeat for more.")] = _NEW_PROMPTS,
    as_json: AsJson = False,
) -> None:
    """Make a small text-to-image teacher of emoji, and distil it to four steps, forward-only and with DDIL.

    Trains a latent teacher on the shipped emoji and their captions, prepares latents and embeddings on Ray, distils
    (with DDIL on Ray, forward-only by the same loop in this process), and shows all for the same prompts and noises.
    """
    from ddil_ray.cli.comparing import FORWARD_ONLY, Comparison, scaled
    from ddil_ray.results import prompt_parts
    from ddil_ray.runtime.cluster import connected
    from ddil_ray.tracking import View
    from ddil_ray.training.recipe import Recipe

    folder = writable(Path(output, time.strftime("demo-t2i-%Y%m%d-%H%M%S")), "--output")
    view, started = View(), time.monotonic()
    teacher = _train_teacher(folder, scale, view)
    settings = [
        f"output={folder}",
        f"teacher.model={teacher}",
        f"data.source={folder}/prepared",
        f"evaluation.steps=[{_STEPS}]",
        f"evaluation.num_samples={max(32, round(400 * scale))}",
    ]
    ddil = scaled(_PRESET, scale, [*settings, "name=ddil", "evaluation.enabled=false"])
    with connected(ddil):
        _prepare(folder, teacher, view)
        view.say("Measuring the teacher.")
        comparison = Comparison(Recipe(ddil), folder)
        view.say("Forward-only: in this process.")
        comparison.in_process("forward-only", scaled(_PRESET, scale, [*settings, *FORWARD_ONLY, "name=forward-only"]))
        view.say("DDIL: on Ray.")
        comparison.on_ray("ddil", ddil)
    w, steps = Recipe(ddil).student_guidance, ddil.evaluation.teacher_steps
    _draw(folder, prompt, {"teacher-reference": (teacher, steps, w), f"teacher-{_STEPS}-steps": (teacher, _STEPS, w)})
    students = {
        f"{name}-{_STEPS}-steps": (f"{folder}/{name}/student", _STEPS, 0.0) for name in ("forward-only", "ddil")
    }
    _draw(folder, prompt, students)
    models = ["teacher-reference", f"teacher-{_STEPS}-steps", *students]
    comparison.report(
        "Emoji by prompt: forward-only distillation and DDIL",
        [
            f"A latent teacher of 1,892 emoji with captions, guidance w = {w:g}; its reference takes {steps} steps of "
            f"two network passes each, its students {_STEPS} of one.",
            "One seed each, equal updates. Frechet distances and the paired error are better lower, the rest higher.",
            "The paired error compares a sample with the teacher's from the same noise.",
        ],
        prompt_parts(folder / _NEW, "Prompts that no emoji has", models),
    )
    if as_json:
        print_json({"folder": str(folder), "scores": comparison.measured, "about": comparison.about})
        return
    table = comparison.table(time.monotonic() - started)
    print_table(table.caption, table.header, table.rows)
    print_lines(
        f"report   {folder}/report.html",
        f"teacher  {teacher}",
        f"student  {folder}/ddil/student",
        "next     " + f'ddil-ray sample {folder}/ddil/student --steps {_STEPS} --prompt "red car" --out car.png',
        "         " + comparison.look,
        f"         ddil-ray distill {_PRESET} teacher.model={teacher} data.source={folder}/prepared trainer.steps=2000",
    )


def _train_teacher(folder: Path, scale: float, view: View) -> str:
    """Where the trained teacher is."""
    from ddil_ray.cli.train_teacher import write_text_teacher
    from ddil_ray.config.text_teacher import TextTeacherConfig, load_teacher_config

    run = load_teacher_config("emoji-teacher", [f"output={folder}", "name=teacher"])
    assert isinstance(run, TextTeacherConfig)
    steps = {part: max(2, round(getattr(run, part).steps * scale)) for part in ("autoencoder", "trainer")}
    parts = {part: getattr(run, part).model_copy(update={"steps": n}) for part, n in steps.items()}
    return f"{write_text_teacher(run.model_copy(update=parts), view).url}/teacher"


def _prepare(folder: Path, teacher: str, view: View) -> None:
    from ddil_ray.config import load_config
    from ddil_ray.config.prepare import PrepareConfig
    from ddil_ray.prepare import new_job
    from ddil_ray.runtime.prepare import prepare

    settings = [f"output={folder}/prepared", f"teacher.model={teacher}"]
    prepare(new_job(load_config("emoji-prepare", settings, kind=PrepareConfig)), view=view)


def _draw(folder: Path, prompts: Sequence[str], models: Mapping[str, tuple[str, int, float]]) -> None:
    """Draw `prompts` with exported pipelines, from the same noises.

    Args:
        folder: gets the pictures.
        prompts: one picture each.
        models: pipeline folder, steps and w by name of the picture.
    """
    import torch

    from ddil_ray.evaluation import draw, exported_sampler
    from ddil_ray.models import load_model
    from ddil_ray.results import save_prompted

    for name, (pipeline, steps, w) in models.items():
        model = load_model(pipeline)
        model.ask(prompts)
        images = draw(model, exported_sampler(model, steps, w=w), torch.arange(len(prompts)), seed=_SEED)
        save_prompted(images, prompts, folder / _NEW, name)
