"""Pins the commands of SkyPilot's task, run with a Ray of a few lines: Ray is a child of them, and ends with them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
from clusters import CLUSTER, documents

RAY = """#!/usr/bin/env bash
[ "$1" != health-check ] || exec grep -q "ray start --head" "$LOG"
trap 'echo "ended $*" >>"$LOG"; exit 1' TERM
[ -z "${HEAD_FAILS:-}" ] || exit 1
echo "ray $* with $RAY_AUTH_MODE, child of $PPID" >>"$LOG"
while :; do sleep 0.05; done
"""
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $* at $RAY_ADDRESS with $RAY_AUTH_MODE" >>"$LOG"
[ "$1" = distill ] || exit "${NODES_MISSING:-0}"
exit "${FINISHES:-0}"
"""


@pytest.fixture
def node(tmp_path):
    """Starts what SkyPilot runs on a node, in a copy of cluster/; gives the process and the log of what was called."""
    (task,) = documents(CLUSTER / "skypilot.yaml")
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {"ray": RAY, "python": TOOL, "ddil-ray": TOOL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    log, started = tmp_path / "log", []
    log.touch()

    def start(rank, **environment):
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LOG": str(log),
            "RAY_AUTH_TOKEN": "a" * 64,
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": "2",
            **task["envs"],
            **environment,
        }
        process = subprocess.Popen(["bash", "-c", task["run"]], env=env, cwd=tmp_path, start_new_session=True)
        started.append(process)
        return process

    yield start, log
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(log, text):
    deadline = time.monotonic() + 30
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 3])
def test_the_head_is_a_child_of_its_command_and_ends_with_the_run_whose_exit_code_is_the_tasks(node, code):
    start, log = node
    process = start(0, FINISHES=str(code))
    assert process.wait(60) == code
    said = log.read_text()
    assert "ray start --head --block" in said
    assert f"--labels=pool=trainer with token, child of {process.pid}" in said
    assert "python cluster/wait_nodes.py 2 at 10.0.0.1:6379 with token" in said
    assert "ended start --head" in said
    run = "ddil-ray distill pools/sd15-dmd2 --resume-if-begun data.source=s3://bucket/prepared output=s3://bucket/runs"
    assert run in said


@pytest.mark.parametrize("missing", ["HEAD_FAILS", "NODES_MISSING"])
def test_nodes_that_do_not_come_fail_the_task_before_the_run(node, missing):
    start, log = node
    assert start(0, **{missing: "1"}).wait(60) == 1
    assert "ddil-ray" not in log.read_text()


def test_a_worker_waits_for_the_head_and_is_the_nodes_command_until_it_ends(node):
    start, log = node
    process = start(1)
    time.sleep(0.3)
    assert log.read_text() == ""
    log.write_text("ray start --head\n")
    until(log, f"--labels=pool=rollout with token, child of {process.pid}")
    assert "ray start --address=10.0.0.1:6379 --block" in log.read_text()
    assert process.poll() is None
    (worker,) = psutil.Process(process.pid).children()
    worker.terminate()
    assert process.wait(60) == 0
