"""The whole way of a cluster user: `ray start --head`, `ray job submit`, a student at the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head():
    """A head node of our own and its dashboard's address; ended by its own process group."""
    dashboard, folder = _free_port(), tempfile.mkdtemp(prefix="r")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [
        BIN / "ray", "start", "--head", "--block", f"--port={_free_port()}", f"--dashboard-port={dashboard}",
        "--num-cpus=6", "--object-store-memory=300000000", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 120
    while subprocess.run(
        [BIN / "ray", "job", "list", "--address", address], env=environment, capture_output=True
    ).returncode:
        assert time.monotonic() < deadline
        time.sleep(2)
    yield address, environment
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_digits_distillation_runs_as_a_job(head, tmp_path):
    address, environment = head
    done = subprocess.run(
        [
            BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--",
            "python", "pipelines/distill.py", "pipelines/configs/digits-pd.yaml", f"output={tmp_path}",
            "trainer.steps=20", "evaluation.num_samples=64", "evaluation.teacher_steps=8",
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "digits-pd" / "student" / "model_index.json").exists()
    assert (tmp_path / "digits-pd" / "report.html").exists()
    assert "report   " in done.stdout


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_pipeline_runs_as_a_job(head, tmp_path):
    """Each of its stages connects to the cluster anew."""
    address, environment = head
    done = subprocess.run(
        [
            BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--",
            "python", "pipelines/chain.py", "digits-chain", f"output={tmp_path}", "baseline=null", "compare=null",
            "train_teacher.model.block_out_channels=[8,16]", "train_teacher.trainer.steps=20",
            "distill.trainer.steps=20", "distill.evaluation.num_samples=64", "distill.evaluation.teacher_steps=8",
            "distill.shift.enabled=false", "evaluate.evaluation.num_samples=96",
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage, file in {
        "train-teacher": "teacher/model_index.json",
        "distill": "student/model_index.json",
        "evaluate": "metrics.json",
        "export": "model_index.json",
    }.items():
        assert len(list((tmp_path / "digits-chain").glob(f"digits-chain-{stage}-*/{file}"))) == 1
