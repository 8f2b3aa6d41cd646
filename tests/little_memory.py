"""A run on a cluster of its own whose rollout actor takes more memory than its node may have; writes found.json."""

from __future__ import annotations

import json
from pathlib import Path

from own_cluster import connected, furthest, run_alone
from ray._private.utils import get_system_memory, get_used_memory
from runs import small_run

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime.run import distill

ROOM = 5 * 2**30
"""Bytes that this machine may hold more than at the start, of which the run's other processes need half."""


def main(output: str) -> None:
    """Ray's monitor watches on the actor's node alone, so that it has nobody else to kill."""
    config = small_run(
        output=output,
        teacher={"model": "faulty:swells", "guidance": 1.0},
        student_rollouts={"batch_size": 16, "resources": {"away": 1}},
        faults={"max_deaths": 1},
    )
    share = (get_used_memory() + ROOM) / get_system_memory()
    message = ""
    with connected(4) as cluster:
        watched = {"RAY_memory_monitor_refresh_ms": "250", "RAY_memory_usage_threshold": f"{share:.3f}"}
        cluster.add_node(num_cpus=2, resources={"away": 1}, env_vars=watched)
        try:
            distill(config)
        except RunFailedError as error:
            message = str(error)
    found = {"message": message, "last": furthest(Path(output, config.name, "metrics.jsonl"))}
    Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_alone(main, RAY_memory_monitor_refresh_ms="0")
