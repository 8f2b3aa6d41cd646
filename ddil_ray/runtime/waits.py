"""How long a trainer waits before it, or what it waits for, is taken for hung, in units of `faults.timeout_s`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import ray

from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.health import TRAINER
from ddil_ray.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from ddil_ray.config.faults import Faults

__all__ = ["BLOCK_TIMES", "STEP_TIMES", "exchange_s", "trainer_name", "trainer_watchdog"]

BLOCK_TIMES = 4.0
"""A block: an actor may hang three times, of which the third ends the run, before the trainer gives up."""
STEP_TIMES = 5.0
"""A step, which may wait for a block."""
_TOLD_S = 30.0


def exchange_s(faults: Faults) -> int:
    """Seconds that a rank waits for the others at most: longer than one of them may take, which then ends itself and
    says at what, in place of an exchange that is broken off."""
    return math.ceil(STEP_TIMES * faults.timeout_s) + 60


def trainer_name(rank: int) -> str:
    """What the hub knows the last words of a trainer's process by."""
    return f"{TRAINER}{rank}"


def trainer_watchdog(context: RunContext, rank: int) -> Watchdog:
    """Watches one process of the trainer, which Ray Train starts again when it ends."""

    def tell(words: str) -> None:
        told: Any = context.hub.last_words.remote(trainer_name(rank), words, True)
        ray.get(told, timeout=_TOLD_S)

    return Watchdog(tell, timeout_s=context.recipe.config.faults.timeout_s)
