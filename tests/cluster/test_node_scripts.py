"""Pins the scripts that launchers use: a node in the background, its token, and waiting for nodes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import CLUSTER

RAY = """#!/usr/bin/env bash
echo "{said}"
trap 'echo ended >>"$HOME/ended"; exit 0' TERM
for _ in $(seq {seconds}0); do sleep 0.1; done
"""

spec = importlib.util.spec_from_file_location("wait_nodes", CLUSTER / "wait_nodes.py")
wait_nodes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wait_nodes)


@pytest.fixture
def node(tmp_path):
    """Calls a script with a `ray` of its own on the PATH, and a home of its own."""

    def call(script, *arguments, said="Ray runtime started.", seconds=60):
        tools = tmp_path / "bin"
        tools.mkdir(exist_ok=True)
        (tools / "ray").write_text(RAY.format(said=said, seconds=seconds))
        (tools / "ray").chmod(0o755)
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "STATE": str(tmp_path / "state")}
        command = [CLUSTER / script, *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    yield call
    pid = tmp_path / "state" / "pid"
    if pid.exists():
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], capture_output=True)


def alive(pid):
    return Path(f"/proc/{pid}").exists()


def test_a_node_starts_in_the_background_once_it_runs(node, tmp_path):
    done = node("background.sh", "start-head.sh", "--num-gpus=3")
    assert done.returncode == 0, done.stderr
    pid = int((tmp_path / "state" / "pid").read_text())
    said = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    assert "ray start --head --block" in said
    assert "--num-gpus=3" in said


def test_starting_again_ends_the_node_that_was_started_and_no_other_process(node, tmp_path):
    node("background.sh", "start-head.sh")
    first = int((tmp_path / "state" / "pid").read_text())
    assert node("background.sh", "start-head.sh").returncode == 0
    second = int((tmp_path / "state" / "pid").read_text())
    assert first != second
    assert alive(second)
    assert (tmp_path / "ended").read_text() == "ended\n"
    other = subprocess.Popen(["sleep", "60"])  # which by now has the number of what was started
    subprocess.run(["kill", "-TERM", str(second)])
    (tmp_path / "state" / "pid").write_text(str(other.pid))
    assert node("background.sh", "start-head.sh").returncode == 0
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_node_that_does_not_start_is_told_with_its_last_lines(node):
    done = node("background.sh", "start-head.sh", said="port 6379 is taken", seconds=0)
    assert done.returncode == 2
    assert "port 6379 is taken" in done.stderr
    assert "Ray must start within 120 s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "a script must be given"), (["x.sh"], "must be one of this folder")]
)
def test_no_script_or_another_is_one_message(node, arguments, said):
    done = node("background.sh", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_the_token_is_made_once_and_its_file_told(node, tmp_path):
    first, second = node("token.sh"), node("token.sh")
    assert first.stdout == second.stdout == f"{tmp_path}/.ray/auth_token\n"
    assert len((tmp_path / ".ray" / "auth_token").read_text()) == 64


def test_waiting_ends_when_all_nodes_are_there(capsys):
    counts = iter([1, 2, 9])
    assert wait_nodes.wait(9, seconds=60, alive=lambda: next(counts), pause_s=0.01) == 0
    assert capsys.readouterr().err.splitlines() == ["1 of 9 nodes", "2 of 9 nodes"]


def test_waiting_for_nodes_that_never_come_ends(capsys):
    began = time.monotonic()
    assert wait_nodes.wait(9, seconds=0.05, alive=lambda: 8, pause_s=0.02) == 1
    assert time.monotonic() - began < 5
    assert "must have 9 nodes within 0.05 s, but has 8" in capsys.readouterr().err


def test_waiting_for_nothing_is_told_how():
    done = subprocess.run([sys.executable, CLUSTER / "wait_nodes.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Usage: python cluster/wait_nodes.py NODES" in done.stderr


def test_scripts_may_be_called():
    for path in CLUSTER.glob("*.sh"):
        assert os.access(path, os.X_OK) == (path.name != "auth.sh"), path.name
