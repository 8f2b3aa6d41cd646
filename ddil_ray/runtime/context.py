"""What every process of a run is given. Imports neither torch nor models: Ray's own processes unpickle it too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ddil_ray.imports import import_large

if TYPE_CHECKING:
    from ddil_ray.config import Role
    from ddil_ray.config.groups import Shift
    from ddil_ray.training.recipe import Recipe

__all__ = ["Columns", "RunContext", "StageCall", "actor_options", "build_stage", "stage_class"]

Columns = dict[str, Any]
"""A batch of Ray Data: numpy arrays by column."""


@dataclass(frozen=True)
class RunContext:
    """What every actor of a run gets."""

    config: dict[str, Any]
    hub: Any
    images: Any
    """Reference to the (N, C, H, W) float32 training images."""
    labels: Any
    """Reference to the (N,) int64 condition ids."""
    prompts: Any
    """Reference to the run's `Prompts`, or to None."""
    max_staleness: int
    kept: str | None = None
    """Folder of kept blocks, where some are kept."""
    code_allowed: bool = False
    """Whether the driver may call factories of any module, and so may every actor of its run."""
    poisoned: str | None = None
    """Folder of samples of states that were not finite; None: there are none."""

    @cached_property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        from ddil_ray.config import RunConfig
        from ddil_ray.factory import allow_code
        from ddil_ray.training.recipe import Recipe

        if self.code_allowed:
            allow_code()
        return Recipe(RunConfig.model_validate(self.config))


class StageCall:
    """The class that Ray Data makes actors of: builds a stage, named as `module.path:Class`, in the actor."""

    def __init__(self, stage: str, *arguments: Any) -> None:
        self._stage = build_stage(stage, *arguments)

    def __call__(self, batch: Columns) -> Columns:
        """One batch through the stage."""
        columns: Columns = self._stage(batch)
        return columns


def build_stage(stage: str, *arguments: Any) -> Any:
    """An object of the class `module.path:Class`."""
    return stage_class(stage)(*arguments)


def stage_class(stage: str) -> Any:
    """The class `module.path:Class`, whose module is imported."""
    module, _, name = stage.partition(":")
    return getattr(import_large(module), name)


def actor_options(role: Role | Shift) -> dict[str, Any]:
    """What Ray is asked for, for one actor of `role`."""
    options: dict[str, Any] = {"num_cpus": role.num_cpus}
    if role.num_gpus:
        options["num_gpus"] = role.num_gpus
    if role.accelerator_type:
        options["accelerator_type"] = role.accelerator_type
    if role.resources:
        options["resources"] = dict(role.resources)
    if role.label_selector:
        options["label_selector"] = dict(role.label_selector)
    return options
