"""Runs on clusters of their own that lose a node, and may get another; each writes found.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from signal import SIGTERM

from own_cluster import connected, furthest, one_more_node, run_alone
from runs import small_run, when

from ddil_ray.errors import RunFailedError, RunStoppedError
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import View, read_journal


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


def without_room(output: str) -> None:
    """The trainer's node goes, and none comes."""
    trainer = {"steps": 5000, "num_cpus": 1, "resources": {"away": 1}}
    config = small_run(output=output, trainer=trainer, checkpoint={"every": 20})
    journal = Path(output, config.name, "metrics.jsonl")
    with connected(4) as cluster:
        away = cluster.add_node(num_cpus=2, resources={"away": 1})
        when(lambda: furthest(journal) >= 40, lambda: cluster.remove_node(away, allow_graceful=False))
        try:
            distill(config)
        except RunFailedError as error:
            Path(output, "found.json").write_text(json.dumps({"message": str(error)}))


def elastic_without_room(output: str) -> None:
    """The nodes of all workers go, of which Ray Train would start with any number; a signal comes when that is told."""
    trainer = {"steps": 5000, "num_workers": [1, 2], "num_cpus": 1, "resources": {"away": 1}}
    config = small_run(output=output, trainer=trainer, checkpoint={"every": 20})
    journal, view = Path(output, config.name, "metrics.jsonl"), View()
    said: list[str] = []
    view.say = said.append  # type: ignore[method-assign]
    with connected(4) as cluster:
        away = cluster.add_node(num_cpus=2, resources={"away": 2})
        when(lambda: furthest(journal) >= 40, lambda: cluster.remove_node(away, allow_graceful=False))
        when(lambda: any("No trainer has run" in text for text in said), lambda: os.kill(os.getpid(), SIGTERM))
        try:
            distill(config, view=view)
        except RunStoppedError as error:
            found = {"message": str(error), "said": said, "furthest": furthest(journal)}
            Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[2:] == ["without room"]:
        run_alone(without_room, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="5")  # of 60: Ray Train tries again and again
    elif sys.argv[2:] == ["elastic"]:
        run_alone(elastic_without_room)
    else:
        run_alone(main)
