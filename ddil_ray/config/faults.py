"""The group of faults: what a run lives through, and when it gives up."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictInt

from ddil_ray.config.kinds import Count, Fraction, Group, Positive

__all__ = ["Faults"]


class Faults(Group):
    """What a run lives through, and when it gives up, see docs/reliability.md."""

    timeout_s: Positive = Field(
        1800.0,
        le=1e8,
        description="longest time for a block, or for loading an actor's models, or ten times the median of blocks if "
        "that is more; what takes longer hangs: its process is ended, and its stack told. Five times as long for a "
        "step, which may wait for blocks",
    )
    max_deaths: Count = Field(
        5, description="deaths of an actor, without a block that it finished in between; one more ends the run"
    )
    max_poisoned: Fraction = Field(
        0.01, description="share of an actor's last 64 blocks that may be NaN or infinity; more ends the run"
    )
    max_skipped_steps: Annotated[StrictInt, Field(ge=0)] = Field(
        10, description="steps in a row that are left out as a loss or gradient is not finite; one more ends the run"
    )
