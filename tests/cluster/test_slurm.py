"""Pins the SLURM script, run with a SLURM and a Ray of a few lines: what starts where, and who gets a signal."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import CLUSTER, ROOT, sbatch_options

SCRIPT = CLUSTER / "slurm" / "ddil.sbatch"
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
RAY = """#!/usr/bin/env bash
trap 'echo "ended $*" >>"$LOG"; exit 0' TERM
echo "ray $*" >>"$LOG"
echo "Ray runtime started."
while :; do sleep 0.05; done
"""
PYTHON = """#!/usr/bin/env bash
echo "python $*" >>"$LOG"
until grep -q "ray start --address" "$LOG"; do sleep 0.05; done
exit "${NODES_MISSING:-0}"
"""
RUN = """#!/usr/bin/env bash
echo "ddil-ray $* at $RAY_ADDRESS with $RAY_AUTH_MODE" >>"$LOG"
trap 'echo checkpoint >>"$LOG"; exit 143' TERM
[ -z "${FINISHES:-}" ] || exit "$FINISHES"
while :; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as SLURM would, in a copy of cluster/; gives the process and the log of what was called."""
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in {"srun": SRUN, "ray": RAY, "python": PYTHON, "ddil-ray": RUN}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    log, started = tmp_path / "log", []

    def start(*arguments, **environment):
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "LOG": str(log),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURMD_NODENAME": "node-1",
            "SLURM_CPUS_ON_NODE": "96",  # of two components, SLURM_CPUS_PER_TASK has a suffix
            "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
            "SLURM_JOB_NUM_NODES_HET_GROUP_1": "8",
            **environment,
        }
        spool = tmp_path / "slurm_script"  # SLURM runs a copy
        shutil.copy(SCRIPT, spool)
        process = subprocess.Popen(["bash", spool, *arguments], env=env, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start, log
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def until(log, text):
    deadline = time.monotonic() + 30
    while not any(text in line for line in lines(log)):
        assert time.monotonic() < deadline, lines(log)
        time.sleep(0.05)


def test_the_script_is_sound():
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "-x", SCRIPT], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_job_has_two_components_and_time_to_save_before_its_end():
    trainer, rollout = sbatch_options(SCRIPT.read_text())
    assert trainer["signal"] == "B:TERM@300"
    for component in (trainer, rollout):
        assert component["ntasks-per-node"] == "1"
        assert "exclusive" in component
    assert set(rollout) <= set(trainer)


def test_no_ray_of_others_is_ended():
    text = SCRIPT.read_text()
    assert "ray stop" not in text
    assert "symmetric-run" not in text


def test_a_head_that_trains_and_nodes_that_roll_out_are_started_and_then_the_run(job):
    start, log = job
    process = start("mine.yaml", "trainer.steps=7", FINISHES="0")
    assert process.wait(60) == 0, process.stderr.read()
    until(log, "ended start --address=node-1:6379")
    said = lines(log)
    (head,) = [line for line in said if line.startswith("ray start --head")]
    assert "--labels=pool=trainer --num-cpus=96" in head
    (workers,) = [line for line in said if line.startswith("srun")]
    assert workers.startswith("srun --het-group=1 ")
    assert workers.endswith("cluster/start-worker.sh node-1:6379 --labels=pool=rollout")
    assert "python cluster/wait_nodes.py 9" in said
    assert "ddil-ray distill mine.yaml trainer.steps=7 at node-1:6379 with token" in said
    until(log, "ended start --head")


def test_a_job_that_comes_back_from_the_queue_goes_on(job):
    start, log = job
    assert start("mine.yaml", FINISHES="0", SLURM_RESTART_COUNT="1").wait(60) == 0
    assert "ddil-ray distill mine.yaml --resume-if-begun at node-1:6379 with token" in lines(log)


def test_more_nodes_that_train_are_workers_of_the_same_pool(job):
    start, log = job
    assert start("mine.yaml", FINISHES="0", SLURM_JOB_NUM_NODES_HET_GROUP_0="3").wait(60) == 0
    (trainers,) = [line for line in lines(log) if line.startswith("srun --het-group=0")]
    assert "--nodes=2 --exclude=node-1" in trainers
    assert trainers.endswith("--labels=pool=trainer")
    assert "python cluster/wait_nodes.py 11" in lines(log)


def test_a_signal_reaches_the_run_alone_and_its_exit_code_is_the_jobs(job):
    start, log = job
    process = start("mine.yaml")
    until(log, "ddil-ray distill")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    until(log, "ended start --head")
    said = lines(log)
    assert said.index("checkpoint") < min(i for i, line in enumerate(said) if line.startswith("ended"))


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails_fails_the_job(job, code):
    start, log = job
    assert start("mine.yaml", FINISHES=str(code)).wait(60) == code
    until(log, "ended start --head")


def test_nodes_that_do_not_come_end_the_job_before_the_run(job):
    start, log = job
    assert start("mine.yaml", NODES_MISSING="1").wait(60) == 1
    assert not [line for line in lines(log) if line.startswith("ddil-ray")]


def test_a_job_without_a_config_is_told_how(job):
    start, log = job
    process = start()
    assert process.wait(60) == 2
    assert "a config must be given" in process.stderr.read()
    assert not lines(log)
