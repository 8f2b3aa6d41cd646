"""What one run needs and delivers, from its config and its costs; docs/plan.md has the equations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ddil_ray.capacity.baselines import Draw, naive_rate, synchronised_rate
from ddil_ray.capacity.costs import Costs
from ddil_ray.capacity.pipeline import Forecast, Stream, Update, forecast
from ddil_ray.capacity.sizing import HEADROOM, Load, Split, actors_needed, best_split
from ddil_ray.capacity.sources import Source, sources_of
from ddil_ray.training.recipe import ROLE_OF_ORIGIN, Ingredients, Recipe

__all__ = ["Capacity", "PhaseCapacity", "RoleCapacity", "capacity", "resized", "split_of"]

_LITTLE = 0.01
"""A stall that is not worth a remedy."""


@dataclass(frozen=True)
class RoleCapacity:
    """One role: what is asked of each of its pools, and what it would take."""

    role: str
    pools: int
    """One per source that the role serves, each with `actors`."""
    actors: int
    block_s: float
    """Seconds of the slowest pool for a block."""
    needed: float
    """Actors that would never rest, of the pool that needs most."""
    recommended: int
    """ceil(1.2 needed)."""
    utilisation: float
    """needed / actors, at most 1."""
    gpus: float
    """Per actor."""


@dataclass(frozen=True)
class PhaseCapacity:
    """One phase (round of progressive distillation)."""

    student_steps: int
    rows_per_s: float
    stall: float
    """Share of the trainer's time without states."""
    limit: str
    """What keeps it from being faster."""


@dataclass(frozen=True)
class Capacity:
    """A run."""

    workers: int
    update_s: float
    """Of one worker, without stalls."""
    step_s: float
    """With stalls and publications, over all phases."""
    rows_per_s: float
    """Over all workers and phases."""
    ideal_rows_per_s: float
    """Of a trainer that never waits."""
    stall: float
    roles: tuple[RoleCapacity, ...]
    phases: tuple[PhaseCapacity, ...]
    publication: dict[str, float]
    """`bytes`, `seconds`, and the `share` of the trainer's time if it waits for them."""
    traffic: dict[str, float]
    """Bytes per second: `worker_in`, states into one worker; `node_in`, weights into one node of actors. And bytes in
    object stores at most: `states`."""
    inline: dict[str, float]
    """Rows per second of as many GPUs that make their own states: `naive`, `synchronised`."""


def capacity(recipe: Recipe, made: Ingredients, costs: Costs) -> Capacity:
    """What `recipe` needs and delivers.

    Args:
        recipe: the run, with the number of actors that is asked about.
        made: its ingredients.
        costs: of its parts.
    """
    config, trainer = recipe.config, recipe.config.trainer
    phases = [list(sources_of(recipe, made, costs, phase)) for phase in range(len(costs.phases))]
    update = Update(costs.update_s, config.sync.every, costs.publication_s)
    ideal = trainer.batch_size / (costs.update_s + costs.publication_s / config.sync.every)
    found = [_forecast(recipe, made, sources, update) for sources in phases]
    steps = np.array([f.step_s for f in found])
    loads = [_loads(recipe, sources) for sources in phases]
    rows_per_s = trainer.batch_size / float(steps.mean())
    return Capacity(
        workers=trainer.workers[1],
        update_s=costs.update_s,
        step_s=float(steps.mean()),
        rows_per_s=rows_per_s,
        ideal_rows_per_s=ideal,
        stall=float((np.array([f.stall for f in found]) * steps).sum() / steps.sum()),
        roles=tuple(_roles(recipe, phases, loads, ideal)),
        phases=tuple(
            PhaseCapacity(
                phase.student_steps,
                trainer.batch_size / f.step_s,
                f.stall,
                _limit(recipe, made, sources, update, f),
            )
            for phase, f, sources in zip(made.objective.phases, found, phases, strict=True)
        ),
        publication={
            "bytes": costs.weight_bytes,
            "seconds": costs.publication_s,
            "share": costs.publication_s / (config.sync.every * float(steps.mean())),
        },
        traffic=_traffic(recipe, phases, costs, float(steps.mean())),
        inline=_inline(recipe, phases[0], costs.update_s, gpus=_gpus(recipe, phases[0])),
    )


def resized(recipe: Recipe, made: Ingredients, costs: Costs, split: Split) -> tuple[Recipe, Ingredients, Costs]:
    """The run with other numbers of workers and actors, its batch shared by the workers."""
    config, before = recipe.config, recipe.config.trainer.workers[1]
    update: dict[str, object] = {"trainer": config.trainer.model_copy(update={"num_workers": split.workers})}
    for role, actors in split.actors.items():
        update[role] = getattr(config, role).model_copy(update={"num_actors": actors})
    other = Recipe(config.model_copy(update=update))
    plans = other.plans(len(made.plans))
    made = replace(made, plans=plans, max_staleness=other.max_staleness(plans))
    return other, made, replace(costs, update_s=costs.update_s * before / split.workers)


def split_of(recipe: Recipe, made: Ingredients, costs: Costs, *, gpus: float) -> Split | None:
    """The best split of `gpus` for the phase that needs most per row; None where they are too few.

    Roles without GPUs get what they need beside it.
    """
    trainer = recipe.config.trainer
    phases = [list(sources_of(recipe, made, costs, phase)) for phase in range(len(costs.phases))]
    loads = list(_heaviest([_loads(recipe, sources) for sources in phases]).values())
    per_row = costs.update_s * trainer.workers[1] / trainer.batch_size
    worker_s = {n: per_row for n in range(1, int(gpus) + 1) if trainer.batch_size % (n * trainer.accumulate) == 0}
    worker_gpus = _gpus_each(trainer.num_gpus)
    split = best_split([load for load in loads if load.gpus], gpus=gpus, worker_s=worker_s, worker_gpus=worker_gpus)
    if split is None:
        return None
    beside = {load.role: actors_needed(load, rows_per_s=split.rows_per_s) for load in loads if not load.gpus}
    return replace(split, actors={**split.actors, **beside})


def _forecast(
    recipe: Recipe, made: Ingredients, sources: list[Source], update: Update, *, gated: bool = True
) -> Forecast:
    config, workers = recipe.config, recipe.config.trainer.workers[1]
    streams = [
        Stream(
            source.origin.label,
            source.needed,
            actors=recipe.role_of(source.origin).bounds[1],
            block_s=source.block_s,
            after=source.after(staleness=made.max_staleness, every=config.sync.every) if gated else None,
            label_s=source.label_s if source.pooled else 0.0,
            labellers=config.labels.bounds[1] if source.pooled else 0,
            ready=config.replay.ahead * workers,
        )
        for source in sources
        if source.needed[-1] > 0
    ]
    return forecast(streams, update, ranks=workers)


def _limit(recipe: Recipe, made: Ingredients, sources: list[Source], update: Update, found: Forecast) -> str:
    """What to change first."""
    if found.stall < _LITTLE:
        return "trainer"
    free = _forecast(recipe, made, sources, update, gated=False)
    if free.stall < found.stall / 2:
        return "student weights: raise replay.max_staleness or lower sync.every"
    loads = _loads(recipe, sources)
    return max(loads, key=lambda load: 1 / load.rate(_actors(recipe, load.role))).role


def _loads(recipe: Recipe, sources: list[Source]) -> list[Load]:
    """Work of every role but the trainer per row trained on."""
    pools: dict[str, list[float]] = {}
    for source in sources:
        share = source.share / source.rows
        pools.setdefault(ROLE_OF_ORIGIN[source.origin], []).append(share * float(source.block_s.max(initial=0.0)))
        if source.pooled:
            pools.setdefault("labels", []).append(share * source.label_s)
    return [Load(role, tuple(each), _gpus_each(getattr(recipe.config, role).num_gpus)) for role, each in pools.items()]


def _heaviest(phases: list[list[Load]]) -> dict[str, Load]:
    """By role, its load in the phase where it is largest."""
    heaviest: dict[str, Load] = {}
    for load in (load for loads in phases for load in loads):
        known = heaviest.get(load.role)
        heaviest[load.role] = load if known is None or max(load.pools) > max(known.pools) else known
    return heaviest


def _roles(
    recipe: Recipe, phases: list[list[Source]], loads: list[list[Load]], rows_per_s: float
) -> Iterator[RoleCapacity]:
    for role, load in _heaviest(loads).items():
        needed, actors = float(rows_per_s * max(load.pools)), _actors(recipe, role)
        yield RoleCapacity(
            role,
            len(load.pools),
            actors,
            max(_block_s(source, role) for sources in phases for source in sources),
            needed,
            actors_needed(load, rows_per_s=rows_per_s, headroom=HEADROOM),
            min(1.0, needed / actors),
            load.gpus,
        )


def _block_s(source: Source, role: str) -> float:
    if role == "labels":
        return source.label_s
    return float(source.block_s.max(initial=0.0)) if ROLE_OF_ORIGIN[source.origin] == role else 0.0


def _actors(recipe: Recipe, role: str) -> int:
    """Of each of the role's pools, at most."""
    bounds: tuple[int, int] = getattr(recipe.config, role).bounds
    return bounds[1]


def _gpus_each(num_gpus: float | str) -> float:
    """A whole one where it is left to the cluster."""
    return 1.0 if isinstance(num_gpus, str) else float(num_gpus)


def _gpus(recipe: Recipe, sources: list[Source]) -> int:
    """That the run holds, rounded up."""
    trainer = recipe.config.trainer
    held = trainer.workers[1] * _gpus_each(trainer.num_gpus)
    for load in _loads(recipe, sources):
        held += load.gpus * len(load.pools) * _actors(recipe, load.role)
    return max(1, int(-(-held // 1)))


def _traffic(recipe: Recipe, phases: list[list[Source]], costs: Costs, step_s: float) -> dict[str, float]:
    config, trainer = recipe.config, recipe.config.trainer
    fresh = sum(float(source.plan.fresh(source.origin)[-1]) for sources in phases for source in sources)
    steps = trainer.steps * len(phases)
    blocks = {s.origin: recipe.most_actors(s.origin) + config.replay.ahead * trainer.workers[1] for s in phases[0]}
    return {
        "worker_in": fresh / steps * costs.row_bytes / step_s,
        "node_in": costs.weight_bytes / (config.sync.every * step_s),
        "states": sum(count * recipe.rows_per_block(origin) for origin, count in blocks.items()) * costs.row_bytes,
    }


def _inline(recipe: Recipe, sources: list[Source], update_s: float, *, gpus: int) -> dict[str, float]:
    """Ranks that draw a source per step and use all states of its trajectories."""
    trainer = recipe.config.trainer
    per_row = update_s * trainer.workers[1] / trainer.batch_size
    total = sum(source.share for source in sources)
    draws = [Draw(s.share / total, per_row + (float(s.state_s.mean()) + s.label_s) / s.rows) for s in sources]
    return {"naive": naive_rate(draws, gpus), "synchronised": synchronised_rate(draws, gpus)}
