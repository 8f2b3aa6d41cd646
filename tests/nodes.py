"""A run on a cluster of its own that loses the node of its rollout actors and gets another; writes found.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from runs import one_more_node, small_run, when

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import read_journal


def main(output: str) -> None:
    """The trainer and forward states stay on the head; student rollouts, and weights that lie there, go."""
    config = small_run(
        output=output,
        trainer={"steps": 400, "num_cpus": 1},
        student_rollouts={"batch_size": 16, "resources": {"away": 1}},
        checkpoint={"every": 50},
    )
    journal = Path(output, config.name, "metrics.jsonl")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    away = cluster.add_node(num_cpus=2, resources={"away": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    lost: dict[str, float] = {}

    def lose() -> None:
        lost["at"] = time.time()
        cluster.remove_node(away, allow_graceful=False)
        another()
        lost["back"] = time.time()

    def step() -> int:
        return max((int(r["step"]) for r in read_journal(journal) if "loss" in r), default=0)

    with one_more_node(cluster.address, 2, away=1) as another:
        when(lambda: step() >= 40, lose)
        seen: dict[str, float] = {}
        going_on = when(
            lambda: "back" in lost and step() > seen.setdefault("step", step()) + 20,
            lambda: lost.update(on=time.time()),
            timeout_s=200,
        )
        distill(config)
    steps = [r["step"] for r in read_journal(journal) if "loss" in r]
    found = {
        "last": step(),
        "went_on": going_on.done() and going_on.result(),
        "recovered_s": lost.get("on", float("nan")) - lost["at"],
        "done_again": len(steps) - len(set(steps)),
    }
    Path(output, "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.update(WORKER_ENV | LOCAL_ENV | {"RAY_AUTH_MODE": "disabled"})
    main(sys.argv[1])
