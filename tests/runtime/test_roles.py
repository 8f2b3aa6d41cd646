"""Pins that roles run where they are told to: on nodes of their labels, and all on one GPU in shares of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from runs import THREE_SOURCES, small_run, when

from ddil_ray.runtime.run import distill
from ddil_ray.tracking import read_journal


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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_every_role_has_a_share_of_its_own_of_one_gpu(run_dir):
    """One that exists in name only: Ray hands out shares of it, which add up to .98 while the student trains."""
    rows = {"batch_size": 16, "num_cpus": 0.5}
    config = small_run(
        output=run_dir,
        states=THREE_SOURCES,
        trainer={"num_gpus": 0.4},
        forward_states={"num_gpus": 0, **rows},
        student_rollouts={"num_gpus": 0.2, **rows},
        teacher_rollouts={"num_gpus": 0.15, "keep_rows": 32, **rows},
        labels={"placement": "pool", "num_gpus": 0.06, "num_cpus": 0.5},
        shift={"enabled": True, "num_samples": 16, "num_gpus": 0.05, "num_cpus": 0.5},
        evaluation={"enabled": True, "num_gpus": 0.5, "num_samples": 32, "steps": [2], "teacher_steps": 4},
    )
    least = []

    def look() -> bool:
        least.append(ray.available_resources().get("GPU", 0.0))
        return (Path(run_dir) / "small" / "report.html").exists()

    looking = when(look, lambda: None, timeout_s=300)
    result = distill(config)
    assert looking.result()
    assert min(least) == pytest.approx(0.02, abs=1e-3)
    records = read_journal(Path(run_dir) / "small" / "metrics.jsonl")
    assert {"shift/energy/step_1"} <= {key for record in records for key in record}
    assert "student" in result.scores
    kept = list((Path(run_dir) / "small" / "kept").glob("*/*.parquet"))
    assert len(kept) == 2
