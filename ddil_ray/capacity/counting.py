"""Floating-point operations of a run's networks and updates, counted by running its own code without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ddil_ray.models.model import DiffusionModel
from ddil_ray.training.memory import ImaginedRole, imagined_learner
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = ["Work", "count_forward", "count_update", "cycle_of"]


@dataclass(frozen=True)
class Work:
    """Floating-point operations; multiplications and additions count as one each, and only of matrix products."""

    training: float
    """Forward passes that something is learnt from, and ways back."""
    inference: float


class _Counter(TorchDispatchMode):
    """Counts what `flop_registry` knows: convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.training = self.inference = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            flop = float(count(*args, **kwargs, out_val=result))
            on_the_way_back = torch._C._current_graph_task_id() != -1
            if on_the_way_back or torch.is_grad_enabled():
                self.training += flop
            else:
                self.inference += flop
        return result


@contextmanager
def _counted(stage: ImaginedRole) -> Iterator[_Counter]:
    """Attention is counted as the matrix products that it is, which other kernels would hide."""
    counter = _Counter()
    with sdpa_kernel(SDPBackend.MATH), stage.tally, counter:
        yield counter


def count_forward(recipe: Recipe, made: Ingredients) -> tuple[float, float]:
    """FLOP of one row through the teacher, and through the student, without guidance."""
    stage = ImaginedRole(recipe, made, gpu=False)
    teacher, student = stage.networks()
    return _forward(stage, teacher), _forward(stage, student)


def _forward(stage: ImaginedRole, model: DiffusionModel) -> float:
    states = stage.states(1, labelled=False)
    with torch.no_grad(), _counted(stage) as counter:
        model.denoiser()(states.x_t, states.t, states.cond, states.w)
    return counter.inference


def count_update(recipe: Recipe, made: Ingredients) -> Work:
    """Mean work of an update of one worker."""
    stage = ImaginedRole(recipe, made, gpu=False)
    learner, batch = imagined_learner(stage)
    generator, found = torch.Generator().manual_seed(0), []

    def update() -> float:
        with _counted(stage) as counter:
            learner.update(batch, generator)
        found.append(counter)
        return counter.training

    cycle = cycle_of(recipe)
    training = mean_of_cycle(update, cycle)
    others = iter([counter.inference for counter in found])
    return Work(training, mean_of_cycle(lambda: next(others), cycle))


def cycle_of(recipe: Recipe) -> int:
    """Updates after which the trainer's work repeats itself: the first differs from the others, which are alike."""
    return int(getattr(recipe.config.objective, "student_every", 1))


def mean_of_cycle(update: Callable[[], float], cycle: int) -> float:
    """Mean over a cycle of what `update` gives at its first call and at each other."""
    first = update()
    return first if cycle == 1 else (first + (cycle - 1) * update()) / cycle
