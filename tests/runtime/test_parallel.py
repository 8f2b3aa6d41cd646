"""Whole runs on a local Ray whose trainers keep parts of networks, and whose number of workers changes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from own_cluster import with_a_cluster_of_its_own
from runs import PD, THREE_SOURCES, kill, small_run, when

from ddil_ray.errors import ConfigError, RunStoppedError
from ddil_ray.models import load_model
from ddil_ray.runtime.run import distill, resumed_config
from ddil_ray.tracking import read_journal
from ddil_ray.training.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PERCEPTRON = "ddil_ray.models.perceptron:new_model"
FSDP = {"parallel": "fsdp", "num_workers": 2, "batch_size": 32, "num_gpus": 0}


def _run(run_dir, **trainer):
    return small_run(
        output=run_dir,
        objective=PD,
        states=THREE_SOURCES,
        teacher={"model": PERCEPTRON},
        trainer={**FSDP, **trainer},
        checkpoint={"every": 20},
    )


def _training(config):
    return [r for r in _records(config) if "loss" in r]


def _records(config):
    return read_journal(Path(config.output, config.name, "metrics.jsonl"))


def _reached(config, step):
    return lambda: any(r["step"] >= step for r in _training(config))


def _check(config, result):
    """It went on to its end, never beyond the bound, and left what can be loaded."""
    records = _training(config)
    assert records[-1]["step"] == config.trainer.steps * 2
    bound = Recipe(config).ingredients().max_staleness
    assert max(r["staleness/max"] for r in records if "staleness/max" in r) <= bound
    exported = load_model(PERCEPTRON, weights=str(Path(result.folder, "student", "model.safetensors")))
    student = result.rounds[2].network.state_dict()
    assert all(torch.equal(tensor, student[name]) for name, tensor in exported.network.state_dict().items())
    assert any(not torch.equal(t, student[n]) for n, t in load_model(PERCEPTRON).network.state_dict().items())


@pytest.mark.slow
def test_two_workers_with_parts_of_networks_survive_a_kill_and_leave_a_student(run_dir):
    config = _run(run_dir, steps=40)
    killed = when(_reached(config, 30), lambda: kill("ray::RayTrainWorker"))
    result = distill(config)
    assert killed.result()
    _check(config, result)
    steps = [r["step"] for r in _training(config)]
    assert max(steps.count(n) for n in range(2, 21, 2)) == 1  # nothing before the checkpoint at 20 was done again
    newest = sorted(Path(result.folder, "checkpoints", "attempt-1").glob("checkpoint_*/parts-0.safetensors"))[-1]
    assert newest.with_name("parts-1.safetensors").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_workers(run_dir):
    """From two to one and back, in the middle of each round."""
    config = _run(run_dir, steps=150)
    folder = str(Path(config.output, config.name))
    for workers, stop_at in ((2, 60), (1, 200)):
        config = resumed_config(folder, [f"trainer.num_workers={workers}"]) if workers != 2 else config
        when(_reached(config, stop_at), lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(RunStoppedError, match="SIGTERM"):
            distill(config, resume=workers != 2)
    config = resumed_config(folder, ["trainer.num_workers=2"])
    _check(config, distill(config, resume=True))
    changed = [r for r in _records(config) if "trainer/workers" in r]
    assert [r["trainer/workers"] for r in changed] == [1, 2]
    assert all(r["rows/left_behind"] >= 0 for r in changed)
    with pytest.raises(ConfigError, match=r"multiple of num_workers x accumulate \(3 x 1\)"):
        resumed_config(folder, ["trainer.num_workers=3"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_elastic_run_grows_when_a_node_comes(run_dir):
    """From one worker to two, at a checkpoint; on a cluster of its own, hence in a process of its own."""
    with_a_cluster_of_its_own("elastic.py", run_dir, timeout_s=560)
    found = json.loads(Path(run_dir, "found.json").read_text())
    assert found["grown"]
    assert found["last"] == 1500
    assert [workers for _, workers in found["changed"]] == [2]
    assert found["changed"][0][0] % 50 == 0
