"""A tiny teacher whose network takes its time in Ray's processes, so that a test can act while a run trains."""

from __future__ import annotations

import sys
import time

from torch import Tensor

from ddil_ray.models import DiffusionModel
from ddil_ray.testing import TinyNetwork, tiny_model

__all__ = ["slow_model"]

PAUSE_S = 0.05 if "default_worker" in sys.argv[0] else 0.0


class _Slow(TinyNetwork):
    """Sleeps at every pass."""

    def forward(self, *arguments: Tensor) -> Tensor:
        time.sleep(PAUSE_S)
        return super().forward(*arguments)


def slow_model() -> DiffusionModel:
    """`tiny_model`, slow."""
    model = tiny_model()
    model.network.__class__ = _Slow
    return model
