"""Pins the monitor's life: what it waits for, and that its end is told of once and holds nothing up."""

from __future__ import annotations

import time

import pytest
import ray
import torch
from publishing import Rank0, tensors
from runs import PD, small_run

from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.hub import Hub
from ddil_ray.runtime.monitor import MonitorHandle
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.wire import flatten_weights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


SHIFT = {"enabled": True, "every": 10, "num_samples": 32, "num_cpus": 0, "num_gpus": 0}


@pytest.fixture
def run():
    """(hub, context, publish(phase, version)) of a run whose monitor is not yet there."""
    config = small_run(objective=PD, shift=SHIFT)
    made = Recipe(config).ingredients()
    hub = Hub.remote(10)
    images, labels = (ray.put(x.numpy()) for x in (made.data.images, made.data.labels))
    context = RunContext(config.model_dump(mode="json"), hub, images, labels, prompts=ray.put(None), max_staleness=100)
    trainer, weights = Rank0.remote(hub, 0, {}), flatten_weights(made.teacher.network)

    def publish(phase, version, student=None):
        student = student or tensors(made.teacher)
        ray.get(trainer.publish.remote(phase, version, student, weights if phase else None))

    yield hub, context, publish
    ray.kill(trainer)
    ray.kill(hub)


def _measured(hub, count, timeout_s=60):
    """The first `count` records of measurements."""
    records, deadline = [], time.monotonic() + timeout_s
    while len(records) < count:
        assert time.monotonic() < deadline
        records += [r for r in ray.get(hub.drain.remote()) if "sync/bytes" not in r]
        time.sleep(0.1)
    return records


def test_a_monitor_measures_what_is_due_and_the_last_weights_and_ends(run):
    hub, context, publish = run
    publish(0, 0)
    publish(0, 4)
    said = []
    monitor = MonitorHandle(context, context.recipe.config.shift, said.append)
    (first,) = _measured(hub, 1)
    assert (first["step"], first["phase"]) == (0, 0)
    assert {f"shift/energy/step_{k}" for k in (1, 2, 3, 4)} < set(first)
    publish(1, 20)
    (second,) = _measured(hub, 1)
    assert (second["step"], second["phase"]) == (20, 1)
    assert "shift/energy/step_3" not in second
    # The second round's teacher is the first's student: without guidance, with its own answers.
    assert second["shift/error_forward/step_2"] != pytest.approx(first["shift/error_forward/step_2"], rel=0.01)
    publish(1, 24)
    assert monitor.watch()
    monitor.finish(lambda: True)
    assert [r["step"] for r in _measured(hub, 1)] == [24]
    assert not monitor.watch()
    assert said == []
    monitor.kill()


@pytest.mark.slow
def test_a_monitor_that_dies_is_told_of_once_and_not_waited_for(run):
    _, context, _ = run
    said = []
    monitor = MonitorHandle(context, context.recipe.config.shift, said.append)
    ray.kill(monitor._actor)
    deadline = time.monotonic() + 30
    while monitor.watch():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    monitor.finish(lambda: pytest.fail("waited"))
    assert not monitor.watch()
    assert len(said) == 1
    assert said[0].startswith("Covariate shift is no longer measured, the run goes on: ")


def test_a_monitor_that_fails_says_why(run):
    """Through weights that are not those of this network."""
    _, context, publish = run
    said = []
    monitor = MonitorHandle(context, context.recipe.config.shift, said.append)
    publish(0, 0, [torch.zeros(1, dtype=torch.float64)])
    deadline = time.monotonic() + 180
    while monitor.watch():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(said) == 1
    assert "float32" in said[0]
    monitor.kill()


@pytest.mark.slow
def test_the_end_waits_for_the_last_measurement_no_longer_than_it_may(run):
    """The actor needs seconds to start; the bound is half a second, and a signal ends the wait before."""
    _, context, publish = run
    publish(0, 0)
    for wait_s, goes_on in ((0.5, True), (60.0, False)):
        said = []
        settings = small_run(shift={**SHIFT, "wait_s": wait_s}).shift
        monitor = MonitorHandle(context, settings, said.append)
        started = time.monotonic()
        monitor.finish(lambda goes_on=goes_on: goes_on)
        assert time.monotonic() - started < 3
        assert [text.startswith("The last measurement of covariate shift took over 0.5 s") for text in said] == [
            True
        ] * goes_on
        monitor.kill()
