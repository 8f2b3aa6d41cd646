"""A run on a cluster of its own that loses the node of its rollout actors and gets another; writes found.json."""

from __future__ import annotations

import json
import time
from pathlib import Path

from own_cluster import connected, furthest, one_more_node, run_alone
from runs import small_run, when

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
    lost: dict[str, float] = {}
    with connected(4) as cluster, one_more_node(cluster.address, 2, away=1) as another:
        away = cluster.add_node(num_cpus=2, resources={"away": 1})

        def lose() -> None:
            lost["at"] = time.time()
            cluster.remove_node(away, allow_graceful=False)
            another()
            lost["back"] = time.time()

        when(lambda: furthest(journal) >= 40, lose)
        seen: dict[str, int] = {}
        going_on = when(
            lambda: "back" in lost and furthest(journal) > seen.setdefault("step", furthest(journal)) + 20,
            lambda: lost.update(on=time.time()),
            timeout_s=200,
        )
        distill(config)
    steps = [r["step"] for r in read_journal(journal) if "loss" in r]
    found = {
        "last": furthest(journal),
        "went_on": going_on.done() and going_on.result(),
        "recovered_s": lost.get("on", float("nan")) - lost["at"],
        "done_again": len(steps) - len(set(steps)),
    }
    Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_alone(main)
