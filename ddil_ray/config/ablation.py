"""The config of `ddil-ray ablate`: a grid of runs that differ in a few settings and are paired by seed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, model_validator

from ddil_ray.config.kinds import Gpus, Group, Positive, Seed

__all__ = ["AblationConfig", "RunResources", "slug"]

Changes = dict[str, Any]
_OWN = ("name", "output", "seed")
"""Settings that every run of a grid gets from the grid."""


def slug(text: str) -> str:
    """`text` as part of a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "-"


class RunResources(Group):
    """What one run takes of the cluster; as many run at once as fit."""

    num_cpus: Positive = Field(1, description="reserved; a run computes with OMP_NUM_THREADS threads, 1 by default")
    num_gpus: Gpus = 0


class AblationConfig(Group):
    """Everything `ddil-ray ablate` reads."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    base: str = Field(description="config of the runs: a preset's name, a path or an fsspec URL")
    settings: Changes = Field(default_factory=dict, description="settings of every run, over the base's")
    seeds: tuple[Seed, ...] = Field((0, 1, 2, 3, 4), min_length=1, description="of training; runs are paired by seed")
    compare: str = Field(description="axis whose first option is the baseline of the others")
    axes: dict[str, dict[str, Changes]] = Field(
        min_length=1, description="axis -> option -> its settings, over `settings`; the grid is their product"
    )
    resources: RunResources = RunResources()

    @model_validator(mode="after")
    def _fits_together(self) -> AblationConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, but are {list(self.seeds)}")
        if self.compare not in self.axes:
            raise ValueError(f"compare must be one of the axes {', '.join(self.axes)}, but is {self.compare!r}")
        if len(self.axes[self.compare]) < 2:
            raise ValueError(f"axes.{self.compare} must have a baseline and another option, as it is compared")
        for axis, options in self.axes.items():
            if not options:
                raise ValueError(f"axes.{axis} must have an option, but has none")
            _differ(options, f"axes.{axis}")
            for option, changes in options.items():
                _leaves_own(changes, f"axes.{axis}.{option}")
        _leaves_own(self.settings, "settings")
        return self


def _differ(options: Iterable[str], where: str) -> None:
    slugs = [slug(option) for option in options]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"{where} must have names that differ in letters or digits, as folders are named after them")


def _leaves_own(changes: Changes, where: str) -> None:
    for key in _OWN:
        if key in changes:
            raise ValueError(f"{where}.{key} must be left out: the ablation sets the {key} of every run")
