"""Pins the order of blocks, and that actors make them from the weights that were published."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from publishing import Rank0, streams, tensors
from ray.exceptions import OwnerDiedError
from runs import PD, THREE_SOURCES, small_run
from started import until

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime import poison, stages
from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.hub import Hub
from ddil_ray.runtime.stages import StateStage, stream_plan
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.mixing import Mixing
from ddil_ray.states.prior import Prior
from ddil_ray.states.rollout import Policy, rollout
from ddil_ray.states.source import SourceContext, StateRequest, make_states
from ddil_ray.states.stretch import Stretch
from ddil_ray.training.inline import requests
from ddil_ray.training.recipe import Recipe


def test_blocks_go_to_ranks_in_turn_and_fill_every_phase():
    recipe = Recipe(small_run(objective=PD, states=THREE_SOURCES, trainer={"num_workers": 2, "batch_size": 32}))
    stream = stream_plan(recipe, Origin.STUDENT, phases=2, start_step=0, max_staleness=10)
    for phase, plan in enumerate(recipe.plans(2)):
        mine = stream.indices[stream.phases == phase].tolist()
        assert mine == list(range(2 * plan.blocks(Origin.STUDENT, 16)))


@pytest.mark.parametrize("workers", [1, 2])
def test_blocks_are_made_for_the_same_progress_with_and_without_ray(workers):
    """Schedules of a block are read at its first step; two workers share a step's blocks, each takes half the rows."""
    states = {"forward": {"start": 0.8, "end": 0.5}, "mixed": {"start": 0.2, "end": 0.5}}
    trainer = {"num_workers": workers, "batch_size": 16 * workers}
    recipe = Recipe(small_run(objective=PD, states=states, trainer=trainer))
    asked = list(requests(recipe, Origin.MIXED, recipe.plans(2)))
    stream = stream_plan(recipe, Origin.MIXED, phases=2, start_step=0, max_staleness=10)
    assert [(r.phase, r.progress) for r in asked for _ in range(workers)] == list(
        zip(stream.phases, stream.progress, strict=True)
    )
    for phase in range(2):
        along = [r.progress for r in asked if r.phase == phase]
        assert along == sorted(along)
        assert along[0] == 0
        assert 0.7 < along[-1] <= 1


@settings(max_examples=20)
@given(start=st.integers(0, 39), reuse=st.integers(1, 3))
def test_a_resumed_stream_goes_on_at_the_first_block_not_taken(start, reuse):
    recipe = Recipe(small_run(objective=PD, states=THREE_SOURCES, replay={"reuse": reuse}))
    whole = stream_plan(recipe, Origin.STUDENT, phases=2, start_step=0, max_staleness=10)
    rest = stream_plan(recipe, Origin.STUDENT, phases=2, start_step=start, max_staleness=10)
    phase, local = divmod(start, 20)
    taken = -(-int(recipe.plans(2)[phase].fresh(Origin.STUDENT)[local - 1]) // 16) if local else 0
    left = (whole.phases > phase) | ((whole.phases == phase) & (whole.indices >= taken))
    for column in fields(whole):
        assert getattr(rest, column.name).tolist() == getattr(whole, column.name)[left].tolist()


@given(max_staleness=st.integers(6, 40))
@settings(max_examples=20)
def test_admission_keeps_the_bound_and_never_waits_for_itself(max_staleness):
    """A block's rows are used at most `max_staleness` after their version, and the version it waits for is
    published before the trainer needs its first row: by induction the run neither stalls nor breaks the bound."""
    recipe = Recipe(small_run(states={"forward": 0.5, "student": 0.5}, replay={"max_staleness": max_staleness}))
    (plan,) = recipe.plans(1)
    recipe.max_staleness([plan])  # does not refuse
    stream = stream_plan(recipe, Origin.STUDENT, phases=1, start_step=0, max_staleness=max_staleness)
    first, last = (f(Origin.STUDENT, 16) for f in (plan.first_steps, plan.last_steps))
    assert bool((last - stream.versions <= max_staleness).all())
    newest_published_before_first = first // 4 * 4
    assert bool((stream.versions <= newest_published_before_first).all())
    assert stream.needed.tolist() == first.tolist()


def test_another_number_of_workers_never_stalls_a_run_whose_bound_was_accepted():
    """Whichever checkpoint it comes at: every block's weights are there when it is needed, those published at the
    change or later. The bound that does for a whole run does not: blocks begin at other rows."""
    states = {"forward": {"start": 0.5, "end": 0.9}, "student": {"start": 0.5, "end": 0.1}}
    settings = {"states": states, "trainer": {"steps": 400, "num_workers": (1, 2)}}
    whole = Recipe(small_run(**settings, replay={"reuse": 4}))
    smallest = whole.staleness_of(Stretch(2), phases=1, bound=0)
    recipe = Recipe(small_run(**settings, replay={"reuse": 4, "max_staleness": smallest}))
    assert recipe.max_staleness(recipe.plans(1)) == smallest
    bounds = []
    for step in range(8, 400, 8):
        stretch = Stretch(2, step)
        bounds.append(recipe.staleness_of(stretch, phases=1, bound=smallest))
        plan = {"phases": 1, "start_step": step, "max_staleness": bounds[-1], "stretch": stretch}
        stream = stream_plan(recipe, Origin.STUDENT, **plan)
        assert bool((stream.versions <= np.maximum(step, stream.needed // 4 * 4)).all())
    assert min(bounds) == smallest < max(bounds) < 1.5 * smallest


def test_the_bound_is_that_of_the_config_where_it_does():
    recipe = Recipe(small_run(trainer={"num_workers": (1, 2)}))
    assert recipe.staleness_of(Stretch(2, 7), phases=1, bound=100) == 100


def _started(recipe, made, origin):
    """A hub, and an actor's stage in this process that asks it."""
    hub = Hub.remote()
    context = RunContext(
        recipe.config.model_dump(mode="json"),
        hub,
        ray.put(made.data.images.numpy()),
        ray.put(made.data.labels.numpy()),
        prompts=ray.put(made.prompts),
        max_staleness=100,
    )
    incarnation = ray.get(hub.incarnation.remote())
    trainer = Rank0.remote(hub, 0, streams(recipe, len(made.plans)))
    return hub, trainer, StateStage(context, int(origin), incarnation)


@pytest.mark.ray
def test_rollouts_come_from_the_weights_that_were_published(ray_cluster):
    """Fails if syncing is broken: the second block must be that of the second weights, and say so."""
    recipe = Recipe(small_run())
    made = recipe.ingredients()
    hub, trainer, stage = _started(recipe, made, Origin.STUDENT)
    students = [recipe.student_of(made.teacher) for _ in range(2)]
    for parameter in students[1].network.parameters():
        parameter.data.mul_(-0.5)
    ray.get(trainer.publish.remote(0, 0, tensors(students[0])))
    first = StateBatch.from_columns(stage({"place": np.array([0])}))
    ray.get(trainer.publish.remote(0, 12, tensors(students[1])))
    second = StateBatch.from_columns(stage({"place": np.array([1])}))

    assert set(first.version.tolist()) == {0}
    assert set(second.version.tolist()) == {12}
    for block, student, batch in ((0, students[0], first), (1, students[1], second)):
        torch.testing.assert_close(batch.x_t, _expected(recipe, made, student, block))
    ray.kill(trainer)
    ray.kill(hub)


@ray.remote(num_cpus=0)
class _Owner:
    def own(self, value):
        return [ray.put(value)]


def _gone(reference):
    try:
        ray.get(reference)
    except OwnerDiedError:
        return True
    return False


@pytest.mark.ray
def test_weights_that_go_with_their_owner_are_asked_for_again(ray_cluster, monkeypatch):
    """As when the hub dies while an actor fetches them, which is no fault of the stream."""
    monkeypatch.setattr(stages, "_PATIENCE_S", 0.1)
    recipe = Recipe(small_run())
    made = recipe.ingredients()
    hub, trainer, stage = _started(recipe, made, Origin.STUDENT)
    ray.get(trainer.publish.remote(0, 0, tensors(recipe.student_of(made.teacher))))
    owner = _Owner.remote()
    lost = ray.get(owner.own.remote(np.zeros(2**20)))
    ray.kill(owner)
    until(lambda: _gone(*lost))
    take, taken = stage._take, []

    def once(grant, load):
        grant = grant if taken else replace(grant, student=lost)
        taken.append(take(grant, load))
        return taken[-1]

    monkeypatch.setattr(stage, "_take", once)
    states = StateBatch.from_columns(stage({"place": np.array([0])}))
    assert (taken, set(states.version.tolist())) == ([False, True], {0})
    ray.kill(trainer)
    ray.kill(hub)


@pytest.mark.ray
def test_blocks_that_are_kept_count_once_in_the_share_of_wrong_rows(ray_cluster, monkeypatch):
    monkeypatch.setattr(poison, "_BLOCKS", 2)
    recipe = Recipe(
        small_run(
            states={"forward": 0.0, "teacher": 1.0},
            teacher_rollouts={"batch_size": 16, "keep_rows": 64},
            faults={"max_poisoned": 0.04},  # one row of 32
        )
    )
    made = recipe.ingredients()
    hub, trainer, stage = _started(recipe, made, Origin.TEACHER)
    ray.get(trainer.publish.remote(0, 0, tensors(recipe.student_of(made.teacher))))
    make = stage.maker.make

    def wrong(request):
        states = make(request)
        states.x_t[3] = torch.nan
        return states

    monkeypatch.setattr(stage.maker, "make", wrong)
    stage({"place": np.array([0])})
    with pytest.raises(RunFailedError, match=r"6\.25% of the rows of the last 2 blocks"):
        stage({"place": np.array([1])})
    ray.kill(trainer)
    ray.kill(hub)


@pytest.mark.ray
def test_mixed_rollouts_are_made_for_the_progress_of_their_block(ray_cluster):
    """The chance goes from 0 to 1: the first block is the student's alone, the last the teacher's."""
    chance = {"start": 0.0, "end": 1.0}
    recipe = Recipe(small_run(states={"forward": 0.0, "mixed": 1.0, "mixed_teacher_probability": chance}))
    made = recipe.ingredients()
    hub, trainer, stage = _started(recipe, made, Origin.MIXED)
    student = recipe.student_of(made.teacher)
    for parameter in student.network.parameters():
        parameter.data.mul_(-0.5)
    ray.get(trainer.publish.remote(0, 100, tensors(student)))
    plain = SourceContext(
        made.teacher.schedule,
        made.teacher.sample_shape,
        recipe.conditions(made.data),
        student=made.objective.student_denoiser(student.denoiser()),
        teacher=made.expert(),
    )
    asked = list(requests(recipe, Origin.MIXED, made.plans))
    for place, chance in ((0, 0.0), (10, asked[10].progress), (len(asked) - 1, 1.0)):
        batch = StateBatch.from_columns(stage({"place": np.array([place])}))
        fixed = replace(plain, mixing=Mixing(Prior(chance, chance)))
        at_once = StateRequest(Origin.MIXED, 0, place, 16, recipe.config.seed)
        expected = make_states(fixed, made.objective.phases[0], at_once, version=100)
        torch.testing.assert_close(batch.x_t, expected.x_t)
    ray.kill(trainer)
    ray.kill(hub)


def _expected(recipe, made, student, index):
    """The block by its definition: a rollout of `student` from the request's own noise."""
    phase = made.objective.phases[0]
    request = StateRequest(Origin.STUDENT, 0, index, 16, recipe.config.seed)
    generator = request.generator()
    per_row = phase.student_steps
    wanted = phase.law.stratified(16 // per_row, per_row, generator)
    cond, w = recipe.conditions(made.data).draw(16 // per_row, generator)
    noise = torch.randn(16 // per_row, *made.teacher.sample_shape, generator=generator)
    denoiser = made.objective.student_denoiser(student.denoiser())
    policy = Policy(denoiser, made.teacher.schedule, phase.transition)
    x_t = rollout((policy,), noise, stages=phase.stages, wanted=wanted, cond=cond, w=w, generator=generator)
    return x_t.flatten(0, 1)[torch.randperm(16, generator=generator)]
