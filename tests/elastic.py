"""A run on a cluster of its own that gets a second node while it trains; writes what became of it to found.json."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import ray.train
from own_cluster import connected, furthest, one_more_node, run_alone
from runs import small_run, when

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
    ray.train.ScalingConfig = functools.partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=2.0)
    with connected(5) as cluster, one_more_node(cluster.address, 4) as start:
        grown = when(lambda: furthest(journal) >= 20, start)
        distill(config)
    changed = [(r["step"], r["trainer/workers"]) for r in read_journal(journal) if "trainer/workers" in r]
    found = {"grown": grown.result(), "last": furthest(journal), "changed": changed}
    Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_alone(main)
