"""A run on a cluster of three nodes on this machine: prints which of the nodes' labels every kind of actor met.

A program of its own, since a process knows one Ray only.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import ray
from ray.cluster_utils import Cluster

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.runtime.run import distill

sys.path.insert(0, __file__.rpartition("/")[0].rpartition("/")[0])
from runs import small_run

KINDS = {"RayTrainWorker": "trainer", "StageCall": "actors"}


def main(output: str) -> None:
    """Run, and look at the cluster meanwhile."""
    import os

    os.environ.update(WORKER_ENV | LOCAL_ENV | {"RAY_AUTH_MODE": "disabled"})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    for pool in ("train", "rollout"):
        cluster.add_node(num_cpus=3, labels={"pool": pool})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    labels = {node["NodeID"]: node["Labels"].get("pool", "head") for node in ray.nodes()}
    met: dict[str, set[str]] = {"trainer": set(), "actors": set()}
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for actor in ray._private.state.actors().values():
                for name, kind in KINDS.items():
                    if name in actor["ActorClassName"] and actor["State"] == "ALIVE":
                        met[kind].add(labels[actor["Address"]["NodeID"]])
            time.sleep(0.2)

    threading.Thread(target=look, daemon=True).start()
    rollout = {"label_selector": {"pool": "in(rollout, spot)"}, "batch_size": 16}
    config = small_run(
        output=output,
        trainer={"label_selector": {"pool": "train"}},
        forward_states=rollout,
        student_rollouts={**rollout, "num_actors": 2},
    )
    distill(config)
    done.set()
    print(json.dumps({kind: sorted(found) for kind, found in met.items()}))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
