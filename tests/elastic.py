"""A run on a cluster of its own that gets a second node while it trains; writes what became of it to found.json."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import ray
import ray.train
from ray.cluster_utils import Cluster
from runs import one_more_node, small_run, when

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import read_journal


def main(output: str) -> None:
    """Room for one worker at first, and for two after some steps."""
    role = {"batch_size": 16, "num_cpus": 0.25}
    config = small_run(
        output=output,
        trainer={
            "num_workers": [1, 2],
            "num_cpus": 4,
            "num_gpus": 0,
            "batch_size": 32,
            "steps": 1500,
            "parallel": "fsdp",
        },
        forward_states=role,
        student_rollouts=role,
        checkpoint={"every": 50},
    )
    journal = Path(output, config.name, "metrics.jsonl")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 5, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    ray.train.ScalingConfig = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=2.0)
    with one_more_node(cluster.address, 4) as start:
        grown = when(lambda: any(r["step"] >= 20 for r in read_journal(journal)), start)
        distill(config)
    records = read_journal(journal)
    steps = [r["step"] for r in records if "loss" in r]
    changed = [(r["step"], r["trainer/workers"]) for r in records if "trainer/workers" in r]
    Path(output, "found.json").write_text(json.dumps({"grown": grown.result(), "last": steps[-1], "changed": changed}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    os.environ.update(WORKER_ENV | LOCAL_ENV | {"RAY_AUTH_MODE": "disabled"})
    main(sys.argv[1])
