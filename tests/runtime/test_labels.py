"""Pins that roles run on the nodes that their labels select, on a cluster of three nodes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.ray
@pytest.mark.slow
def test_every_role_runs_on_the_nodes_that_its_labels_select(tmp_path):
    program = Path(__file__).with_name("labelled_cluster.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"trainer": ["train"], "actors": ["rollout"]}
