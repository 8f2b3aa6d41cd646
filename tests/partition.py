"""A run whose rollout actors are on a node behind a network that breaks; writes found.json.

The node has a network of its own, joined to this machine's by a bridge. Taken off the bridge, it and everybody else
send into the void: no connection ends, and nothing is refused.
"""

from __future__ import annotations

import contextlib
import json
import socket
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

HERE, THERE = "198.18.73.1", "198.18.73.2"
"""Of a network that is set apart for tests of networks."""
STEPS = 400
STANDS_S = 3.0
"""Without a step, after which the trainer has used up what lay ready. Ray gives a node up after many times that."""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Cable:
    """Between this machine and a network namespace, `there`, that can be pulled out; one at a time."""

    there, _bridge, _near, _far = "ddil-there", "ddil-bridge", "ddil-near", "ddil-far"

    @contextlib.contextmanager
    def laid(self) -> Iterator[None]:
        """It is there in this context."""
        inside = ("netns", "exec", self.there, "ip")
        self.remove()
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
            self.remove()

    def remove(self) -> None:
        """Whatever is left of it, of a process that was killed too."""
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
    """Whether this process may lay a cable that something comes through."""
    cable, knock = Cable(), f"import socket; socket.create_connection(('{HERE}', int(input())), 3)"
    try:
        with cable.laid(), socket.create_server((HERE, 0)) as here:
            command = ["ip", "netns", "exec", cable.there, sys.executable, "-c", knock]
            return subprocess.run(command, input=str(here.getsockname()[1]), text=True, check=False).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return False


def _standing(journal: Path) -> int:
    """The step that the trainer stands at, once it does."""
    step, since = furthest(journal), time.monotonic()
    while time.monotonic() < since + STANDS_S:
        time.sleep(0.1)
        if furthest(journal) > step:
            step, since = furthest(journal), time.monotonic()
    assert step < STEPS, "it never stood"
    return step


def main(output: str, *, returns: bool) -> None:
    """The trainer and forward states stay here; student rollouts are behind the cable, and move where it stays out."""
    config = small_run(
        output=output,
        trainer={"steps": STEPS, "num_cpus": 1},
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
            stood["at"] = _standing(journal)
            if returns:
                cable.plug()
            else:
                another()

        when(lambda: furthest(journal) >= 40, cut)
        going_on = when(
            lambda: "at" in stood and furthest(journal) >= stood["at"] + 20,
            lambda: at.update(on=time.time()),
            timeout_s=300,
        )
        distill(config)
    records = read_journal(journal)
    trained = [r["step"] for r in records if "loss" in r]
    found = {
        "last": furthest(journal),
        "went_on": going_on.done() and going_on.result(),
        "recovered_s": at.get("on", float("nan")) - at["cut"],
        "done_again": len(trained) - len(set(trained)),
        "oldest": max(r.get("staleness/max", 0) for r in records),
        "bound": Recipe(config).ingredients().max_staleness,
        "deaths": max(r.get("actors/deaths/student", 0) for r in records),
    }
    Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_alone(partial(main, returns=sys.argv[2] == "returns"))
