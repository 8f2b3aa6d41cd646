"""Runs on clusters of their own, whose nodes come and go, each by a script of tests/ in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.tracking import read_journal

__all__ = ["connected", "furthest", "one_more_node", "run_alone", "with_a_cluster_of_its_own"]


def with_a_cluster_of_its_own(script: str, *arguments: str | Path, timeout_s: float = 500) -> None:
    """Run a script of tests/ that starts a cluster by `ray.cluster_utils`, which knows no tokens.

    How Ray authenticates is read when it is imported, so it is off from the process's start, whatever this session's
    Ray has set.
    """
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_AUTH_TOKEN", None)
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@contextlib.contextmanager
def one_more_node(
    address: str, num_cpus: int, *options: str, within: Sequence[str] = (), **resources: float
) -> Iterator[Callable[[], Any]]:
    """Gives what starts another node of the cluster at `address`, in any thread; it goes with the context.

    `options` are more of `ray start`; `within` is a command that runs it elsewhere.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    command = [*within, ray, "start", f"--address={address}", f"--num-cpus={num_cpus}", *options]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen([*command, f"--resources={json.dumps(resources)}", "--block"], **quiet))

    try:
        yield start
    finally:
        for process in started:  # a node that is asked to end waits for what runs there
            for below in psutil.Process(process.pid).children(recursive=True):
                below.kill()
            process.kill()
            process.wait()


def run_alone(main: Callable[[str], None], **environment: str) -> None:
    """What such a script does: `main` with the folder that its test named, in the environment of a local Ray."""
    os.environ.update(WORKER_ENV | LOCAL_ENV | {"RAY_AUTH_MODE": "disabled"} | environment)
    main(sys.argv[1])


@contextlib.contextmanager
def connected(num_cpus: int, **head: Any) -> Iterator[Cluster]:
    """A cluster with a head of so many CPUs, to which this process is connected; `head` is more of its settings."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus, "include_dashboard": False, **head})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def furthest(journal: Path) -> int:
    """The highest step that was trained."""
    return max((int(r["step"]) for r in read_journal(journal) if "loss" in r), default=0)
