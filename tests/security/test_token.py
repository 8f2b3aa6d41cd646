"""Pins that a Ray that the scripts of cluster/ start lets nobody in without its token (row: wrong or missing token)."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from started import environment, free_port, until

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONNECT = """
import sys
from ddil_ray.errors import ConfigError
from ddil_ray.runtime.cluster import ray_session
try:
    with ray_session(cpus=1):
        import ray
        print(len([node for node in ray.nodes() if node["Alive"]]), "nodes")
except ConfigError as error:
    sys.exit(str(error))
"""


def at_home(home, **more):
    """An environment with a home of its own."""
    return environment(HOME=home, PATH=f"{BIN}:{os.environ['PATH']}", PYTHONPATH=ROOT, **more)


def started(script, *arguments, env, log):
    command = [ROOT / "cluster" / script, *arguments, f"--dashboard-agent-listen-port={free_port()}"]
    with log.open("w") as out:
        return subprocess.Popen(command, env=env, start_new_session=True, stdout=out, stderr=out)


def stopped(process):
    """End a process group of ours."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def head_of(home, port, dashboard):
    """A head of the script's that is up. On a busy machine Ray may give up waiting for a process of its own."""
    env = at_home(home, PORT=port, DASHBOARD_PORT=dashboard, METRICS_PORT=free_port())
    options = ["--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={home}/ray"]
    for _ in range(3):
        process = started("start-head.sh", *options, env=env, log=home / "log")
        until(lambda p=process: p.poll() is not None or "Ray runtime started" in (home / "log").read_text())
        if process.poll() is None:
            return process
    raise AssertionError((home / "log").read_text())


@pytest.fixture(scope="module")
def head():
    """A head of the script's and how to reach it."""
    home = Path(tempfile.mkdtemp(prefix="r"))
    port, dashboard = free_port(), free_port()
    process = head_of(home, port, dashboard)
    try:
        address, token = f"http://127.0.0.1:{dashboard}", home / ".ray" / "auth_token"
        yield SimpleNamespace(home=home, address=address, dashboard=dashboard, port=port, token=token)
    finally:
        stopped(process)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def elsewhere(tmp_path):
    """Environments of a client without the token, with a wrong one, and with the right one, in homes of their own."""
    (tmp_path / "wrong").write_text("0" * 64)

    def of(kind, head):
        files = {"wrong": tmp_path / "wrong", "right": head.token}
        told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": files[kind]} if kind in files else {}
        return at_home(tmp_path, **told)

    return of


pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


def test_the_token_is_its_owners_alone(head):
    assert len(head.token.read_text()) == 64
    assert stat.S_IMODE(head.token.stat().st_mode) == 0o600
    assert head.token.read_text() not in (head.home / "log").read_text()


def test_the_dashboard_is_bound_to_this_machine(head):
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening if address.port == head.dashboard} == {"127.0.0.1"}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("0" * 64, 403)])
def test_the_job_api_refuses_a_request_without_the_token(head, token, status):
    request = urllib.request.Request(f"{head.address}/api/jobs/", b'{"entrypoint": "true"}')
    request.add_header("Content-Type", "application/json")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == status


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [("none", 1, "Missing authentication token"), ("wrong", 1, "Invalid authentication token"), ("right", 0, "let in")],
)
def test_a_job_needs_the_token(head, elsewhere, kind, code, said):
    command = [BIN / "ray", "job", "submit", "--address", head.address, "--", "echo", "let", "in"]
    done = subprocess.run(command, env=elsewhere(kind, head), capture_output=True, text=True, timeout=90)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["none", "wrong"])
def test_a_driver_is_told_to_look_at_its_token(head, elsewhere, kind, tmp_path, recovery):
    env = {**elsewhere(kind, head), "RAY_ADDRESS": f"127.0.0.1:{head.port}"}
    command = [BIN / "ddil-ray", "distill", "digits-perceptron", f"output={tmp_path}/runs"]
    began = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    recovery(f"until a driver is told to look at its token ({kind})", time.monotonic() - began)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert message.startswith("Error: RAY_ADDRESS must be a running cluster, or unset for a local Ray, but is '127.")
    assert "RAY_AUTH_MODE must be `token` and RAY_AUTH_TOKEN_PATH a copy of its file: check both." in message


def test_a_driver_with_the_token_is_let_in(head, elsewhere):
    env = {**elsewhere("right", head), "RAY_ADDRESS": f"127.0.0.1:{head.port}"}
    done = subprocess.run([sys.executable, "-c", CONNECT], env=env, capture_output=True, text=True, timeout=90)
    assert (done.returncode, "1 nodes" in done.stdout) == (0, True), done.stderr


def test_a_worker_joins_with_the_token_and_not_without(head, elsewhere, tmp_path):
    address = f"127.0.0.1:{head.port}"
    refused = subprocess.run(
        [ROOT / "cluster" / "start-worker.sh", address], env=elsewhere("none", head), capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "the token must be in RAY_AUTH_TOKEN or in" in refused.stderr
    env = {**elsewhere("right", head), "METRICS_PORT": str(free_port())}
    worker = started("start-worker.sh", address, "--num-cpus=1", env=env, log=tmp_path / "log")
    try:
        client = {**elsewhere("right", head), "RAY_ADDRESS": address}

        def joined():
            assert worker.poll() is None, (tmp_path / "log").read_text()
            done = subprocess.run([sys.executable, "-c", CONNECT], env=client, capture_output=True, text=True)
            return "2 nodes" in done.stdout

        until(joined)
    finally:
        stopped(worker)
