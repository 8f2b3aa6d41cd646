"""`ddil-ray plan`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ddil_ray.cli.memory import memory_of, print_memory
from ddil_ray.cli.options import AllowCode, AsJson, Config, Overrides, print_json, print_lines, print_table
from ddil_ray.errors import ConfigError

__all__ = ["plan"]

_ROLES = ("forward_states", "student_rollouts", "teacher_rollouts", "labels", "trainer")


def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="Also recommend a split of so many GPUs.")] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="What roles without accelerator_type run on; default: A100.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every stage briefly on this machine, in place of counting FLOP.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Tell how many actors every role needs, what the run delivers, and what limits it.

    Examples:

    `ddil-ray plan sd15/lcm data.source=prepared/ trainer.num_workers=8`

    `ddil-ray plan my.yaml --gpus 32 --accelerator H100`

    `ddil-ray plan my.yaml --measure`
    """
    from ddil_ray.config import RunConfig, load_config
    from ddil_ray.training.recipe import Recipe

    if measure and accelerator is not None:
        raise ConfigError(
            f"`--accelerator` must be left out with --measure, which takes times from this machine, but is "
            f"{accelerator!r} instead."
        )
    recipe = Recipe(load_config(config, overrides or [], kind=RunConfig))
    found = plan_of(recipe, gpus=gpus, accelerator=None if measure else accelerator or "A100")
    if as_json:
        print_json(found)
    else:
        _print(recipe, found)


def plan_of(recipe: Any, *, gpus: int | None, accelerator: str | None) -> dict[str, Any]:
    """What the command prints.

    Args:
        recipe: the run.
        gpus: to recommend a split of.
        accelerator: that networks are counted on; None to measure here.

    Raises:
        ConfigError: something is wrong with the run, or an accelerator is not known.
    """
    from dataclasses import asdict

    from ddil_ray.capacity.plan import capacity, resized, split_of

    known = None if accelerator is None else _accelerators(recipe, accelerator)
    made = recipe.ingredients()
    costs = _costs(recipe, made, known)
    found = {
        "basis": f"counted on {recipe.config.trainer.accelerator_type or accelerator}"
        if costs.basis == "counted"
        else costs.basis,
        "capacity": asdict(capacity(recipe, made, costs)),
        "memory": memory_of(recipe, made),
        "cluster": _cluster(recipe.config),
        "split": None,
    }
    if gpus is not None:
        split = split_of(recipe, made, costs, gpus=gpus)
        if split is None:
            raise ConfigError(
                f"`--gpus` must suffice for one worker and one actor of every source, but is {gpus} instead. Raise it, "
                "or give roles less than a whole GPU by `num_gpus`."
            )
        better = capacity(*resized(recipe, made, costs, split))
        found["split"] = {"gpus": gpus, "settings": _settings(split), "capacity": asdict(better)}
    return found


def _accelerators(recipe: Any, default: str) -> dict[str, Any]:
    """That of every role."""
    from ddil_ray.capacity.accelerators import accelerator

    found = {}
    for role in _ROLES:
        own = getattr(recipe.config, role).accelerator_type
        found[role] = accelerator(own or default, field=f"{role}.accelerator_type" if own else "--accelerator")
    return found


def _costs(recipe: Any, made: Any, accelerators: Mapping[str, Any] | None) -> Any:
    from ddil_ray.capacity.costs import counted, declared, measured
    from ddil_ray.simulation.network import SimulatedNetwork

    if accelerators is None:
        return measured(recipe, made)
    if isinstance(made.teacher.network, SimulatedNetwork):
        return declared(recipe, made)
    return counted(recipe, made, accelerators)


def _cluster(config: Any) -> str | None:
    """Whether the cluster of RAY_ADDRESS has the resources; None where there is none to ask."""
    if "RAY_ADDRESS" not in os.environ:
        return None
    import ray

    from ddil_ray.runtime.cluster import connected
    from ddil_ray.runtime.fits import check_fits, total, with_gpu_shares

    with connected(config):
        nodes = ray.nodes()
    resources = total(nodes)
    try:
        check_fits(with_gpu_shares(config, gpus=resources.get("GPU", 0.0)), nodes)
    except ConfigError as error:
        return str(error)
    return f"The cluster has them: {resources.get('CPU', 0.0):g} CPUs, {resources.get('GPU', 0.0):g} GPUs."


def _settings(split: Any) -> list[str]:
    return [f"trainer.num_workers={split.workers}", *(f"{role}.num_actors={n}" for role, n in split.actors.items())]


def _print(recipe: Any, found: Mapping[str, Any]) -> None:
    trainer, capacity = recipe.config.trainer, found["capacity"]
    print_lines(
        f"update    {capacity['update_s']:.3g} s of {trainer.workers[1]} x "
        f"{trainer.batch_size // trainer.workers[1]} rows, {found['basis']}"
    )
    print_table(
        "Actors",
        ["role", "sources", "s per block", "needed", "configured", "recommended", "utilisation"],
        [
            [
                role["role"],
                role["pools"],
                f"{role['block_s']:.3g}",
                f"{role['needed']:.2f}",
                role["actors"],
                role["recommended"],
                f"{role['utilisation']:.0%}",
            ]
            for role in capacity["roles"]
        ],
    )
    _print_phases(capacity)
    publication, traffic, inline = (capacity[part] for part in ("publication", "traffic", "inline"))
    print_lines(
        f"weights   {_size(publication['bytes'])} every {recipe.config.sync.every} steps: "
        f"{publication['seconds']:.2g} s, {publication['share']:.1%} of the time where the trainer waits for it",
        f"traffic   {_size(traffic['worker_in'])}/s of states into a worker, {_size(traffic['node_in'])}/s of weights "
        f"into a node; at most {_size(traffic['states'])} of states in object stores",
        f"inline    as many GPUs that make their own states: {_rate(inline['naive'])} if each draws its source, "
        f"{_rate(inline['synchronised'])} if all draw the same",
    )
    print_memory(found["memory"])
    if found["split"] is not None:
        split = found["split"]
        print_lines(f"split     {split['gpus']} GPUs: {' '.join(split['settings'])}")
        _print_phases(split["capacity"])
    if found["cluster"] is not None:
        print_lines(f"cluster   {found['cluster']}")
    print_lines("Nothing was started.")


def _print_phases(capacity: Mapping[str, Any]) -> None:
    for phase in capacity["phases"]:
        print_lines(
            f"phase     student of {phase['student_steps']} steps: {_rate(phase['rows_per_s'])} of "
            f"{_rate(capacity['ideal_rows_per_s'])}, stall {phase['stall']:.1%}; limit: {phase['limit']}"
        )


def _rate(rows_per_s: float) -> str:
    return f"{rows_per_s:,.0f} rows/s" if rows_per_s >= 100 else f"{rows_per_s:.3g} rows/s"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
