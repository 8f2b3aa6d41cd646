"""Connecting to Ray quietly: to a cluster, or to a local Ray that is started for the command."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ddil_ray.config import RunConfig
from ddil_ray.errors import ConfigError, RunFailedError, first_line
from ddil_ray.runtime.demands import at_most, demands, evaluation_demand, pool_roles
from ddil_ray.runtime.object_store import LEAST_STORE
from ddil_ray.runtime.signals import handlers_kept

__all__ = ["LOCAL_ENV", "WORKER_ENV", "connected", "ray_session"]

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
        update={role: at_most(getattr(config, role)) for role in {*pool_roles(config).values(), "evaluation"}}
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
