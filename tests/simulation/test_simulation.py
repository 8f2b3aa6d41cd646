"""Pins simulated teachers: what time their passes take, and that a run with one does as its plan says."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from runs import small_run

from ddil_ray.capacity.costs import declared
from ddil_ray.capacity.plan import capacity
from ddil_ray.errors import ConfigError
from ddil_ray.simulation import MODELS, sd15, sd15_latents
from ddil_ray.simulation.device import VARIABLE, World, spend, virtual_time
from ddil_ray.simulation.network import PassTimes, SimulatedNetwork
from ddil_ray.tracking import read_journal
from ddil_ray.training.recipe import Recipe

TIMES = PassTimes(inference=1.0, forward=10.0, backward=100.0)
ROWS = torch.zeros(3, 2, 2, 2), torch.zeros(3), torch.zeros(3), torch.zeros(3)


def test_time_is_slept_or_added_up():
    started = time.perf_counter()
    spend(0.05)
    assert time.perf_counter() - started >= 0.05
    with virtual_time() as outer:
        spend(1000.0)
        with virtual_time() as inner:
            spend(500.0)
    assert (outer.seconds, inner.seconds) == (1000.0, 500.0)
    assert time.perf_counter() - started < 10


def test_passes_take_time_by_rows_and_by_what_they_are_for():
    network = SimulatedNetwork(TIMES, weights=4)
    with virtual_time() as clock:
        output = network(*ROWS)
        assert clock.seconds == 3 * 10.0
        output.sum().backward()
        assert clock.seconds == 3 * (10.0 + 100.0)
        with torch.no_grad():
            network(*ROWS)
        assert clock.seconds == 3 * (10.0 + 100.0 + 1.0)
        network.requires_grad_(False)(*ROWS)
        assert clock.seconds == 3 * (10.0 + 100.0 + 2.0)


def test_a_simulated_network_learns_with_all_its_weights():
    network = SimulatedNetwork(PassTimes(0.0, 0.0, 0.0), weights=5)
    x = torch.randn(3, 2, 2, 2, requires_grad=True)
    network(x, *ROWS[1:]).square().mean().backward()
    assert network.weights.grad.shape == (5,)
    assert network.weights.grad[0] == pytest.approx(2 * float(x.detach().square().mean()))
    assert torch.equal(network.weights.grad[1:], torch.zeros(4))
    assert x.grad.abs().sum() > 0


def test_the_world_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, World(scale=10, weights=1000).text)
    model = sd15()
    assert model.sample_shape == tuple(sd15_latents().images.shape[1:])
    assert model.network.weights.numel() == 1000
    assert model.network.times.inference == pytest.approx(10 * MODELS["sd15"].times.inference)
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ConfigError, match="must be <scale>,<weights> such as 10,64, but is 'fast'"):
        sd15()


def test_an_a100_needs_34_ms_per_row_of_consistency_distillation():
    times = MODELS["sd15"].times
    assert times.forward + times.backward + times.inference == pytest.approx(0.034, rel=0.01)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_ray_is_as_fast_and_stalls_as_much_as_planned(run_dir):
    """One actor of teacher rollouts, which takes 1.7 times as long as the trainer: a stall of about 40 %."""
    from ddil_ray.runtime.run import distill

    config = small_run(
        output=run_dir,
        teacher={"model": "ddil_ray.simulation:sd15", "guidance": 1.0},
        data={"source": "ddil_ray.simulation:sd15_latents"},
        objective={"type": "lcm", "student_steps": 4},
        states={"forward": 0.5, "teacher": 0.5, "teacher_substeps": 8},
        trainer={"steps": 40, "batch_size": 8},
        forward_states={"batch_size": 8},
        teacher_rollouts={"batch_size": 8},
        tracking={"log_every": 1},
        checkpoint={"every": 1000},
    )
    recipe = Recipe(config)
    made = recipe.ingredients()
    planned = capacity(recipe, made, declared(recipe, made))
    distill(config)
    records = [r for r in read_journal(Path(run_dir) / "small" / "metrics.jsonl") if "loss" in r][15:]
    seconds = [8 / r["throughput/samples_per_s"] for r in records]
    stall = sum(r["trainer/stall_share"] * s for r, s in zip(records, seconds, strict=True)) / sum(seconds)
    assert planned.phases[0].limit == "teacher_rollouts"
    assert fmean(seconds) == pytest.approx(planned.step_s, rel=0.1)
    assert stall == pytest.approx(planned.stall, abs=0.1)
