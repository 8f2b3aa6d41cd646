"""Tiny teachers whose networks take their time in Ray's processes, so that a test can act while a run trains."""

from __future__ import annotations

import time

import psutil
from torch import Tensor

from ddil_ray.models import DiffusionModel
from ddil_ray.testing import TinyNetwork, tiny_model

__all__ = ["slow_everywhere", "slow_to_make_states"]


class _Slow(TinyNetwork):
    """Sleeps at every pass."""

    pause_s = 0.0

    def forward(self, *arguments: Tensor) -> Tensor:
        time.sleep(self.pause_s)
        return super().forward(*arguments)


def slow_everywhere() -> DiffusionModel:
    """`tiny_model`, slow in actors and in the trainer."""
    return _slow(0.05, "ray::")


def slow_to_make_states() -> DiffusionModel:
    """`tiny_model`, slow in the actors of Ray Data alone: one cannot keep up with a trainer."""
    return _slow(0.15, "ray::MapWorker")


def _slow(pause_s: float, title: str) -> DiffusionModel:
    model = tiny_model()
    model.network.__class__ = _Slow
    if any(title in part for part in psutil.Process().cmdline()):  # what Ray calls the process
        model.network.pause_s = pause_s
    return model
