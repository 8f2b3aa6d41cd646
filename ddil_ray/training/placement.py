"""How the networks of a run are kept: where, in which precision and layout, compiled or not, all of a block or little.

Every process prepares its networks here, by what each is for: `trained`, `frozen` or `teaching`. Casts and compilation
are forward hooks, since copies of a network keep those, which targets and critics are made as; names in `state_dict`
stay. Evaluation prepares nothing: its samples are those of the float32 weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ddil_ray.config import RunConfig
from ddil_ray.diffusion.threshold import Threshold
from ddil_ray.errors import ConfigError
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives.objective import Objective
from ddil_ray.training.optimizer import PRECISIONS, check_optimizer
from ddil_ray.training.producer import Expert

__all__ = ["actor_networks", "check_placement", "frozen", "teaching", "trained"]


def trained(model: DiffusionModel, config: RunConfig, device: torch.device | str) -> DiffusionModel:
    """`model` itself, made ready to be trained on `device`."""
    if config.trainer.gradient_checkpointing:
        _denoiser(model.network).enable_gradient_checkpointing()
    return _placed(model, config, device)


def frozen(model: DiffusionModel, config: RunConfig, device: torch.device | str) -> DiffusionModel:
    """`model` itself, made ready to be asked on `device` with weights that are given to it."""
    model.network.eval().requires_grad_(False)
    return _placed(model, config, device)


def teaching(model: DiffusionModel, config: RunConfig, device: torch.device | str) -> DiffusionModel:
    """`model` frozen, or a copy with weights of `teacher.dtype`; students must have been made of it before.

    States are cast on their way into the network, and what it says of them on the way to x_0, in float64.
    """
    dtype = PRECISIONS[config.teacher.dtype]
    if dtype is not None:
        network = _converted(model.network, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        network.register_forward_pre_hook(partial(_cast_states, dtype))
        model = model.with_network(network)
    return frozen(model, config, device)


def actor_networks(
    teacher: DiffusionModel,
    student: DiffusionModel,
    *,
    config: RunConfig,
    objective: Objective,
    threshold: Threshold,
    device: torch.device | str,
    acts: bool,
    asked: bool = True,
) -> tuple[Expert, DiffusionModel | None]:
    """What an actor holds: the expert, and the student that it rolls out or measures.

    Args:
        teacher: as loaded.
        student: a new one of it.
        config: the run.
        objective: its method; where its students become teachers, the expert has room for one.
        threshold: of the expert.
        device: where the actor computes.
        acts: whether the student is needed.
        asked: whether the expert is; one that is not has no weights.
    """
    later = student.copy() if objective.student_becomes_teacher else None
    if asked:  # first: a student of adapters takes the weights they share to the device along, as they are then
        teacher = teaching(teacher, config, device)
        later = frozen(later, config, device) if later is not None else None
    else:
        teacher = _without_memory(teacher)
        later = _without_memory(later) if later is not None else None
    acting = frozen(student, config, device) if acts else None
    return Expert(teacher, later, threshold, PRECISIONS[config.labels.precision or config.trainer.precision]), acting


def check_placement(teacher: DiffusionModel, config: RunConfig) -> None:
    """Check that the teacher's network, and students like it, can be kept as `config` says.

    Raises:
        ConfigError: it has no blocks to checkpoint, no convolutions, or a dtype of its own making; or bitsandbytes is
            missing.
    """
    check_optimizer(config.trainer.optimizer)
    network = teacher.network
    if config.trainer.gradient_checkpointing and not getattr(
        _denoiser(network), "_supports_gradient_checkpointing", False
    ):
        raise ConfigError(
            f"`trainer.gradient_checkpointing` must be false for a {type(_denoiser(network)).__name__}, which has no "
            "`enable_gradient_checkpointing` of diffusers, but is true instead. Call `torch.utils.checkpoint` in the "
            "factory's network."
        )
    if config.trainer.channels_last and not any(isinstance(part, nn.Conv2d) for part in network.modules()):
        raise ConfigError(
            f"`trainer.channels_last` must be false for a {type(_denoiser(network)).__name__}, which has no "
            "convolutions of images, but is true instead."
        )
    if config.teacher.dtype != "fp32" and teacher.family is None:
        raise ConfigError(
            f"`teacher.dtype` must be fp32 for a teacher given as a factory, but is {config.teacher.dtype!r} instead: "
            "its network may not take states in another. Cast inside the factory's network."
        )


def _placed(model: DiffusionModel, config: RunConfig, device: torch.device | str) -> DiffusionModel:
    network: Any = model.network
    network.to(device)  # adapters may lie elsewhere than the network below them, which others have placed
    if config.trainer.channels_last:
        network.to(memory_format=torch.channels_last)  # convolutions bring their inputs into the layout of the weights
    if config.trainer.compile:
        backend = "inductor" if config.trainer.compile is True else config.trainer.compile
        network.register_forward_pre_hook(partial(_compile, backend))
    return model


def _without_memory(model: DiffusionModel) -> DiffusionModel:
    """`model` with tensors that are shapes alone."""
    return model.with_network(_converted(model.network, lambda tensor: tensor.to("meta")))


def _converted(network: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A frozen copy of `network` on converted tensors; `network` may share its own with others, and keeps them."""
    tensors: dict[int, Any] = {id(b): convert(b) for b in network.buffers()}
    tensors |= {id(p): nn.Parameter(convert(p.detach()), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, tensors)


def _cast_states(dtype: torch.dtype, network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Times and guidance stay float32: networks embed them themselves, and 999 is no bfloat16."""
    x_t, *others = arguments
    return (x_t.to(dtype), *others)


def _compile(backend: str, network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Compile in place what computes, at its first call; lookups by prompt id stay outside."""
    denoiser: Any = _denoiser(network)
    if denoiser._compiled_call_impl is None:
        denoiser.compile(backend=backend)


def _denoiser(network: nn.Module) -> Any:
    """The network of diffusers inside one of a family; others themselves."""
    return getattr(network, "denoiser", network)
