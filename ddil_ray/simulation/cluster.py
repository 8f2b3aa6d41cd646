"""A Ray cluster of many nodes on one machine, whose GPUs are there in name only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.simulation.device import VARIABLE, World

__all__ = ["connected_to", "simulated_cluster"]

_OPEN = {"RAY_AUTH_MODE": "disabled"}
"""Of a cluster that is there for measurements alone; a token would have to be set before Ray is imported."""
_NO_PRESTART = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
"""Else Ray starts a process per logical CPU, to be ready for tasks."""


@contextmanager
def simulated_cluster(*, nodes: int, cpus: int, gpus: int, object_store_bytes: int = 2**28) -> Iterator[str]:
    """A cluster of `nodes`; gives its address.

    A trainer with a whole GPU would exchange gradients by NCCL, which needs real ones: give it `trainer.num_gpus=0.9`.
    A node takes about seven seconds of one core to start and 200 MB of memory, before any actor.

    Args:
        nodes: of the cluster, that of the driver included.
        cpus: of each node, in name only too.
        gpus: of each node.
        object_store_bytes: of each node.
    """
    os.environ.update(WORKER_ENV | LOCAL_ENV | _OPEN | _NO_PRESTART)
    from ray.cluster_utils import Cluster

    each = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": object_store_bytes}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**each)
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def connected_to(address: str, world: World) -> Iterator[None]:
    """Be connected to a simulated cluster, with models that live in `world`.

    Whatever runs on the connected Ray runs there: `ddil_ray.runtime.run.distill`, for example.
    """
    import ray

    os.environ[VARIABLE] = world.text
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {VARIABLE: world.text}},
        )
        yield
    finally:
        ray.shutdown()
        os.environ.pop(VARIABLE)
