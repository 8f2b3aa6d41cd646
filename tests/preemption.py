"""A run on a cluster of its own whose trainer's node is taken away after a notice; writes found.json."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from runs import one_more_node, small_run, when

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import View, read_journal

NOTICE_S = 12


def main(output: str) -> None:
    """No checkpoint but the notice's lies between step 0 and the end, and no failure is allowed."""
    config = small_run(
        output=output,
        trainer={"steps": 1500, "num_cpus": 1, "resources": {"spot": 1}, "max_failures": 0},
        checkpoint={"every": 1500},
        tracking={"log_every": 10},
    )
    journal = Path(output, config.name, "metrics.jsonl")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    taken = cluster.add_node(num_cpus=2, resources={"spot": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    times: dict[str, float] = {}

    def step() -> int:
        return max((int(r["step"]) for r in read_journal(journal) if "loss" in r), default=0)

    def give_notice() -> None:
        another()
        times["noticed"] = step()
        drain = ["drain-node", "--address", cluster.address, "--node-id", taken.node_id]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = [Path(sys.executable).with_name("ray"), *drain, *reason]
        subprocess.run([*command, "--deadline-remaining-seconds", str(NOTICE_S)], check=True, capture_output=True)
        time.sleep(NOTICE_S)
        times["gone"] = time.time()
        cluster.remove_node(taken, allow_graceful=False)

    with one_more_node(cluster.address, 2, spot=1) as another:
        noticed = when(lambda: step() >= 40, give_notice)
        said: list[str] = []
        view = View()
        view.say = said.append  # type: ignore[method-assign]
        distill(config, view=view)
    records = read_journal(journal)
    steps = [r["step"] for r in records if "loss" in r]
    back = next((i for i in range(1, len(steps)) if steps[i] <= steps[i - 1]), None)
    found = {
        "last": step(),
        "gave_notice": noticed.done() and noticed.result(),
        "noticed": times["noticed"],
        "saved": [r["checkpoint/step"] for r in records if "checkpoint/step" in r],
        "went_back_to": None if back is None else steps[back],
        "furthest": max(steps[:back]),
        "recovered_s": min(
            (r["time"] for r in records if r.get("loss") and r["time"] > times["gone"]), default=float("nan")
        )
        - times["gone"],
        "said": said,
    }
    Path(output, "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    watching = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}
    os.environ.update(WORKER_ENV | LOCAL_ENV | {"RAY_AUTH_MODE": "disabled"} | watching)
    main(sys.argv[1])
