"""A Ray cluster of many nodes on one machine, whose GPUs are there in name only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.simulation.device import VARIABLE, World

__all__ = ["simulated_cluster"]


@contextmanager
def simulated_cluster(
    world: World, *, nodes: int, cpus: int, gpus: int, object_store_bytes: int = 2**28
) -> Iterator[None]:
    """Be connected to a cluster of `nodes`, in which simulated models live in `world`.

    Whatever runs on the connected Ray runs on it: `ddil_ray.runtime.run.distill`, for example. A trainer with a whole
    GPU would exchange gradients by NCCL, which needs real ones: give it `trainer.num_gpus=0.9`. A node takes about
    seven seconds of one core to start and 200 MB of memory, before any actor.

    Args:
        world: speed of the simulated accelerator, and size of students.
        nodes: of the cluster, that of the driver included.
        cpus: of each node, in name only too.
        gpus: of each node.
        object_store_bytes: of each node.
    """
    os.environ.update(WORKER_ENV | LOCAL_ENV | {VARIABLE: world.text})
    import ray
    from ray.cluster_utils import Cluster

    each = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": object_store_bytes}
    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**each)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.pop(VARIABLE)
