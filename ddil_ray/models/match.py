"""Students that start from a model of their own: it must live in the teacher's world, and what does not is refused.

What pipelines say of themselves in their config files is compared first, before any weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddil_ray.diffusion.schedule import NoiseSchedule, RectifiedFlow, schedule_from_diffusers
from ddil_ray.errors import ConfigError
from ddil_ray.factory import is_factory
from ddil_ray.models import Family, find_pipeline, load_model
from ddil_ray.models.family import checked_prediction, read_config
from ddil_ray.models.model import DiffusionModel

__all__ = ["check_pipelines", "check_student", "load_measured", "load_student", "said_of"]

_END = "set_alpha_to_one"
"""Setting of a scheduler: its convention for t = 0."""

_TIMES = 101
"""Times at which schedules are compared; t = 0, where diffusers knows two conventions, is asked of no network."""


def check_pipelines(student: str, teacher: str) -> None:
    """Compare the config files of two pipelines: channels, latents, text encoders, classes, prediction type, schedule.

    Nothing is known before it is loaded of models that factories make, nor of shifts that depend on the samples' size;
    `check_student` compares those.

    Raises:
        ConfigError: the first thing that does not match, or a pipeline that is not known.
    """
    if any(is_factory(spec) and not spec.startswith("builtin:") for spec in (student, teacher)):
        return
    theirs = find_pipeline(teacher)
    with said_of("`student.model`"):
        ours = find_pipeline(student)
        mine = _schedule(*ours)
    for what, describe, remedy in _IN_CONFIGS:
        _check_same("`student.model`", what, describe(*ours), describe(*theirs), remedy)
    told = _schedule(*theirs)
    if mine is not None and told is not None:
        _check_schedule(mine, told)


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Lets what is said of `teacher.model` be said of what is given in the same way, under another name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("`teacher.model`", name)) from error


def _schedule(family: Family, folder: Path) -> NoiseSchedule | None:
    """The noise schedule, whose prediction type is checked; None where it depends on the size of samples."""
    config = read_config(folder, "scheduler")
    if config.get("use_dynamic_shifting", False):
        return None
    schedule = schedule_from_diffusers(config)
    if not isinstance(schedule, RectifiedFlow):  # whose networks predict one thing only
        checked_prediction(config, schedule)
    return schedule


def load_student(spec: str, teacher: DiffusionModel) -> DiffusionModel:
    """The model that `student.model` names, with the prompts of `teacher`.

    What a pipeline has besides its denoiser is then the teacher's, where both are of one family: the student learns on
    its embeddings and latents.

    Raises:
        ConfigError: it cannot be loaded, or cannot be a student of `teacher`.
    """
    with said_of("`student.model`"):
        student = load_model(spec)
    student = _sized(student, teacher)
    check_student(student, teacher)
    student.schedule = teacher.schedule  # also where the two differ by diffusers' convention for t = 0
    if student.scheduler_config and teacher.scheduler_config:
        student.scheduler_config = _with_end_of(student.scheduler_config, teacher.scheduler_config)
    student.bind(getattr(teacher.network, "bank", None))
    if student.family is not None and teacher.family is not None and student.family.name == teacher.family.name:
        student.folder = teacher.folder
    return student


def _with_end_of(own: dict[str, Any], teachers: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's settings with the teacher's convention for t = 0, which the student learns."""
    kept = {name: value for name, value in own.items() if name != _END}
    return kept | ({_END: teachers[_END]} if _END in teachers else {})


def _sized(model: DiffusionModel, teacher: DiffusionModel) -> DiffusionModel:
    """`model` for latents of the size that `teacher` is asked for."""
    if not (teacher.latent and model.latent and model.sample_shape[0] == teacher.sample_shape[0]):
        return model
    height, width = teacher.sample_shape[1:]
    return model.resized((height, width))


def check_student(student: DiffusionModel, teacher: DiffusionModel) -> None:
    """Whether states, conditions and labels of `teacher` mean the same to `student`; predictions may differ in type.

    Raises:
        ConfigError: the first thing that does not match.
    """
    for what, describe, remedy in _MUST_MATCH:
        _check_same("`student.model`", what, describe(student), describe(teacher), remedy)
    _check_schedule(student.schedule, teacher.schedule)


def load_measured(spec: str, teacher: DiffusionModel) -> DiffusionModel:
    """The model that is to be measured against `teacher`, with its prompts; schedules may differ.

    Raises:
        ConfigError: it cannot be loaded, or its samples or conditions are not those of `teacher`.
    """
    with said_of("MODEL"):
        model = _sized(load_model(spec), teacher)
    for what, describe, remedy in _MUST_MATCH:
        _check_same("MODEL", what, describe(model), describe(teacher), remedy)
    model.bind(getattr(teacher.network, "bank", None))
    return model


def _check_same(name: str, what: str, mine: Any, theirs: Any, remedy: str) -> None:
    if mine is not None and theirs is not None and mine != theirs:
        raise ConfigError(
            f"{name} must have the teacher's {what}, {_text(theirs)}, but has {_text(mine)} instead. {remedy}"
        )


def _text(value: Any) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)


def _latents(family: Family | None, folder: Path | None) -> dict[str, float] | str | None:
    """Scale and shift of an autoencoder; None for a factory's model, whose maker knows what it was trained on."""
    if family is None or folder is None:
        return None
    if not family.latent:
        return "pixels"
    vae = read_config(folder, "vae")
    return {"scaling": float(vae.get("scaling_factor") or 1.0), "shift": float(vae.get("shift_factor") or 0.0)}


def _conditions(model: DiffusionModel) -> str:
    return "prompts" if model.prompted else "classes" if model.num_conditions is not None else "none"


def _encoders(family: Family | None, folder: Path | None) -> dict[str, Any] | None:
    """Width of each text encoder by its name in the pipeline: what embeddings there are, and how wide."""
    if family is None or folder is None or not family.prompted:
        return None
    configs = sorted(folder.glob("text_encoder*/config.json"))
    return {path.parent.name: _width(folder, path.parent.name) for path in configs}


def _channels(family: Family, folder: Path) -> int | None:
    """Of samples."""
    read = read_config(folder, family.component).get("in_channels")
    return read // family.channels_per_sample if isinstance(read, int) else None


def _classes(family: Family, folder: Path) -> int | None:
    """Classes with the unconditional one, of the families that tell; the others are asked by text."""
    return read_config(folder, family.component).get("num_class_embeds")


def _width(folder: Path, component: str) -> Any:
    config = read_config(folder, component)
    return config.get("hidden_size", config.get("d_model"))


_LATENTS = ("latents", _latents, "Use a student that was trained on latents of the teacher's autoencoder.")
_ENCODERS = ("text encoders (by width)", _encoders, "Use a student that reads the teacher's embeddings.")
_AS_MANY = "Use a student with as many, the unconditional included."

_IN_CONFIGS: list[tuple[str, Callable[[Family, Path], Any], str]] = [
    _LATENTS,
    ("number of channels", _channels, "Use a student for samples of as many."),
    _ENCODERS,
    ("number of classes", _classes, _AS_MANY),
]
"""(what, how it is read of a pipeline's files or None where they do not tell, remedy)."""

_MUST_MATCH: list[tuple[str, Callable[[DiffusionModel], Any], str]] = [
    ("sample shape", lambda model: model.sample_shape, "Use a student for samples of that shape."),
    (_LATENTS[0], lambda model: _latents(model.family, model.folder), _LATENTS[2]),
    ("kind of conditions", _conditions, "Use a student with conditions of that kind."),
    (_ENCODERS[0], lambda model: _encoders(model.family, model.folder), _ENCODERS[2]),
    ("number of classes", lambda model: model.num_conditions, _AS_MANY),
]
"""(what, how it is read of a model or None where it is not known, remedy)."""


def _check_schedule(student: NoiseSchedule, teacher: NoiseSchedule) -> None:
    t = torch.linspace(teacher.earliest, 1, _TIMES, dtype=torch.float64)
    for name in ("alpha", "sigma", "network_time"):
        mine, theirs = (getattr(schedule, name)(t).double() for schedule in (student, teacher))
        apart = float((mine - theirs).abs().max() / theirs.abs().max())
        if apart > 1e-4:
            at = int((mine - theirs).abs().argmax())
            raise ConfigError(
                f"`student.model` must have the teacher's noise schedule, whose {name} at t = {float(t[at]):g} is "
                f"{float(theirs[at]):g}, but has {float(mine[at]):g} instead. Use a student that was trained on the "
                "teacher's schedule; its prediction type may be another."
            )
