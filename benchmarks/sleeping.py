"""Networks that take a given time, as a busy device would, and no compute: what waits for whom is then all that counts.

Given to runs as a teacher, `sleeping:NAME`; the folder of this file must be on the path of all processes.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ddil_ray.models.model import DiffusionModel
from ddil_ray.testing import TinyNetwork, tiny_model

__all__ = ["SleepingStage", "fast_trainer", "slow_trainer"]


class SleepingNetwork(TinyNetwork):
    """A tiny network whose passes take `learning_s` where gradients are wanted, and `acting_s` where they are not."""

    learning_s = acting_s = 0.0

    def forward(self, x_t: Tensor, time_: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `TinyNetwork.forward`."""
        time.sleep(self.learning_s if torch.is_grad_enabled() else self.acting_s)
        return super().forward(x_t, time_, cond, w)


class QuickLearner(SleepingNetwork):
    """Six passes of an actor, which a block of progressive distillation takes, last longer than one update."""

    learning_s, acting_s = 0.010, 0.006


class SlowLearner(SleepingNetwork):
    """One update lasts longer than six passes of an actor."""

    learning_s, acting_s = 0.060, 0.003


def _model(kind: type[SleepingNetwork]) -> DiffusionModel:
    model = tiny_model()
    network = kind((1, 8, 8), conditions=11)
    network.load_state_dict(model.network.state_dict())
    model.network = network
    return model


def fast_trainer() -> DiffusionModel:
    """Rollouts are the slower side."""
    return _model(QuickLearner)


def slow_trainer() -> DiffusionModel:
    """Training is the slower side."""
    return _model(SlowLearner)


class SleepingStage:
    """What a pool of `ddil_ray.runtime.requests` does, with a given time for its compute."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, request: Any) -> Any:
        """`request`, after its time."""
        time.sleep(self._seconds)
        return request
