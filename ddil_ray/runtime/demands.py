"""What a run asks of a cluster: its roles, and how many actors each has at least and at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ddil_ray.config import Role, RunConfig
from ddil_ray.errors import ConfigError
from ddil_ray.training.recipe import ROLE_OF_ORIGIN, Recipe

__all__ = ["Demand", "at_most", "demands", "evaluation_demand", "pool_bounds", "pool_roles", "resized"]

R = TypeVar("R", bound=Role)


@dataclass(frozen=True)
class Demand:
    """What one role asks of the cluster at least."""

    role: str
    count: int
    cpus: float
    gpus: float | str
    """GPUs per actor; "auto" until `with_gpu_shares`."""


def demands(config: RunConfig) -> list[Demand]:
    """Every role that this run starts, at its smallest size."""
    recipe = Recipe(config)
    trainer = config.trainer
    rows = [Demand("trainer", trainer.workers[0], trainer.num_cpus, trainer.num_gpus)]
    for origin in recipe.priors.origins:
        role = getattr(config, ROLE_OF_ORIGIN[origin])
        name = ROLE_OF_ORIGIN[origin] if origin.label != "mixed" else "student_rollouts (mixed)"
        rows.append(Demand(name, role.bounds[0], role.num_cpus, role.num_gpus))
        if config.labels.placement == "pool":
            labels = config.labels
            rows.append(Demand(f"labels ({origin.label})", labels.bounds[0], labels.num_cpus, labels.num_gpus))
    if config.shift.enabled:
        rows.append(Demand("shift", 1, config.shift.num_cpus, config.shift.num_gpus))
    return rows


def evaluation_demand(config: RunConfig) -> Demand:
    """What evaluation asks for, alone when training has ended."""
    e = config.evaluation
    return Demand("evaluation", e.bounds[0], e.num_cpus, e.num_gpus)


def at_most(role: R) -> R:
    """`role` at its largest."""
    return role.model_copy(update={"num_actors": role.bounds[1]})


def pool_roles(config: RunConfig) -> dict[str, str]:
    """The actor pools of a run, named as in `sizing.py`, and the config group that sizes each."""
    named = {}
    for origin in Recipe(config).priors.origins:
        named[origin.label] = ROLE_OF_ORIGIN[origin]
        if config.labels.placement == "pool":
            named[f"labels/{origin.label}"] = "labels"
    return named


def pool_bounds(config: RunConfig) -> dict[str, tuple[int, int]]:
    """The least and most actors of every pool."""
    return {pool: getattr(config, role).bounds for pool, role in pool_roles(config).items()}


def resized(config: RunConfig, sizes: Mapping[str, Any]) -> RunConfig:
    """The config with other `num_actors` of some roles, by role.

    Raises:
        ConfigError: not a role whose actors run while the student trains, or not a number of actors.
    """
    roles = sorted(set(pool_roles(config).values()))
    for role, size in sizes.items():
        if role not in roles:
            raise ConfigError(
                f"ROLE must be one that has actors while this run trains, {', '.join(roles)}, but is {role!r} instead."
            )
        try:
            group = type(getattr(config, role)).model_validate({**dict(getattr(config, role)), "num_actors": size})
        except ValidationError as error:
            raise ConfigError(
                f"`{role}` must be a number of actors, or [min, max] to scale between, but is {size!r} instead."
            ) from error
        config = config.model_copy(update={role: group})
    return config
