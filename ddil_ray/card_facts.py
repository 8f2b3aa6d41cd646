"""What the model card of a student says of the run that made it."""

from __future__ import annotations

from ddil_ray.card import public_name
from ddil_ray.diffusion.denoiser import guidance_scale_from_w
from ddil_ray.models import DiffusionModel
from ddil_ray.training.recipe import Recipe

__all__ = ["public_text", "student_facts"]


def student_facts(recipe: Recipe, student: DiffusionModel, data: str, *, steps: int) -> dict[str, str]:
    """Facts by name, for `write_card`.

    Args:
        recipe: the run.
        student: of some round.
        data: name of the training data.
        steps: sampling steps that the student was trained for.
    """
    config = recipe.config
    method, trainer = config.objective, config.trainer
    rounds = len(method.student_steps) if method.type == "pd" else 1
    return {
        "method": f"{(type(method).__doc__ or '').rstrip('.')} (`{method.type}`), on DDIL's mixture of states",
        "states, by prior": _priors(recipe),
        "training data": public_name(data),
        "trained for": f"{steps} sampling steps; {trainer.steps} updates of {trainer.batch_size} states"
        + (" in each round" if rounds > 1 else ""),
        "guidance": _guidance(recipe, student),
    }


def public_text(text: str, recipe: Recipe, data: str) -> str:
    """`text` with the last parts only of the paths and URLs that the run was given."""
    evaluation = recipe.config.evaluation
    for source in filter(None, (data, evaluation.features, evaluation.clip)):
        text = text.replace(source, public_name(source))
    return text


def _priors(recipe: Recipe) -> str:
    start, end = (
        ", ".join(f"{origin.label} {prior:g}" for origin, prior in recipe.priors.at(progress).items())
        for progress in (0.0, 1.0)
    )
    return start if start == end else f"from {start} to {end}"


def _guidance(recipe: Recipe, student: DiffusionModel) -> str:
    """In both conventions."""
    ends, chosen = dict.fromkeys(recipe.guidance), recipe.student_guidance
    w, scale = (" to ".join(f"{value:g}" for value in values) for values in (ends, map(guidance_scale_from_w, ends)))
    text = f"w = {w}, which is guidance_scale {scale}"
    inside = student.family is not None and student.family.guidance_scale(student, chosen) is None
    if student.reads_guidance and not inside:
        return f"{text}; the network is told it"
    return f"{text}; w = {chosen:g} (guidance_scale {guidance_scale_from_w(chosen):g}) is in the weights"
