"""What the same GPUs deliver without a pipeline: every rank makes its own states, labels them and trains on them.

Expectations of closed form over what a rank may draw. No cost of a framework, of the network or of the gradient
exchange is in them, and none is in the ideal; measured runs that they are compared with have all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Draw", "ideal_rate", "naive_rate", "stops", "synchronised_rate"]


@dataclass(frozen=True)
class Draw:
    """One thing that a step may bring a rank: states of one source, of one length of rollout."""

    chance: float
    seconds: float
    """Per row, with its label and its share of the update."""


def stops(chance: float, *, stages: int, stage_s: float, other_s: float) -> list[Draw]:
    """A rollout that ends at a random stage, each equally likely, and gives the state that it ends at.

    Args:
        chance: of this source.
        stages: of the sampler.
        stage_s: seconds per row and stage.
        other_s: seconds per row of the label and the update.
    """
    return [Draw(chance / stages, other_s + n * stage_s) for n in range(1, stages + 1)]


def naive_rate(draws: Sequence[Draw], ranks: int) -> float:
    """Rows per second of `ranks` that each draw alone and meet at every step: ranks / E[max of `ranks` draws].

    With F the distribution function of a draw's seconds, E[max] = sum over values x of x (F(x)^ranks - F(x-)^ranks).
    """
    chances, seconds = _sorted(draws)
    up_to = np.cumsum(chances).clip(max=1.0) ** ranks
    longest = float(np.sum(np.diff(up_to, prepend=0.0) * seconds))
    return ranks / longest


def synchronised_rate(draws: Sequence[Draw], ranks: int) -> float:
    """Rows per second of `ranks` that share one draw per step, as DMD2 does: ranks / E[draw]. No rank waits."""
    chances, seconds = _sorted(draws)
    return ranks / float(chances @ seconds)


def ideal_rate(draws: Sequence[Draw], gpus: int) -> float:
    """Rows per second if the same work could be split over `gpus` at will: that of ranks which never wait."""
    return synchronised_rate(draws, gpus)


def _sorted(draws: Sequence[Draw]) -> tuple[np.ndarray, np.ndarray]:
    """(chances, seconds) by rising seconds.

    Raises:
        ValueError: chances do not sum to 1.
    """
    order = sorted(draws, key=lambda draw: draw.seconds)
    chances = np.array([draw.chance for draw in order])
    if abs(chances.sum() - 1) > 1e-9:
        raise ValueError(f"`draws` must have chances that sum to 1, but they sum to {chances.sum():g} instead.")
    return chances, np.array([draw.seconds for draw in order])
