"""Row "version mismatch": a cluster with another Ray, and a checkpoint that other versions wrote."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray
import torch

from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.runtime.worker import _newest
from ddil_ray.training import manifest
from ddil_ray.training.checkpoint import write_checkpoint

CONNECT = """
import sys
import ray
from ddil_ray.errors import ConfigError
from ddil_ray.runtime.cluster import ray_session
ray.__version__ = "2.59.0"
try:
    with ray_session(cpus=1):
        print("in")
except ConfigError as error:
    sys.exit(str(error))
"""


@pytest.mark.ray
def test_a_cluster_with_another_ray_is_one_message_that_names_both(ray_cluster):
    """The real check of Ray's against the real cluster, by a driver that says to be older."""
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run([sys.executable, "-c", CONNECT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    *_, message = done.stderr.splitlines()
    assert message.startswith("RAY_ADDRESS must be a cluster with the Ray and the Python of this process, but is '")
    assert f"The cluster was started with: Ray: {ray.__version__} Python: " in message
    assert "was started with: Ray: 2.59.0 Python: " in message
    assert message.endswith("by `ray job submit`.")


@pytest.mark.parametrize("changed", [{}, {"torch": "2.10.0", "python": "3.10.1"}])
def test_a_checkpoint_of_other_versions_is_gone_on_from_and_they_are_named(tmp_path, monkeypatch, changed):
    here = manifest.libraries()
    staged, said = tmp_path / "staged", []
    staged.mkdir()
    learner = {"student": {"w": torch.zeros(8)}, "optimizers": {}, "rounds": {}}
    with monkeypatch.context() as older:
        older.setattr(manifest, "libraries", lambda: here | changed)
        write_checkpoint(staged, {"step": 10, "learner": learner, "rank": {"taken": {0: 1}}}, rank=0, ranks=1)
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    store.put("attempt-1/checkpoint_0001-aa_000000010", staged)
    assert _newest(store, said.append).step == 10
    assert len(said) == bool(changed)
    for line in said:
        assert f"python 3.10.1 (here {here['python']}), torch 2.10.0 (here {here['torch']})" in line
