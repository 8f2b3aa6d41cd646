"""A run on a cluster of its own whose trainer's node is taken away after a notice; writes found.json."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import ray
from own_cluster import connected, furthest, one_more_node, run_alone
from runs import small_run, when

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
    noted: dict[str, float] = {}
    homes: dict[str, str] = {}
    said: list[str] = []
    with connected(4) as cluster, one_more_node(cluster.address, 2, spot=1) as another:
        taken = cluster.add_node(num_cpus=2, resources={"spot": 1})

        def give_notice() -> None:
            another()
            noted["step"] = furthest(journal)
            homes.update({a["Name"]: a["Address"]["NodeID"] for a in ray._private.state.actors().values() if a["Name"]})
            _drain(cluster.address, taken.node_id)
            time.sleep(NOTICE_S)
            noted.update(reached=furthest(journal), gone=time.time())
            cluster.remove_node(taken, allow_graceful=False)

        noticed = when(lambda: furthest(journal) >= 40, give_notice)
        when(
            lambda: "gone" in noted and furthest(journal) > noted["reached"] + 20,
            lambda: noted.update(on=time.time()),
        )
        view = View()
        view.say = said.append  # type: ignore[method-assign]
        distill(config, view=view)
    records = read_journal(journal)
    steps = [r["step"] for r in records if "loss" in r]
    back = next((i for i in range(1, len(steps)) if steps[i] <= steps[i - 1]), None)
    found = {
        "last": furthest(journal),
        "gave_notice": noticed.done() and noticed.result(),
        "noticed": noted["step"],
        "reached": noted["reached"],
        "saved": [r["checkpoint/step"] for r in records if "checkpoint/step" in r],
        "went_back_to": None if back is None else steps[back],
        "recovered_s": noted.get("on", float("nan")) - noted["gone"],
        "said": said,
        "elsewhere": sorted(name for name, node in homes.items() if node != taken.node_id),
    }
    Path(output, "found.json").write_text(json.dumps(found))


def _drain(address: str, node_id: str) -> None:
    """Tell Ray, as a cloud does, that a node is taken away in `NOTICE_S`."""
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", address, "--node-id", node_id]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    deadline = ["--deadline-remaining-seconds", str(NOTICE_S)]
    subprocess.run([*command, *reason, *deadline], check=True, capture_output=True)


if __name__ == "__main__":
    run_alone(main, RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="1")
