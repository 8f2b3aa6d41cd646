"""What settings are made of: groups, and numbers with their ranges."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, field_validator
from pydantic_core import PydanticCustomError

__all__ = [
    "Count",
    "Depth",
    "Fraction",
    "Gpus",
    "Group",
    "NoBool",
    "NonNegative",
    "Positive",
    "Seed",
    "Side",
    "Steps",
    "Width",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def _no_bool(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, which pydantic would take for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


NoBool = BeforeValidator(_no_bool)
"""Of numbers; stands behind their bounds, so that these are in the schema."""
Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Steps = Annotated[StrictInt, Field(ge=1, le=10_000)]
"""Of a sampler: a grid of times is made of them."""
Width = Annotated[StrictInt, Field(ge=1, le=16_384)]
"""Of a layer that a config describes."""
Depth = Annotated[StrictInt, Field(ge=1, le=64)]
"""Number of such layers."""
Side = Annotated[StrictInt, Field(ge=1, le=16_384)]
"""Of an image, in pixels."""
Seed = Annotated[StrictInt, Field(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), NoBool]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NoBool]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NoBool]


def _whole_above_one(number: float) -> float:
    if number > 1 and number % 1:
        raise PydanticCustomError("gpus", "Input should be whole above 1")
    return number


Gpus = Annotated[NonNegative, AfterValidator(_whole_above_one)]
"""Of an actor: Ray gives shares of one GPU alone."""


class Group(BaseModel):
    """A group of settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_max_length=4096)

    @field_validator("*")
    @classmethod
    def _text_can_be_written(cls, value: Any) -> Any:
        """No path, name or prompt has control characters, on which the system's own functions fail."""
        if isinstance(value, str) and _CONTROL.search(value):
            raise PydanticCustomError("control", "Input should be text without control characters")
        return value
