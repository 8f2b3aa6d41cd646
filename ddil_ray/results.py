"""What a finished run leaves: student folders, samples, scores and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddil_ray.evaluation import Benchmark, Sampler, student_samplers, teacher_sampler
from ddil_ray.export import consistency_scheduler, save_model_folder
from ddil_ray.models import DiffusionModel
from ddil_ray.report import Figure, Table, line_chart, save_grid, shift_parts, write_page
from ddil_ray.states.batch import Origin
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = [
    "SCORES",
    "SCORE_HEADER",
    "Scores",
    "export_students",
    "new_benchmark",
    "run_report",
    "samplers_of",
    "score_parts",
    "score_rows",
    "scores",
    "teacher_samplers",
]

Record = dict[str, float]
Section = tuple[str, list[Figure | Table]]
Scores = dict[str, dict[int, dict[str, float]]]
"""Model (`student`, `teacher`) -> steps -> score by name."""

SCORES = {
    "frechet_teacher": "Frechet to teacher",
    "frechet_data": "Frechet to data",
    "paired_error": "paired error",
    "coverage": "coverage",
    "recall": "recall",
    "density": "density",
    "precision": "precision",
}
"""The scores that tables show, with their headings; the first three are better lower."""

SCORE_HEADER = ("model", "steps", *SCORES.values())
"""Header of the rows that `score_rows` gives."""

_GRID_SAMPLES = 64


def export_students(recipe: Recipe, made: Ingredients, rounds: Mapping[int, DiffusionModel], folder: Path) -> None:
    """Write the last round's student to `folder`/student and the others to `folder`/rounds/<steps>-steps."""
    objective = recipe.config.objective
    last = list(rounds)[-1]
    scheduler = None
    if made.objective.lcm_scheduler and made.teacher.scheduler_config:
        scheduler = consistency_scheduler(made.teacher, **made.objective.lcm_scheduler)
    w = recipe.student_guidance
    for steps, model in rounds.items():
        save_model_folder(
            folder / ("student" if steps == last else f"rounds/{steps}-steps"),
            model,
            scheduler=scheduler,
            name=f"{recipe.config.name}, {steps} step" + ("s" if steps > 1 else ""),
            description=f"A few-step student of `{recipe.config.teacher.model}`, distilled by ddil-ray "
            f"(`{objective.type}` with DDIL's mixture of states).",
            steps=steps,
            w=w,
            facts={
                "teacher guidance w (already in the student; sample without guidance)": f"{w:g}",
                "trained for steps": str(steps),
                "source priors": ", ".join(f"{o.label} {p:g}" for o, p in recipe.priors.at(1.0).items()),
                "training data": made.data.name,
            },
        )


def new_benchmark(recipe: Recipe, made: Ingredients) -> Benchmark:
    """What `recipe`'s students and teacher are measured against."""
    e = recipe.config.evaluation
    reference = teacher_sampler(made.expert(), made.teacher.schedule, e.teacher_steps, w=recipe.student_guidance)
    return Benchmark(made.data, reference=reference, num_samples=e.num_samples, seed=e.seed, batch_size=e.batch_size)


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
    return {n: teacher_sampler(made.expert(), made.teacher.schedule, n, w=w) for n in steps}


def scores(benchmark: Benchmark, samplers: Mapping[str, Mapping[int, Sampler]], grids: Path | None = None) -> Scores:
    """Measure every sampler; with `grids`, write a picture of each one's first samples there."""
    result: Scores = {}
    for model, by_steps in samplers.items():
        result[model] = {}
        for steps, sampler in by_steps.items():
            samples = benchmark.samples(sampler)
            result[model][steps] = benchmark.measure(samples)
            if grids is not None:
                save_grid(samples[:_GRID_SAMPLES], grids / f"{model}-{steps}-steps.png")
    if grids is not None:
        save_grid(benchmark.teacher_paired[:_GRID_SAMPLES], grids / "teacher-reference.png")
    return result


def score_rows(measured: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[list[str]]:
    """Table rows `model, steps, scores`, by steps."""
    return [
        [model, str(steps), *(f"{by_steps[steps][name]:.4g}" for name in SCORES)]
        for steps in sorted({n for by_steps in measured.values() for n in by_steps})
        for model, by_steps in measured.items()
        if steps in by_steps
    ]


def score_parts(measured: Scores, about: Mapping[str, Any], grids: Path) -> list[Section]:
    """Report sections: the table of scores, and the pictures in `grids`."""
    caption = f"{about['num_samples']} samples each; features: {about['features']}"
    pictures = [Figure(p.stem.replace("-", " "), p) for p in sorted(grids.glob("*.png"))]
    return [
        ("Scores", [Table(caption, SCORE_HEADER, score_rows(measured))]),
        ("Samples", list(pictures)),
    ]


def run_report(
    path: Path, *, recipe: Recipe, records: Sequence[Record], measured: Scores, about: Mapping[str, Any], grids: Path
) -> None:
    """Write report.html of one run."""
    config = recipe.config
    sections = score_parts(measured, about, grids) if measured else []
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
    # A run that went on from a checkpoint did some steps twice: the last time counts.
    steps = list({r["step"]: r for r in records if "loss" in r}.values())
    steps.sort(key=lambda r: r["step"])

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


def _time_shares(steps: Sequence[Record], origin: Origin) -> list[float]:
    """Mean share of each quarter of t among the states of `origin`."""
    names = [f"states/t_{origin.label}/quarter_{quarter}" for quarter in (1, 2, 3, 4)]
    found = [r for r in steps if names[0] in r]
    return [sum(r[name] for r in found) / len(found) for name in names] if found else []
