"""Connecting to Ray quietly, and checking that a run fits the cluster before any actor starts."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ddil_ray.config import Role, RunConfig
from ddil_ray.config.groups import Evaluation, Shift, Trainer
from ddil_ray.errors import ConfigError, RunFailedError, first_line
from ddil_ray.runtime.object_store import LEAST_STORE
from ddil_ray.runtime.signals import handlers_kept
from ddil_ray.training.recipe import ROLE_OF_ORIGIN, Recipe

__all__ = [
    "LOCAL_ENV",
    "WORKER_ENV",
    "Demand",
    "check_fits",
    "check_labels",
    "connected",
    "demands",
    "evaluation_demand",
    "evaluation_role",
    "pool_bounds",
    "pool_roles",
    "ray_session",
    "resized",
    "role_alone",
    "with_gpu_shares",
]

R = TypeVar("R", bound=Role)

WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""For every process of a run."""
LOCAL_ENV = {
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # which Ray asks for, as it would for one in the home folder
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one machine is preempted as a whole
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2: a trainer that died is noticed sooner
    "RAY_worker_maximum_startup_concurrency": "16",  # else it warns of its own processes
}
"""For a Ray that is started for one run. Set in this process, so that workers inherit it and start at once."""


_TOO_LATE = "timed out during startup"
"""In what Ray raises of its own node: an Exception of no other kind."""
_OTHER_VERSIONS = "Version mismatch"
"""In the RuntimeError that Ray raises where a cluster runs with others."""


@contextmanager
def connected(config: RunConfig, *, verbose: bool = False, store: Callable[[], int] | None = None) -> Iterator[None]:
    """Be connected to Ray for the run of `config`.

    A local Ray is told of as many logical CPUs as the run's actors need at most: on a laptop they share the real ones.
    Its object store has the bytes that `store` gives, or 512 MiB.
    """
    most = config.model_copy(
        update={role: _at_most(getattr(config, role)) for role in {*pool_roles(config).values(), "evaluation"}}
    )
    cpus = max(sum(d.count * d.cpus for d in rows) for rows in (demands(most), [evaluation_demand(most)]))
    with ray_session(cpus=int(-(-cpus // 1)) + 1, verbose=verbose, store=store):
        yield


@contextmanager
def ray_session(*, cpus: int, verbose: bool = False, store: Callable[[], int] | None = None) -> Iterator[None]:
    """Be connected to Ray: the cluster of RAY_ADDRESS, one already connected to, or a local one for this command.

    Args:
        cpus: logical CPUs that a local Ray has at least.
        verbose: let Ray speak.
        store: gives the bytes of a local Ray's object store; called only where one is started. Default: 512 MiB.

    Raises:
        ConfigError: the cluster cannot be reached.
        RunFailedError: a local one does not start in time.
    """
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (WORKER_ENV | ({} if address else LOCAL_ENV)).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, cpus),
            "include_dashboard": verbose,
            "object_store_memory": store() if store else LEAST_STORE,
        }
    else:
        options |= {"address": address, "runtime_env": {"env_vars": _worker_env()}}
    if not verbose:
        _quieten()
    with handlers_kept():
        _init(options, address)
    if not verbose:
        _quieten()  # where logs are JSON, Ray has set their level
    try:
        yield
    finally:
        ray.shutdown()


def _worker_env() -> dict[str, str]:
    """`WORKER_ENV` as this process has it, but for what its Ray job gives workers anyway, which Ray takes once only."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    return {name: os.environ[name] for name in WORKER_ENV if name not in (job.get("env_vars") or {})}


def _quieten() -> None:
    import ray.data  # noqa: F401  # sets its own levels when it is imported

    for logger in ("ray.data", "ray.train", "ray"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def _init(options: Mapping[str, Any], address: str | None) -> None:
    import ray

    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if _OTHER_VERSIONS in str(error):
            raise ConfigError(
                f"RAY_ADDRESS must be a cluster with the Ray and the Python of this process, but is {address!r}: "
                f"{' '.join(str(error).split())}. Install here what the cluster has, or have the command run there, "
                "by `ray job submit`."
            ) from error
        raise ConfigError(
            f"RAY_ADDRESS must be a running cluster, or unset for a local Ray, but is {address!r} and failed: "
            f"{first_line(error)} Where a cluster asks for a token, as those of cluster/start-head.sh do, "
            "RAY_AUTH_MODE must be `token` and RAY_AUTH_TOKEN_PATH a copy of its file: check both."
        ) from error
    except Exception as error:
        if _TOO_LATE not in str(error):
            raise
        raise RunFailedError(
            "A local Ray must start within 30 s, which Ray sets, but did not: the machine is too busy, or its disk too "
            "slow. Try again when less runs beside it, or start one with `ray start --head` and set RAY_ADDRESS."
        ) from error


def role_alone(name: str, role: R) -> R:
    """`role`, called `name`, with its share of the connected cluster's GPUs; its actors have it to themselves.

    Raises:
        ConfigError: they do not fit.
    """
    import ray

    resources = ray.cluster_resources()
    if role.num_gpus == "auto":
        role = role.model_copy(update={"num_gpus": _share(role.bounds[0], resources.get("GPU", 0.0))})
    _check_sum([Demand(name, role.bounds[0], role.num_cpus, role.num_gpus)], resources)
    _check_named(name, role, resources)
    _check_nodes(name, role, role.bounds[0], ray.nodes())
    return role


_GROUPS = ("trainer", "forward_states", "student_rollouts", "teacher_rollouts", "labels", "shift")
"""The config groups that ask for resources."""


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


def _at_most(role: R) -> R:
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


def check_fits(config: RunConfig, resources: dict[str, float]) -> None:
    """Compare what the run needs at least with what the cluster has.

    Raises:
        ConfigError: it would wait for ever, where the message lists every role, or workers that keep parts of networks
            would share GPUs.
    """
    _check_exchange(config.trainer)
    _check_sum(demands(config), resources)
    for name in _GROUPS:
        _check_named(name, getattr(config, name), resources)
    if config.evaluation.enabled:
        _check_evaluation(config, resources)


def _check_exchange(trainer: Trainer) -> None:
    if trainer.exchanges_parts and 0 < float(trainer.num_gpus) < 1:
        raise ConfigError(
            f"`trainer.num_gpus` must be whole where `trainer.parallel` is fsdp, as NCCL refuses workers that share a "
            f"GPU, but is {float(trainer.num_gpus):g} instead, a share of the few that the cluster has. Set "
            "`trainer.num_gpus=1` and other roles' `num_gpus=0`, lower `trainer.num_workers`, or add GPUs."
        )


def check_labels(config: RunConfig, nodes: Sequence[Mapping[str, Any]]) -> None:
    """See that the nodes with the labels that a role asks for hold its actors.

    Args:
        config: the run, `num_gpus` in numbers.
        nodes: what `ray.nodes()` gives.

    Raises:
        ConfigError: it would wait for ever.
    """
    counts: Counter[str] = Counter()
    for demand in [*demands(config), *([evaluation_demand(config)] if config.evaluation.enabled else [])]:
        counts[demand.role.partition(" (")[0]] += demand.count
    for name, count in counts.items():
        _check_nodes(name, getattr(config, name), count, nodes)


def _check_nodes(name: str, role: Role | Shift | Trainer, count: int, nodes: Sequence[Mapping[str, Any]]) -> None:
    selector, alive = role.label_selector, [node for node in nodes if node["Alive"]]
    if not selector:
        return
    chosen = [n for n in alive if all(_matches(value, n["Labels"].get(key)) for key, value in selector.items())]
    if not chosen:
        known = sorted({f"{k}={v}" for n in alive for k, v in n["Labels"].items() if k != "ray.io/node-id"})
        raise ConfigError(
            f"`{name}.label_selector` must select a node of the cluster, but {_written(selector)} selects none. Labels "
            f"there: {', '.join(known) or 'none'}. Start nodes with `ray start --labels`, or change it."
        )
    for kind, each in (("CPU", role.num_cpus), ("GPU", float(role.num_gpus))):
        fit = sum(int((n["Resources"].get(kind, 0.0) + 1e-9) // each) for n in chosen) if each else count
        if fit < count:
            raise ConfigError(
                f"`{name}` must fit the nodes that {_written(selector)} selects, but they hold {fit} of its {count} "
                f"actors of {each:g} {kind}s. Lower `{name}`'s number or `num_{kind.lower()}s`, or add nodes."
            )


def _matches(value: str, label: str | None) -> bool:
    """Whether a node with this label, or None without one, is selected; as Ray does."""
    wanted = value.removeprefix("!")
    members = wanted[3:-1].split(",") if wanted.startswith("in(") else [wanted]
    return (label in [member.strip() for member in members]) != value.startswith("!")


def _written(selector: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in selector.items())


def evaluation_role(config: RunConfig) -> Evaluation:
    """The actors that measure, with their share of the connected cluster's GPUs; they have it to themselves.

    Raises:
        ConfigError: they do not fit.
    """
    return role_alone("evaluation", config.evaluation)


def _check_evaluation(config: RunConfig, resources: dict[str, float]) -> None:
    _check_sum([evaluation_demand(config)], resources)
    _check_named("evaluation", config.evaluation, resources)


def evaluation_demand(config: RunConfig) -> Demand:
    """What evaluation asks for, alone when training has ended."""
    e = config.evaluation
    return Demand("evaluation", e.bounds[0], e.num_cpus, e.num_gpus)


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


def _check_named(name: str, role: Role | Shift | Trainer, resources: dict[str, float]) -> None:
    wanted = dict(role.resources)
    if role.accelerator_type:
        wanted[f"accelerator_type:{role.accelerator_type}"] = 0.001
    for resource, amount in wanted.items():
        if resources.get(resource, 0.0) < amount:
            raise ConfigError(
                f"`{name}` must ask for resources that the cluster has, but {resource!r} is not among "
                f"{', '.join(sorted(k for k in resources if not k.startswith('node:')))}."
            )
