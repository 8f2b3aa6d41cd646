"""What a finished run leaves: student folders, samples, scores and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddil_ray.card import add_section, base_of, markdown_table
from ddil_ray.card_facts import public_text, student_facts
from ddil_ray.evaluation import (
    Benchmark,
    Measurements,
    Sampler,
    load_instruments,
    pictures_of,
    reference_rows,
    student_samplers,
    teacher_sampler,
)
from ddil_ray.export import save_model_folder, student_scheduler
from ddil_ray.folder import write_json
from ddil_ray.models import DiffusionModel
from ddil_ray.report import (
    Figure,
    Gallery,
    Part,
    Strip,
    Table,
    grid_tiles,
    line_chart,
    save_grid,
    shift_parts,
    write_page,
)
from ddil_ray.states.batch import Origin
from ddil_ray.tracking.journal import training_records
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = [
    "SCORES",
    "Scores",
    "Section",
    "add_scores",
    "export_students",
    "measured_parts",
    "new_benchmark",
    "prompt_parts",
    "run_report",
    "samplers_of",
    "save_grids",
    "save_prompted",
    "score_parts",
    "score_table",
    "scores",
    "scores_of",
    "teacher_samplers",
]

Record = dict[str, float]
Section = tuple[str, Sequence[Part]]
Scores = dict[str, dict[int, dict[str, float]]]
"""Model (`student`, `teacher`) -> steps -> score by name."""
Groups = dict[str, dict[int, dict[str, list[float]]]]
"""Model -> steps -> scores of groups of samples (`evaluation.scoring.Measured.groups`)."""
Classes = dict[str, dict[int, list[dict[str, Any]]]]
"""Model -> steps -> scores of every class (`evaluation.scoring.ClassScores`)."""

SCORES = {
    "frechet_teacher": "Frechet to teacher",
    "frechet_data": "Frechet to data",
    "kid_data": "KID to data",
    "paired_error": "paired error",
    "coverage": "coverage",
    "recall": "recall",
    "density": "density",
    "precision": "precision",
    "vendi": "Vendi",
    "lpips_diversity": "LPIPS diversity",
    "clip_score": "CLIP score",
}
"""The scores that tables show where they were measured, with their headings; the first four are better lower."""

_CLASS_COLUMNS = {
    "class": "class",
    "prompt": "prompt",
    "count": "samples",
    "paired_error": "paired error",
    "precision": "precision",
    "coverage": "coverage",
    "kid_data": "KID to data",
}
_CLASSES_SHOWN = 20
_PROMPTS_SHOWN = 24
PROMPTS = "prompts.json"
"""Beside pictures of samples: their size in pixels (H, W), and their prompts in order."""


def export_students(recipe: Recipe, made: Ingredients, rounds: Mapping[int, DiffusionModel], folder: Path) -> None:
    """Write the last round's student to `folder`/student and the others to `folder`/rounds/<steps>-steps."""
    config, w = recipe.config, recipe.student_guidance
    base = base_of(config.teacher.model, made.teacher.folder, license=config.student.license)
    for steps, model in rounds.items():
        times = made.objective.sampling_times(steps)
        save_model_folder(
            _student_folder(folder, rounds, steps),
            model,
            scheduler=student_scheduler(model, times, made.objective.lcm_scheduler),
            name=f"{config.name}, {steps} step" + ("s" if steps > 1 else ""),
            description=f"A few-step student of `{base.name}`, distilled by ddil-ray.",
            steps=steps,
            times=times,
            w=w,
            base=base,
            facts=student_facts(recipe, model, made.data.name, steps=steps),
        )


def _student_folder(folder: Path, rounds: Mapping[int, DiffusionModel], steps: int) -> Path:
    return folder / ("student" if steps == list(rounds)[-1] else f"rounds/{steps}-steps")


def add_scores(
    recipe: Recipe,
    made: Ingredients,
    rounds: Mapping[int, DiffusionModel],
    measured: Scores,
    about: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write what was measured into the cards of the students that `export_students` wrote into `folder`."""
    features = public_text(about["features"], recipe, made.data.name)
    for steps in rounds:
        own = {
            model: {n: scores for n, scores in by_steps.items() if n == steps or len(rounds) == 1}
            for model, by_steps in measured.items()
        }
        table = score_table(own, f"{about['num_samples']} samples each; features: {features}; k = {about['k']}.")
        text = f"{table.caption}\n\n{markdown_table(table.header, table.rows)}"
        add_section(_student_folder(folder, rounds, steps), "Scores", text)


def new_benchmark(recipe: Recipe, made: Ingredients) -> Benchmark:
    """What `recipe`'s students and teacher are measured against."""
    e = recipe.config.evaluation
    reference = teacher_sampler(made.expert(), made.teacher, e.teacher_steps, w=recipe.student_guidance)
    data = reference_rows(made.data, num_samples=e.num_samples, seed=e.seed)
    return Benchmark(
        data,
        reference=reference,
        num_samples=e.num_samples,
        seed=e.seed,
        batch_size=e.batch_size,
        instruments=load_instruments(e, pictures_of(data, made.teacher.codec, made.teacher.sample_shape)),
        sample_shape=made.teacher.sample_shape,
    )


def samplers_of(
    recipe: Recipe, made: Ingredients, rounds: Mapping[int, DiffusionModel]
) -> dict[str, dict[int, Sampler]]:
    """The student's and the teacher's samplers at the steps that are evaluated."""
    steps, w = recipe.config.evaluation.steps, recipe.student_guidance
    return {
        "student": student_samplers(made.objective, rounds, steps, w=w),
        "teacher": teacher_samplers(recipe, made),
    }


def teacher_samplers(recipe: Recipe, made: Ingredients) -> dict[int, Sampler]:
    """The teacher's samplers at the steps that are evaluated."""
    steps, w = recipe.config.evaluation.steps, recipe.student_guidance
    return {n: teacher_sampler(made.expert(), made.teacher, n, w=w) for n in steps}


def scores(benchmark: Benchmark, samplers: Mapping[str, Mapping[int, Sampler]], grids: Path | None = None) -> Scores:
    """Measure every sampler in this process; with `grids`, write a picture of each one's first samples there."""
    measurements = benchmark.measure(samplers)
    if grids is not None:
        save_grids(measurements, grids)
    return scores_of(measurements)


def scores_of(measurements: Measurements) -> Scores:
    """The scores alone."""
    return {model: {n: m.scores for n, m in by_steps.items()} for model, by_steps in measurements.measured.items()}


def measured_parts(measurements: Measurements) -> dict[str, Any]:
    """What metrics.json holds of them: `scores` (`Scores`), `classes` (`Classes`) and `groups` (`Groups`)."""
    return {
        "scores": scores_of(measurements),
        **{
            part: {model: {n: getattr(m, part) for n, m in by.items()} for model, by in measurements.measured.items()}
            for part in ("classes", "groups")
        },
    }


def save_grids(measurements: Measurements, folder: Path) -> None:
    """Write a picture of each sampler's first samples, and of the teacher's reference, into `folder`."""
    for model, by_steps in measurements.measured.items():
        for steps, measured in by_steps.items():
            save_prompted(measured.first, measurements.prompts, folder, f"{model}-{steps}-steps")
    save_prompted(measurements.reference, measurements.prompts, folder, "teacher-reference")


def save_prompted(samples: Tensor, prompts: Sequence[str], folder: Path, name: str) -> None:
    """Write a picture `name` of `samples` (N, C, H, W) into `folder`, and as prompts.json the prompts, if there are
    any; all pictures of a folder have the same."""
    save_grid(samples, folder / f"{name}.png")
    if prompts:
        write_json(folder / PROMPTS, {"size": list(samples.shape[-2:]), "prompts": list(prompts)})


def score_table(measured: Mapping[str, Mapping[int, Mapping[str, float]]], caption: str) -> Table:
    """Rows of scores by steps and model, with the columns that any of them has."""
    found = {name for by_steps in measured.values() for scores in by_steps.values() for name in scores}
    columns = {name: heading for name, heading in SCORES.items() if name in found}
    rows = [
        [model, str(steps), *(_cell(by_steps[steps].get(name)) for name in columns)]
        for steps in sorted({n for by_steps in measured.values() for n in by_steps})
        for model, by_steps in measured.items()
        if steps in by_steps
    ]
    return Table(caption, ("model", "steps", *columns.values()), rows)


def _cell(value: float | int | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def score_parts(
    measured: Scores, about: Mapping[str, Any], grids: Path, classes: Classes | None = None
) -> list[Section]:
    """Report sections: the table of scores, the pictures in `grids`, and scores by class where there are any."""
    resized = f"resized to {about['image_size']} px" if about["resized"] else f"{about['image_size']} px, not resized"
    caption = f"{about['num_samples']} samples each, {resized}; features: {about['features']}; k = {about['k']}"
    pictures = [Figure(p.stem.replace("-", " "), p) for p in sorted(grids.glob("*.png"))]
    by_class: list[Figure | Table] = [
        _class_table(f"{model}, {steps} steps", rows)
        for model, by_steps in (classes or {}).items()
        for steps, rows in by_steps.items()
        if rows
    ]
    return [
        ("Scores", [score_table(measured, caption)]),
        *prompt_parts(grids),
        ("Samples", list(pictures)),
        *([("Scores by class, against the data of the class", by_class)] if by_class else []),
    ]


def prompt_parts(
    grids: Path, title: str = "What models make of prompts", models: Sequence[str] | None = None
) -> list[Section]:
    """A report section with the first prompts of the pictures in `grids`, and what each model makes of them.

    Args:
        grids: where `save_grids` wrote.
        title: of the section.
        models: names of the pictures to show, in order; default: all.
    """
    if not (grids / PROMPTS).exists():
        return []
    about = json.loads((grids / PROMPTS).read_text())
    prompts, size = about["prompts"], about["size"]
    models = models or sorted(path.stem for path in grids.glob("*.png"))
    pictures = {m: grid_tiles(grids / f"{m}.png", size=size, count=len(prompts), first=_PROMPTS_SHOWN) for m in models}
    cards = [
        Strip(prompt, [Figure(model.replace("-", " "), tiles[n]) for model, tiles in pictures.items()])
        for n, prompt in enumerate(prompts[:_PROMPTS_SHOWN])
    ]
    return [(title, [Gallery("Each row from the same noise.", cards)])]


def _class_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Scores by class; of many classes those that are furthest from the teacher."""
    columns = {name: heading for name, heading in _CLASS_COLUMNS.items() if any(name in row for row in rows)}
    if len(rows) > _CLASSES_SHOWN:
        caption += f"; the {_CLASSES_SHOWN} of {len(rows)} classes with the largest paired error"
        rows = sorted(rows, key=lambda row: -row.get("paired_error", 0.0))[:_CLASSES_SHOWN]
    return Table(caption, tuple(columns.values()), [[_cell(row.get(name)) for name in columns] for row in rows])


def run_report(
    path: Path,
    *,
    recipe: Recipe,
    records: Sequence[Record],
    measured: Scores,
    about: Mapping[str, Any],
    grids: Path,
    classes: Classes | None = None,
) -> None:
    """Write report.html of one run."""
    config = recipe.config
    sections = score_parts(measured, about, grids, classes) if measured else []
    sections.append(("Training", _training_figures(records)))
    shift = shift_parts(records)
    if shift:
        sections.append(("Covariate shift", shift))
    write_page(
        path,
        title=config.name,
        summary=[
            f"{config.objective.type} student of {config.teacher.model}, guidance w = {recipe.student_guidance:g}.",
            "States: " + ", ".join(f"{o.label} {p:g}" for o, p in recipe.priors.at(0.0).items()) + ".",
        ],
        sections=sections,
    )


def _training_figures(records: Sequence[Record]) -> list[Figure | Table]:
    steps = training_records(records)

    def series(prefix: str) -> dict[str, tuple[list[float], list[float]]]:
        names = sorted({k for r in steps for k in r if k.startswith(prefix)})
        return {
            n.removeprefix(prefix): ([r["step"] for r in steps if n in r], [r[n] for r in steps if n in r])
            for n in names
        }

    figures: list[Figure | Table] = []
    for caption, prefix, y, log_y in (
        ("Loss on the states of each source", "loss/", "loss", True),
        ("Age of student rollouts when trained on", "staleness/", "steps", False),
        ("Share of each source in the batches", "states/share_", "share", False),
        ("Share of the trainer's time spent waiting", "trainer/stall_", "share", False),
    ):
        found = series(prefix)
        if found:
            figures.append(Figure(caption, line_chart(found, x="step", y=y, log_y=log_y)))
    times = [(o.label, _time_shares(steps, o)) for o in Origin]
    rows = [[name, *(f"{share:.3f}" for share in shares)] for name, shares in times if shares]
    header = ["source", "0 to .25", ".25 to .5", ".5 to .75", ".75 to 1"]
    figures.append(Table("Share of states by time t; the sources should agree", header, rows))
    return figures


def _time_shares(steps: Sequence[Mapping[str, float]], origin: Origin) -> list[float]:
    """Mean share of each quarter of t among the states of `origin`."""
    names = [f"states/t_{origin.label}/quarter_{quarter}" for quarter in (1, 2, 3, 4)]
    found = [r for r in steps if names[0] in r]
    return [sum(r[name] for r in found) / len(found) for name in names] if found else []
