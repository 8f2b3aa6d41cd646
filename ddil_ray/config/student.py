"""The group of the student: where it starts, and what of it is trained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ddil_ray.config.kinds import Group, NoBool, NonNegative, Positive, Width
from ddil_ray.config.places import Place

__all__ = ["LoraConfig", "Student"]


class LoraConfig(Group):
    """Low-rank adapters on a frozen network."""

    rank: Width = 64
    alpha: Positive = Field(64.0, description="adapters are scaled by alpha / rank")
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="ends of the names of the layers that get adapters; default: for UNets attention, feed-forward and "
        "convolutions as in LCM-LoRA, for transformers the projections of attention",
    )
    dropout: Annotated[float, Field(ge=0, lt=1), NoBool] = 0.0


class Student(Group):
    """The model that is trained, a copy of the teacher at first."""

    model: Place | None = Field(
        None,
        description="what training starts from, given as `teacher.model` is: smaller, or of another prediction type; "
        "default: the teacher",
    )
    lora: LoraConfig | None = Field(
        None,
        description="train adapters {rank 64, alpha 64, dropout 0} on the frozen network, and nothing else; "
        "`target_modules` are ends of names of layers, by default those of LCM-LoRA in UNets and the projections of "
        "attention in transformers; null: train the whole network",
    )
    guidance: NonNegative | None = Field(
        None,
        description="of the exported student where it was trained over a range, in teacher.guidance_convention; "
        "default: the middle",
    )
    license: str | None = Field(
        None, description="licence in the student's model card, as the hub names it; default: the teacher's"
    )
