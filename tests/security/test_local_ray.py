"""Pins that a Ray that a command starts for itself is closed: its ports are open to this machine's other users."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from ddil_ray.runtime.cluster import LOCAL_ENV

CONNECT = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR'); print('in')"


def test_every_process_makes_a_token_of_its_own():
    script = "from ddil_ray.runtime.cluster import LOCAL_ENV; print(LOCAL_ENV['RAY_AUTH_TOKEN'])"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()
    assert len(other) == len(LOCAL_ENV["RAY_AUTH_TOKEN"]) == 64
    assert other != LOCAL_ENV["RAY_AUTH_TOKEN"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_nobody_gets_in_without_the_token(ray_cluster, tmp_path, known):
    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    if not known:
        env["RAY_AUTH_TOKEN"] = "0" * 64
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, address], env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == known, done.stderr
    assert ("in" in done.stdout.split()) == known
