"""Pins that published weights arrive whole, outlive the trainer and the hub, and take no more room as they go on."""

from __future__ import annotations

import time

import pytest
import ray
import torch
from publishing import Rank0, streams, tensors
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from runs import PD, small_run

from ddil_ray.runtime.admission import Ask
from ddil_ray.runtime.hub import Hub
from ddil_ray.trained import trained_state
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.wire import flatten_weights, load_weights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def run():
    """(recipe, its ingredients, hub)."""
    recipe = Recipe(small_run(objective=PD))
    hub = Hub.remote()
    yield recipe, recipe.ingredients(), hub
    ray.kill(hub)


def _student(recipe, made, factor):
    student = recipe.student_of(made.teacher)
    for parameter in student.network.parameters():
        parameter.data.mul_(factor)
    return student


def _admitted(hub, block=0, phase=0, known=(-1, -1)):
    return ray.get(hub.admit.remote(Ask("student", phase, block, known)), timeout=60)


def _holds(grant, student):
    """Whether the granted weights are those of `student`."""
    other = student.copy()
    load_weights(other.network, ray.get(grant.student[0]))
    return all(torch.equal(a, b) for a, b in zip(tensors(other), tensors(student), strict=True))


def test_newer_weights_replace_older_ones_and_outlive_the_trainer(run):
    recipe, made, hub = run
    students = [_student(recipe, made, factor) for factor in (0.5, -2.0)]
    trainer = Rank0.remote(hub, 0, streams(recipe, 2))
    ray.get(trainer.publish.remote(0, 0, tensors(students[0])))
    first = _admitted(hub)
    assert (first.version, _holds(first, students[0]), first.teacher) == (0, True, None)
    ray.get(trainer.publish.remote(0, 20, tensors(students[1])))
    assert _admitted(hub, known=(0, 20)).student is None
    ray.kill(trainer)
    second = _admitted(hub, known=(0, 0))
    assert (second.version, _holds(second, students[1])) == (20, True)
    assert _holds(first, students[0])  # a reader keeps what it has


def test_a_phase_brings_its_teacher(run):
    recipe, made, hub = run
    student, teacher = (_student(recipe, made, factor) for factor in (0.5, -2.0))
    trainer = Rank0.remote(hub, 20, streams(recipe, 2, start_step=20))
    ray.get(trainer.publish.remote(1, 20, tensors(student), flatten_weights(teacher.network)))
    grant = _admitted(hub, phase=1)
    taught = teacher.copy()
    load_weights(taught.network, ray.get(grant.teacher[0]))
    expected = trained_state(teacher.network)
    assert all(torch.equal(a, expected[name]) for name, a in trained_state(taught.network).items())
    assert _admitted(hub, phase=1, known=(1, 20)).teacher is None


def test_a_hub_that_dies_is_told_everything_anew(run):
    """While the trainer waits for a block, so that nothing but the publisher notices; who waited is answered."""
    recipe, made, hub = run
    student = _student(recipe, made, 0.5)
    trainer = Rank0.remote(hub, 0, streams(recipe, 2, ready=4))
    ray.get(trainer.publish.remote(0, 0, tensors(student)))
    waiting = hub.admit.remote(Ask("student", 0, 9, (-1, -1)))  # needed at step 18, five blocks beyond its credit
    assert not ray.wait([waiting], timeout=1)[0]
    before = ray.get(hub.begun.remote())
    ray.get(trainer.reach.remote(9))
    ray.kill(hub, no_restart=False)
    grant = ray.get(waiting, timeout=60)
    assert (grant.version, _holds(grant, student)) == (0, True)
    assert ray.get(hub.begun.remote()) > before
    ray.get(trainer.publish.remote(0, 16, tensors(student)))
    assert _admitted(hub).version == 16


def test_a_hub_that_pools_told_their_sizes_first_gives_as_many_credits(run):
    """As one does that was started again: the executors ask it, in any order with the publisher."""
    recipe, made, _ = run
    hub = Hub.remote(None, {"student": (1, 16)})
    assert ray.get(hub.pool_sizes.remote({"student": 5})) == {"student": 5}
    trainer = Rank0.remote(hub, 0, streams(recipe, 2, ready=1))
    ray.get(trainer.publish.remote(0, 0, tensors(made.teacher)))
    calls = [hub.admit.remote(Ask("student", 0, block, (-1, -1))) for block in range(8)]
    admitted, waiting = ray.wait(calls, num_returns=7, timeout=60)
    assert (set(admitted), waiting) == (set(calls[:7]), calls[7:])  # that of step 0, five, and one that lies ready
    assert not ray.wait(waiting, timeout=1)[0]
    ray.kill(hub)


def test_the_object_store_holds_no_more_weights_however_many_are_published(run):
    recipe, _, hub = run
    trainer = Rank0.remote(hub, 0, streams(recipe, 2))
    held = []
    for version in range(8):
        ray.get(trainer.publish.remote(0, version, [torch.full((2**20,), float(version))]))
        grant = _admitted(hub, known=(0, version - 1))
        assert float(ray.get(grant.student[0])["torch.float32"].view("float32")[5]) == version
        del grant
        time.sleep(0.2)
        held.append(_stored_bytes())
    copy = 4 * 2**20
    assert max(held[2:]) < held[1] + copy / 2


def _stored_bytes():
    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    return reply.store_stats.object_store_bytes_primary_copy
