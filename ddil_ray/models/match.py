"""Students that start from a model of their own: it must live in the teacher's world, and what does not is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ddil_ray.errors import ConfigError
from ddil_ray.models import load_model
from ddil_ray.models.family import read_config
from ddil_ray.models.model import DiffusionModel

__all__ = ["check_student", "load_student"]

_TIMES = 101
"""Times at which schedules are compared; t = 0, where diffusers knows two conventions, is asked of no network."""


def load_student(spec: str, teacher: DiffusionModel) -> DiffusionModel:
    """The model that `student.model` names, with the prompts of `teacher`.

    What a pipeline has besides its denoiser is then the teacher's, where both are of one family: the student learns on
    its embeddings and latents.

    Raises:
        ConfigError: it cannot be loaded, or cannot be a student of `teacher`.
    """
    try:
        student = load_model(spec)
    except ConfigError as error:
        raise ConfigError(str(error).replace("`teacher.model`", "`student.model`")) from error
    check_student(student, teacher)
    student.schedule = teacher.schedule  # also where the two differ by diffusers' conventions for t = 0
    student.bind(getattr(teacher.network, "bank", None))
    if student.family is not None and teacher.family is not None and student.family.name == teacher.family.name:
        student.folder = teacher.folder
    return student


def check_student(student: DiffusionModel, teacher: DiffusionModel) -> None:
    """Whether states, conditions and labels of `teacher` mean the same to `student`; predictions may differ in type.

    Raises:
        ConfigError: the first thing that does not match.
    """
    for what, describe, remedy in _MUST_MATCH:
        mine, theirs = describe(student), describe(teacher)
        if mine is not None and theirs is not None and mine != theirs:
            raise ConfigError(
                f"`student.model` must have the teacher's {what}, {_text(theirs)}, but has {_text(mine)} instead. "
                f"{remedy}"
            )
    _check_schedule(student, teacher)


def _text(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _latents(model: DiffusionModel) -> dict[str, float] | str | None:
    """Scale and shift of an autoencoder; None for a factory's model, whose maker knows what it was trained on."""
    if model.family is None or model.folder is None:
        return None
    if not model.latent:
        return "pixels"
    vae = read_config(model.folder, "vae")
    return {"scaling": float(vae.get("scaling_factor") or 1.0), "shift": float(vae.get("shift_factor") or 0.0)}


def _conditions(model: DiffusionModel) -> str:
    return "prompts" if model.prompted else "classes" if model.num_conditions is not None else "none"


def _encoders(model: DiffusionModel) -> dict[str, Any] | None:
    """Width of each text encoder by its name in the pipeline: what embeddings there are, and how wide."""
    if model.folder is None or not model.prompted:
        return None
    configs = sorted(model.folder.glob("text_encoder*/config.json"))
    return {path.parent.name: _width(model.folder, path.parent.name) for path in configs}


def _width(folder: Path, component: str) -> Any:
    config = read_config(folder, component)
    return config.get("hidden_size", config.get("d_model"))


_MUST_MATCH: list[tuple[str, Callable[[DiffusionModel], Any], str]] = [
    ("sample shape", lambda model: model.sample_shape, "Use a student for samples of that shape."),
    ("latents", _latents, "Use a student that was trained on latents of the teacher's autoencoder."),
    ("kind of conditions", _conditions, "Use a student with conditions of that kind."),
    ("text encoders (by width)", _encoders, "Use a student that reads the teacher's embeddings."),
    (
        "number of classes",
        lambda model: model.num_conditions,
        "Use a student with as many, the unconditional included.",
    ),
]
"""(what, how it is read of a model or None where it is not known, remedy)."""


def _check_schedule(student: DiffusionModel, teacher: DiffusionModel) -> None:
    t = torch.linspace(teacher.schedule.earliest, 1, _TIMES, dtype=torch.float64)
    for name in ("alpha", "sigma", "network_time"):
        mine, theirs = (getattr(model.schedule, name)(t).double() for model in (student, teacher))
        apart = float((mine - theirs).abs().max() / theirs.abs().max())
        if apart > 1e-4:
            at = int((mine - theirs).abs().argmax())
            raise ConfigError(
                f"`student.model` must have the teacher's noise schedule, whose {name} at t = {float(t[at]):g} is "
                f"{float(theirs[at]):g}, but has {float(mine[at]):g} instead. Use a student that was trained on the "
                "teacher's schedule; its prediction type may be another."
            )
