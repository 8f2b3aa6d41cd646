"""The one law that the time of every state is drawn from, whatever its source.

If rollouts chose their own times, low t would be over-sampled and most of a measured gain would be the time
distribution, not the states. So t is drawn first, here, and each source brings a state to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TimeLaw"]


@dataclass(frozen=True)
class TimeLaw:
    """Uniform over the positive times of a grid."""

    times: Tensor
    """(n,) float64, ascending, in (0, 1]."""

    @classmethod
    def over(cls, grid: Tensor) -> TimeLaw:
        """The law over a descending grid that ends in 0, such as `uniform_grid(N)`; 0 itself is not drawn."""
        return cls(grid[:-1].flip(0))

    def quantile(self, u: Tensor) -> Tensor:
        """Times of any shape for `u` in [0, 1); u uniform gives the law."""
        n = len(self.times)
        return self.times[(u.double() * n).floor().long().clamp(0, n - 1)]

    def stratified(self, rows: int, per_row: int, generator: torch.Generator) -> Tensor:
        """(rows, per_row) times, one from each of `per_row` equal parts of the law: each part's mean law is exact.

        A trajectory that gives `per_row` states gives them along its whole length, and over all columns the law is met.
        """
        u = torch.rand(rows, per_row, generator=generator, dtype=torch.float64)
        return self.quantile((torch.arange(per_row) + u) / per_row)
