"""An actor that publishes as rank 0 of a Ray Train worker group does."""

from __future__ import annotations

from typing import Any

import ray
import torch
from torch import Tensor

from ddil_ray.runtime.publisher import Publisher
from ddil_ray.runtime.stages import stream_plan
from ddil_ray.trained import trained_state
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.wire import FlatWeights

__all__ = ["Rank0", "streams", "tensors"]


def tensors(model: Any) -> list[Tensor]:
    """What is published of a student."""
    return [tensor.clone() for tensor in trained_state(model.network).values()]


def streams(recipe: Recipe, phases: int, *, start_step: int = 0, max_staleness: int = 100, ready: int = 1000) -> Any:
    """The streams of a run."""
    from ddil_ray.runtime.admission import Stream

    return {
        origin.label: Stream(
            stream_plan(recipe, origin, phases=phases, start_step=start_step, max_staleness=max_staleness),
            recipe.most_actors(origin),
            ready,
        )
        for origin in recipe.priors.origins
    }


@ray.remote(num_cpus=0, max_concurrency=4)
class Rank0:
    """Has a publisher in its process."""

    def __init__(self, hub: Any, start_step: int, streams: Any, dtype: torch.dtype = torch.float32) -> None:
        self._publisher = Publisher(hub, start_step, streams, float32_as=dtype)

    def publish(
        self, phase: int, version: int, student: list[Tensor], teacher: FlatWeights | None = None, settle: bool = True
    ) -> None:
        """Publish, and wait until the hub has it."""
        self._publisher.publish(phase, version, student, teacher)
        if settle:
            self._publisher.settle()

    def reach(self, step: int) -> None:
        """What hooks do at each step."""
        self._publisher.reached = step
