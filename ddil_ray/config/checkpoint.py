"""The group of checkpoints: how often, which are kept, and how many may fail."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictInt

from ddil_ray.config.kinds import Count, Group

__all__ = ["Checkpoint"]


class Checkpoint(Group):
    """Saving the state of training."""

    every: Count = Field(200, description="steps")
    keep: Count = Field(2, description="newest ones that are kept")
    best: str | None = Field(
        None,
        description="metric, by its name in metrics.jsonl, whose lowest value marks one more that is kept; shift/... "
        "says more than loss, which no two rounds share",
    )
    max_failures: Annotated[StrictInt, Field(ge=0)] = Field(
        3, description="checkpoints in a row that may fail to be written; the run goes on until then"
    )
