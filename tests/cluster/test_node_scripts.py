"""Pins the scripts that launchers use: a node in the background, its token, and waiting for nodes."""

from __future__ import annotations

import contextlib
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

SUBMITTED = """#!/usr/bin/env bash
printf '%s\\n' "${RAY_API_SERVER_ADDRESS:-}" "$@"
echo $(python -m zipfile -l "$4" | tail -n +2 | cut -d ' ' -f 1)
exit 7
"""
"""A `ray` that tells what it was given, and what is in the archive."""

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
    for pid in (tmp_path / "state").rglob("pid"):
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], capture_output=True)


def alive(pid):
    """Whether it runs: one that has ended has no command line, while its parent has not asked for its end."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


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


def test_a_node_is_stopped_once_and_stopping_none_is_no_mistake(node, tmp_path):
    node("background.sh", "start-head.sh")
    pid = (tmp_path / "state" / "pid").read_text().strip()
    assert node("background.sh", "stop").returncode == 0
    assert not alive(pid)
    assert (tmp_path / "ended").read_text() == "ended\n"
    assert node("background.sh", "stop").returncode == 0


def test_three_nodes_start_on_one_machine_and_are_stopped(node, tmp_path):
    done = node("local.sh", "start")
    assert done.returncode == 0, done.stderr
    pids = {path.parent.name: path.read_text().strip() for path in (tmp_path / "state").glob("*/pid")}
    said = {name: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for name, pid in pids.items()}
    assert set(said) == {"head", "trainer", "rollout"}
    assert {"--head", "--num-cpus=0", "--port=6379"} < set(said["head"])
    for pool in ("trainer", "rollout"):
        assert {"--address=127.0.0.1:6379", f"--labels=pool={pool}", "--num-gpus=1"} < set(said[pool])
    assert all("--metrics-export-port=0" in words and "--min-worker-port=0" in words for words in said.values())
    assert node("local.sh", "stop").returncode == 0
    assert not any(alive(pid) for pid in pids.values())


def test_a_local_cluster_is_started_or_stopped_and_nothing_else(node):
    done = node("local.sh")
    assert done.returncode == 2
    assert "start or stop must be given" in done.stderr


def test_a_node_that_does_not_start_is_told_with_its_last_lines(node):
    done = node("background.sh", "start-head.sh", said="port 6379 is taken", seconds=0)
    assert done.returncode == 2
    assert "port 6379 is taken" in done.stderr
    assert "Ray must start within 120 s" in done.stderr


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({}, "http://127.0.0.1:8265"),
        ({"RAY_API_SERVER_ADDRESS": "http://head:1"}, "http://head:1"),
        ({"RAY_ADDRESS": "head:6379"}, ""),
    ],
)
def test_a_job_goes_to_the_dashboard_that_is_set_or_to_this_machines(tmp_path, settings, address):
    (tmp_path / "ray").write_text(SUBMITTED)
    (tmp_path / "ray").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    (tmp_path / "mine.yaml").touch()
    done = subprocess.run(
        [CLUSTER / "submit.sh", "ddil-ray", "distill", "two words.yaml"],
        env={**kept, "PATH": path, "RAY_AUTH_TOKEN": "a" * 64, **settings},
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr  # that of `ray`
    said = done.stdout.splitlines()[2:]
    assert said[:4] == [address, "job", "submit", "--working-dir"]
    assert said[5:7] == ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}']
    assert said[7:] == ["--", "ddil-ray", "distill", "two words.yaml", "mine.yaml ray"]
    assert not Path(said[4]).exists()


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


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a folder to another user")
def test_a_folder_of_another_user_is_not_written_to(node, tmp_path):
    """In /tmp anybody may make it first, with links in it."""
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 12345, 12345)
    (tmp_path / "state" / "log").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    done = node("background.sh", "start-head.sh")
    assert done.returncode != 0
    assert "STATE must be a folder of your own" in done.stderr
    assert (tmp_path / "mine").read_text() == "mine"
