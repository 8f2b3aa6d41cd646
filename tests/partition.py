"""A run whose rollout actors are on a node behind a network that breaks; writes found.json.

The node has a network of its own, joined to this machine's by a bridge. Taken off the bridge, it and everybody else
send into the void: no connection ends, and nothing is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ray
from own_cluster import connected, furthest, one_more_node, run_alone
from runs import small_run, when
from started import until

from ddil_ray.runtime.run import distill
from ddil_ray.tracking import read_journal
from ddil_ray.training.recipe import Recipe

__all__ = ["Cable", "possible"]

NETWORK = f"10.231.{os.getpid() % 256}"
HERE, THERE = f"{NETWORK}.1", f"{NETWORK}.2"
SHORT_S = 5.0
"""In which a trainer has used up what lies ready; with three seconds more too short for Ray to give a node up."""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """Between this machine and a network namespace, `there`, that can be pulled out."""

    def __init__(self) -> None:
        self.there = f"ddil{os.getpid()}"
        self._bridge, self._near, self._far = (f"{end}{os.getpid()}" for end in ("dbr", "dhe", "dth"))

    @contextlib.contextmanager
    def laid(self) -> Iterator[None]:
        """It is there in this context."""
        inside = ("netns", "exec", self.there, "ip")
        try:
            _ip("netns", "add", self.there)
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far)
            _ip("link", "set", self._far, "netns", self.there)
            self.plug()
            _ip("addr", "add", f"{HERE}/24", "dev", self._bridge)
            _ip(*inside, "addr", "add", f"{THERE}/24", "dev", self._far)
            for device in (self._bridge, self._near):
                _ip("link", "set", device, "up")
            for device in ("lo", self._far):
                _ip(*inside, "link", "set", device, "up")
            yield
        finally:
            for leftover in (("netns", "del", self.there), ("link", "del", self._near), ("link", "del", self._bridge)):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip(*leftover)

    def pull(self) -> None:
        """Nothing comes through."""
        _ip("link", "set", self._near, "nomaster")

    def plug(self) -> None:
        """All comes through."""
        _ip("link", "set", self._near, "master", self._bridge)


def possible() -> bool:
    """Whether this process may lay a cable."""
    try:
        with Cable().laid():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def main(output: str, *, returns: bool) -> None:
    """The trainer and forward states stay here; student rollouts are behind the cable, and move where it stays out."""
    config = small_run(
        output=output,
        trainer={"steps": 400, "num_cpus": 1},
        student_rollouts={"batch_size": 16, "resources": {"away": 1}},
        checkpoint={"every": 50},
    )
    journal, cable = Path(output, config.name, "metrics.jsonl"), Cable()
    at: dict[str, float] = {}
    stood: dict[str, int] = {}
    far = ("ip", "netns", "exec", cable.there)
    with (
        cable.laid(),
        connected(4, node_ip_address=HERE) as cluster,
        one_more_node(cluster.address, 2, f"--node-ip-address={THERE}", within=far, away=1) as node,
        one_more_node(cluster.address, 2, away=1) as another,
    ):
        node()
        until(lambda: "away" in ray.cluster_resources())

        def cut() -> None:
            at["cut"] = time.time()
            cable.pull()
            if not returns:
                another()
            time.sleep(SHORT_S)
            stood["from"] = furthest(journal)
            time.sleep(3)
            stood["to"] = furthest(journal)
            if returns:
                cable.plug()

        when(lambda: furthest(journal) >= 40, cut)
        going_on = when(
            lambda: "to" in stood and furthest(journal) >= stood["to"] + 20,
            lambda: at.update(on=time.time()),
            timeout_s=300,
        )
        distill(config)
    records = read_journal(journal)
    trained = [r["step"] for r in records if "loss" in r]
    found = {
        "last": furthest(journal),
        "went_on": going_on.done() and going_on.result(),
        "stood": stood["from"] == stood["to"],
        "recovered_s": at.get("on", float("nan")) - at["cut"],
        "done_again": len(trained) - len(set(trained)),
        "oldest": max(r.get("staleness/max", 0) for r in records),
        "bound": Recipe(config).ingredients().max_staleness,
        "deaths": max(r.get("actors/deaths/student", 0) for r in records),
    }
    Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_alone(partial(main, returns=sys.argv[2] == "returns"))
