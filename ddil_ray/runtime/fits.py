"""Whether a run fits a cluster: each role's share of its GPUs, and what would wait for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ddil_ray.config import Role, RunConfig
from ddil_ray.config.groups import Evaluation, Shift, Trainer
from ddil_ray.errors import ConfigError
from ddil_ray.runtime.demands import Demand, demands, evaluation_demand

__all__ = ["check_fits", "evaluation_role", "role_alone", "room", "total", "with_gpu_shares"]

R = TypeVar("R", bound=Role)

_GROUPS = ("trainer", "forward_states", "student_rollouts", "teacher_rollouts", "labels", "shift")
"""The config groups that ask for resources while the student trains."""

_UNITS = {"CPU": "CPUs", "GPU": "GPUs"}
Nodes = Sequence[Mapping[str, Any]]
"""What `ray.nodes()` gives."""


def total(nodes: Nodes) -> dict[str, float]:
    """The resources of all nodes that are there."""
    resources: Counter[str] = Counter()
    for node in _alive(nodes):
        resources.update(node["Resources"])
    return dict(resources)


def room(nodes: Nodes, wants: Mapping[str, float]) -> int:
    """How many actors that want amounts of resources, at least one, nodes hold: each lies on one node as a whole."""
    return sum(
        min(int((node["Resources"].get(kind, 0.0) + 1e-9) // amount) for kind, amount in wants.items() if amount)
        for node in _alive(nodes)
    )


def with_gpu_shares(config: RunConfig, *, gpus: float) -> RunConfig:
    """The config with every `num_gpus: auto` made a number: a whole GPU each, equal shares of few, or 0 without any.

    Workers that exchange parts of networks get whole ones, where one is left for the other roles.
    """
    trainer = config.trainer
    if trainer.exchanges_parts and trainer.num_gpus == "auto" and gpus > trainer.workers[0]:
        config = config.model_copy(update={"trainer": trainer.model_copy(update={"num_gpus": 1.0})})
    asking = sum(d.count for d in demands(config) if d.gpus == "auto")
    fixed = sum(d.count * float(d.gpus) for d in demands(config) if d.gpus != "auto")
    share = _share(asking, gpus - fixed)
    update = {}
    for name in _GROUPS:
        role = getattr(config, name)
        if role.num_gpus == "auto":
            update[name] = role.model_copy(update={"num_gpus": share})
    if (e := config.evaluation).num_gpus == "auto":  # it runs alone, when training has ended
        update["evaluation"] = e.model_copy(update={"num_gpus": _share(e.bounds[0], gpus)})
    return config.model_copy(update=update)


def _share(actors: int, gpus: float) -> float:
    """The largest share, in hundredths, that `actors` can have so that whole numbers of them fit each GPU."""
    if actors == 0 or gpus <= 0:
        return 0.0
    if gpus < 1:
        return int(gpus / actors * 100) / 100
    return int(100 / max(1, -(-actors // int(gpus)))) / 100


def role_alone(name: str, role: R) -> R:
    """`role`, called `name`, with its share of the connected cluster's GPUs; its actors have it to themselves.

    Raises:
        ConfigError: they do not fit.
    """
    import ray

    nodes: Nodes = ray.nodes()
    if role.num_gpus == "auto":
        role = role.model_copy(update={"num_gpus": _share(role.bounds[0], total(nodes).get("GPU", 0.0))})
    _check_sum([Demand(name, role.bounds[0], role.num_cpus, role.num_gpus)], total(nodes))
    _check_role(name, role, role.bounds[0], nodes)
    return role


def evaluation_role(config: RunConfig) -> Evaluation:
    """The actors that measure, with their share of the connected cluster's GPUs; they have it to themselves.

    Raises:
        ConfigError: they do not fit.
    """
    return role_alone("evaluation", config.evaluation)


def check_fits(config: RunConfig, nodes: Nodes) -> None:
    """Compare what the run needs at least, `num_gpus` in numbers, with what the nodes of a cluster have.

    Raises:
        ConfigError: it would wait for ever, or workers that keep parts of networks would share GPUs.
    """
    training, alone = demands(config), [evaluation_demand(config)] if config.evaluation.enabled else []
    _check_exchange(config.trainer)
    for rows in (training, alone):
        _check_sum(rows, total(nodes))
    counts: Counter[str] = Counter()
    for demand in (*training, *alone):
        counts[demand.role.partition(" (")[0]] += demand.count
    for name, count in counts.items():
        _check_role(name, getattr(config, name), count, nodes)


def _check_exchange(trainer: Trainer) -> None:
    if trainer.exchanges_parts and 0 < float(trainer.num_gpus) < 1:
        raise ConfigError(
            f"`trainer.num_gpus` must be whole where `trainer.parallel` is fsdp, as NCCL refuses workers that share a "
            f"GPU, but is {float(trainer.num_gpus):g} instead, a share of the few that the cluster has. Set "
            "`trainer.num_gpus=1` and other roles' `num_gpus=0`, lower `trainer.num_workers`, or add GPUs."
        )


def _check_sum(rows: list[Demand], resources: dict[str, float]) -> None:
    for kind, key in (("CPU", "cpus"), ("GPU", "gpus")):
        needed = sum(d.count * float(getattr(d, key)) for d in rows)
        has = resources.get(kind, 0.0)
        if needed > has + 1e-9:
            table = ", ".join(f"{d.role} {d.count} x {float(getattr(d, key)):g}" for d in rows)
            raise ConfigError(
                f"The roles must fit the cluster, but need {needed:g} {kind}s and it has {has:g} instead ({table}). "
                f"Lower `num_actors`, `num_workers` or `num_{key}` of a role, or add nodes."
            )


def _check_role(name: str, role: Role | Shift | Trainer, count: int, nodes: Nodes) -> None:
    """See that the nodes that `count` actors of a role may lie on hold them."""
    _check_named(name, role, total(nodes))
    selector, chosen = role.label_selector, _alive(nodes)
    if selector:
        chosen = [n for n in chosen if all(_matches(value, n["Labels"].get(key)) for key, value in selector.items())]
        if not chosen:
            known = sorted({f"{k}={v}" for n in _alive(nodes) for k, v in n["Labels"].items() if k != "ray.io/node-id"})
            raise ConfigError(
                f"`{name}.label_selector` must select a node of the cluster, but {_written(selector)} selects none. "
                f"Labels there: {', '.join(known) or 'none'}. Start nodes with `ray start --labels`, or change it."
            )
    wants = {"CPU": role.num_cpus, "GPU": float(role.num_gpus), **_named(role)}
    held = room(chosen, wants) if any(wants.values()) else count
    if held < count:
        which = f"that {_written(selector)} selects" if selector else "of the cluster"
        each = " and ".join(f"{amount:g} {_UNITS.get(kind, kind)}" for kind, amount in wants.items() if amount)
        raise ConfigError(
            f"`{name}` must fit the nodes {which}, but they hold {held} of its {count} actors of {each}, each on one "
            f"node. Lower `{name}`'s number or what each of them asks for, or add nodes: those that an autoscaler "
            "could add do not count."
        )


def _alive(nodes: Nodes) -> Nodes:
    return [node for node in nodes if node["Alive"]]


def _named(role: Role | Shift | Trainer) -> dict[str, float]:
    """What an actor of a role wants beside CPUs and GPUs."""
    kind = {f"accelerator_type:{role.accelerator_type}": 0.001} if role.accelerator_type else {}
    return {**role.resources, **kind}


def _check_named(name: str, role: Role | Shift | Trainer, resources: dict[str, float]) -> None:
    for resource, amount in _named(role).items():
        if resources.get(resource, 0.0) < amount:
            raise ConfigError(
                f"`{name}` must ask for resources that the cluster has, but {resource!r} is not among "
                f"{', '.join(sorted(k for k in resources if not k.startswith('node:')))}."
            )


def _matches(value: str, label: str | None) -> bool:
    """Whether a node with this label, or None without one, is selected; as Ray does."""
    wanted = value.removeprefix("!")
    members = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return (label in [member.strip() for member in members]) != value.startswith("!")


def _written(selector: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in selector.items())
