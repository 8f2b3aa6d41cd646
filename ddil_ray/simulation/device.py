"""Time on a device that is not there: a process sleeps through it, or adds it up where only its sum is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ddil_ray.errors import ConfigError

__all__ = ["VARIABLE", "VirtualClock", "World", "spend", "virtual_time"]

VARIABLE = "DDIL_RAY_SIMULATION"
"""Environment variable with a `World`, which processes on Ray inherit."""


@dataclass(frozen=True)
class World:
    """What all simulated models of a process have in common."""

    scale: float = 1.0
    """Seconds slept per second of the simulated device: a slow world leaves the processor time for many processes."""
    weights: int = 64
    """Trained weights of a student; so many float32 are really averaged, exchanged, published and loaded."""

    @classmethod
    def here(cls) -> World:
        """That of this process's environment.

        Raises:
            ConfigError: it is not as `text` writes it.
        """
        text = os.environ.get(VARIABLE)
        if text is None:
            return cls()
        try:
            scale, weights = text.split(",")
            return cls(float(scale), int(weights))
        except ValueError as error:
            raise ConfigError(
                f"`{VARIABLE}` must be <scale>,<weights> such as 10,64, but is {text!r} instead."
            ) from error

    @property
    def text(self) -> str:
        """As it is written in the environment."""
        return f"{self.scale:g},{self.weights}"


@dataclass
class VirtualClock:
    """Time on the simulated device that was spent without sleeping."""

    seconds: float = 0.0


_clocks: list[VirtualClock] = []


def spend(seconds: float) -> None:
    """Have the device busy for `seconds`."""
    if _clocks:
        _clocks[-1].seconds += seconds
    elif seconds > 0:
        time.sleep(seconds)


@contextmanager
def virtual_time() -> Iterator[VirtualClock]:
    """Within it `spend` adds to the clock that it gives, in all threads of this process."""
    clock = VirtualClock()
    _clocks.append(clock)
    try:
        yield clock
    finally:
        _clocks.pop()
