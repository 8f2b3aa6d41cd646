"""What a run is checked for before anything starts, beside what a config or a model can know alone."""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

from ddil_ray.config import RunConfig
from ddil_ray.data import ImageData
from ddil_ray.diffusion.schedule import RectifiedFlow
from ddil_ray.errors import ConfigError, DataError
from ddil_ray.models import DiffusionModel
from ddil_ray.objectives import Objective
from ddil_ray.prompts import Embeddings, EmbeddingSource
from ddil_ray.states.batch import Origin
from ddil_ray.states.prior import SourcePriors

__all__ = [
    "check_embeddings",
    "check_exported_grid",
    "check_imageless",
    "check_sampled_steps",
    "check_student_guidance",
    "check_threshold",
    "discriminated_layer",
]

_SIGMA_DATA = 0.5
"""Of diffusers' LCMScheduler."""


def check_imageless(config: RunConfig, priors: SourcePriors, data: ImageData) -> None:
    """Check that a run on prompts alone has rollouts, and nothing that needs images.

    Raises:
        DataError: it needs some.
    """
    needs = {
        "`states.forward` must be 0": Origin.FORWARD in priors.origins,
        "`objective.gan_weight` must be 0": getattr(config.objective, "gan_weight", 0) > 0,
        "`threshold.mode` must not be per_channel": config.threshold.mode == "per_channel",
        "`shift.enabled` must be false": config.shift.enabled,
    }
    wrong = [rule for rule, broken in needs.items() if broken]
    if wrong:
        raise DataError(f"{', '.join(wrong)} where there are no images, but {data.name} has prompts alone.")


def check_threshold(config: RunConfig, teacher: DiffusionModel) -> None:
    """Check that a bound of pixels is not put on latents, whose values go far beyond it.

    Raises:
        ConfigError: it would be.
    """
    threshold = config.threshold
    if teacher.latent and threshold.mode in ("static", "dynamic") and "bound" not in threshold.model_fields_set:
        raise ConfigError(
            f"`threshold.bound` must be set where `threshold.mode` is {threshold.mode} and the teacher works on "
            f"latents, but is not, and {threshold.bound:g} is the range of pixels. Set it, or "
            "`threshold.mode=per_channel`, which takes the range from the data."
        )


def check_student_guidance(config: RunConfig) -> None:
    """Check that the student is said to have a guidance that it is trained at.

    Raises:
        ConfigError: it is not.
    """
    (low, high), chosen = config.teacher.w, config.student.guidance
    if chosen is not None and not low <= config.teacher.as_w(chosen) <= high:
        raise ConfigError(
            f"`student.guidance` must be what the student is trained at, `teacher.guidance` "
            f"{config.teacher.guidance}, or lie within it, but is {chosen:g} instead. Leave it out with "
            "`student.guidance=null`."
        )


def check_sampled_steps(config: RunConfig, teacher: DiffusionModel) -> None:
    """Check that whoever is sampled has no more steps than the teacher's schedule has timesteps.

    Raises:
        ConfigError: names the setting.
    """
    most = getattr(teacher.schedule, "num_timesteps", None)
    if most is None:
        return
    steps = {"objective.teacher_steps": getattr(config.objective, "teacher_steps", 0)}
    if config.evaluation.enabled:
        steps |= {
            "evaluation.teacher_steps": config.evaluation.teacher_steps,
            "evaluation.steps": max(config.evaluation.steps),
        }
    for name, number in steps.items():
        if number > most:
            raise ConfigError(
                f"`{name}` must be at most the {most} timesteps of the teacher's schedule, but is {number} instead. "
                "Lower it."
            )


def check_embeddings(source: EmbeddingSource, negative: Embeddings, name: str) -> None:
    """Check that prompts were embedded as the teacher's negative prompt is.

    Raises:
        DataError: by other text encoders.
    """
    ours = {part: tuple(rows.shape[1:]) for part, rows in negative.items()}
    theirs = {part: tuple(rows.shape[1:]) for part, rows in source.rows([0]).items()}
    if ours != theirs:
        raise DataError(
            f"`data.source` must have embeddings of the teacher's text encoders, {ours}, but {name} has {theirs} "
            "instead. Run `ddil-ray prepare` with this teacher."
        )


def discriminated_layer(student: DiffusionModel, chosen: str | None, *, probe: bool) -> str:
    """Name of the submodule that a discriminator reads; with `probe`, one that was seen to give features."""
    layer = chosen or student.bottleneck
    names = [name for name, _ in student.network.named_modules() if name]
    if layer is None:
        raise ConfigError(
            "`objective.gan_layer` must name a submodule of the student's network for a discriminator, but is not set, "
            f"and none is known for this student. Set it to one of {', '.join(names[:8])}, ... or set "
            "`objective.gan_weight=0`."
        )
    if layer not in names:
        close = difflib.get_close_matches(layer, names, n=3, cutoff=0.3) or names[:3]
        raise ConfigError(
            f"`objective.gan_layer` must be a submodule of the student's network, but is {layer!r} instead. "
            f"The closest are {', '.join(close)}."
        )
    if probe and not _gives_features(student, layer):
        raise ConfigError(
            f"`objective.gan_layer` must be a submodule that is called with every image and gives a tensor of features "
            f"(B, ..., C), but {layer!r} does not. Name a block, such as the last one before the network widens again."
        )
    return layer


@torch.no_grad()
def _gives_features(student: DiffusionModel, layer: str) -> bool:
    """Whether a pass of one row brings a tensor of features out of `layer`."""
    seen: list[object] = []
    hook = student.network.get_submodule(layer).register_forward_hook(lambda *call: seen.append(call[2]))
    zeros = torch.zeros(1, device=next(student.network.parameters()).device)
    x_t = torch.zeros(1, *student.sample_shape, device=zeros.device)
    try:
        student.network(x_t, zeros, zeros.long(), zeros)
    finally:
        hook.remove()
    features = seen[-1][0] if seen and isinstance(seen[-1], tuple) else seen[-1] if seen else None
    return isinstance(features, Tensor) and features.ndim >= 2 and len(features) == 1


def check_exported_grid(kind: str, objective: Objective, student: DiffusionModel) -> None:
    """LCMScheduler rounds its grid down to whole timesteps, so that only divisors of their number are met exactly, and
    knows one `sigma_data`.

    Schedules of flow matching have no timesteps to round to.
    """
    if not student.scheduler_config or isinstance(student.schedule, RectifiedFlow):
        return
    sigma_data = getattr(objective, "sigma_data", _SIGMA_DATA)
    if sigma_data != _SIGMA_DATA:
        raise ConfigError(
            f"`objective.sigma_data` must be {_SIGMA_DATA:g} for a student that diffusers samples, whose LCMScheduler "
            f"knows no other, but is {sigma_data:g} instead. Leave it out."
        )
    if objective.lcm_scheduler is None:
        return
    grid = int(objective.lcm_scheduler["original_inference_steps"])
    timesteps = int(student.scheduler_config.get("num_train_timesteps", 1000))
    if timesteps % grid:
        setting = "solver_steps" if kind == "lcm" else "student_steps"
        fits = max(n for n in range(1, grid) if timesteps % n == 0)
        raise ConfigError(
            f"`objective.{setting}` must divide the {timesteps} timesteps of the schedule, or diffusers would sample "
            f"the student at other times than it was trained at, but is {grid} instead. The nearest below is {fits}."
        )
