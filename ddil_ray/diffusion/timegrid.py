"""Grids of times: descending from 1 to 0, N + 1 entries for N steps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["consistency_grid", "uniform_grid"]


def uniform_grid(steps: int) -> Tensor:
    """1, (N-1)/N, ..., 1/N, 0, float64: diffusers' "trailing" timesteps, then the clean end."""
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


def consistency_grid(solver_steps: int, steps: int) -> Tensor:
    """The `steps` times of a `solver_steps` grid that diffusers' LCMScheduler samples at, then 0; float64.

    For 50 and 4: 1, .76, .5, .26, 0 (timesteps 999, 759, 499, 259 of 1000).
    """
    # torch.linspace differs in the last bit, and so in a whole step where that is rounded down.
    chosen = torch.from_numpy(np.floor(np.linspace(0, solver_steps, steps, endpoint=False)))
    return torch.cat([(solver_steps - chosen) / solver_steps, torch.zeros(1, dtype=torch.float64)])
