"""Pins what a whole run is said to need and deliver, on simulated teachers whose passes are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runs import small_run

from ddil_ray.capacity.costs import declared
from ddil_ray.capacity.plan import capacity, resized, split_of
from ddil_ray.capacity.sources import sources_of
from ddil_ray.simulation import MODELS
from ddil_ray.states.batch import Origin
from ddil_ray.training.recipe import Recipe

SD15 = MODELS["sd15"].times
UPDATE = SD15.forward + SD15.backward + SD15.inference
"""Of consistency distillation, per row."""


def run(**changes):
    """(recipe, ingredients, costs) of two workers on 16 rows a step, forward and student states in equal shares."""
    settings = {
        "teacher": {"model": "ddil_ray.simulation:sd15", "guidance": 1.0},
        "data": {"source": "ddil_ray.simulation:sd15_latents"},
        "objective": {"type": "lcm", "student_steps": 4},
        "trainer": {"steps": 400, "batch_size": 16, "num_workers": 2},
        "forward_states": {"batch_size": 4, "num_gpus": 1},
        "student_rollouts": {"batch_size": 4, "num_gpus": 1},
        "labels": {"batch_size": 4},
        "sync": {"every": 4},
    }
    recipe = Recipe(small_run(**{**settings, **changes}))
    made = recipe.ingredients()
    return recipe, made, declared(recipe, made)


def slowed(found, origin, by):
    """`found` of `run` with states and labels of `origin` that take `by` times as long."""
    recipe, made, costs = found
    phases = tuple(
        replace(
            phase,
            state_s={**phase.state_s, origin: phase.state_s[origin] * by},
            label_s={**phase.label_s, origin: phase.label_s[origin] * by},
        )
        for phase in costs.phases
    )
    return recipe, made, replace(costs, phases=phases)


def test_roles_need_what_their_passes_take():
    """Half of 16 rows per update of 8 rows: a guided label each, and a student's pass more for rollouts."""
    found = capacity(*run())
    forward, student = found.roles
    per_update = 8 / (8 * UPDATE)
    assert found.update_s == pytest.approx(8 * UPDATE)
    assert forward.needed == pytest.approx(2 * SD15.inference * per_update, rel=0.01)
    assert student.needed == pytest.approx(3 * SD15.inference * per_update, rel=0.01)
    assert (forward.recommended, student.recommended) == (1, 1)
    assert student.utilisation == pytest.approx(student.needed)
    assert found.stall < 0.01
    assert found.phases[0].limit == "trainer"
    assert found.rows_per_s == pytest.approx(16 / (8 * UPDATE), rel=0.01)


def test_a_role_that_is_too_small_limits_the_run_and_is_named():
    """Four times the work of a label makes one actor of forward states the limit."""
    found = capacity(*slowed(run(), Origin.FORWARD, 4.0))
    forward = found.roles[0]
    assert forward.needed > 1 == forward.actors
    assert forward.recommended == 2
    assert found.phases[0].limit == "forward_states"
    assert found.rows_per_s == pytest.approx(found.ideal_rows_per_s / forward.needed, rel=0.03)
    assert found.stall == pytest.approx(1 - 1 / forward.needed, abs=0.02)


def test_weights_that_must_be_young_are_named_where_they_hold_the_run_up():
    """Rollouts as long as several updates, of weights at most four steps old: actors wait for weights, not for work."""
    young = run(sync={"every": 1}, replay={"max_staleness": 4}, student_rollouts={"batch_size": 4, "num_actors": 32})
    found = capacity(*slowed(young, Origin.STUDENT, 24.0))
    assert found.roles[1].utilisation < 0.5
    assert found.stall > 0.2
    assert "max_staleness" in found.phases[0].limit


def test_kept_teacher_rollouts_cost_nothing_when_they_come_again():
    """One actor of three times the work it can do limits the run until what is kept is there."""
    teacher = {"batch_size": 4, "num_gpus": 1}
    states = {"forward": 0.5, "teacher": 0.5}
    always, kept = (
        capacity(*slowed(run(states=states, teacher_rollouts={**teacher, **more}), Origin.TEACHER, 3.0))
        for more in ({}, {"keep_rows": 64})
    )
    assert always.stall > 0.3
    assert kept.stall < 0.05
    assert kept.roles == always.roles  # until then as many are needed


def test_reuse_lowers_what_roles_need():
    once, often = capacity(*run()), capacity(*run(replay={"reuse": 4}))
    for before, after in zip(once.roles, often.roles, strict=True):
        assert after.needed == pytest.approx(before.needed / 4, rel=0.02)
    assert often.traffic["worker_in"] == pytest.approx(once.traffic["worker_in"] / 4, rel=0.05)


def test_labels_of_a_pool_are_a_role_of_their_own():
    found = capacity(*run(labels={"placement": "pool", "batch_size": 4, "num_gpus": 1}))
    roles = {role.role: role for role in found.roles}
    assert roles["labels"].pools == 2
    assert roles["forward_states"].needed == 0.0
    assert roles["labels"].block_s == pytest.approx(4 * 2 * SD15.inference)


def test_a_ramp_is_sized_for_its_height():
    ramp = {"forward": {"start": 1.0, "end": 0.0}, "student": {"start": 0.0, "end": 1.0}}
    forward, student = capacity(*run(states=ramp)).roles
    constant_forward, constant_student = capacity(*run()).roles
    assert forward.needed == pytest.approx(2 * constant_forward.needed, rel=0.02)
    assert student.needed == pytest.approx(2 * constant_student.needed, rel=0.02)


def test_traffic_is_rows_and_weights_over_time():
    recipe, made, costs = run()
    found = capacity(recipe, made, costs)
    assert found.traffic["worker_in"] == pytest.approx(8 * costs.row_bytes / found.step_s, rel=0.02)
    assert found.traffic["node_in"] == pytest.approx(costs.weight_bytes / (4 * found.step_s))
    assert found.traffic["states"] == 2 * (1 + 4 * 2) * 4 * costs.row_bytes  # two sources: an actor, four per worker


def test_a_split_of_gpus_is_a_run_that_can_be_started():
    """Per row 34 ms of a worker, 6.4 of forward and 9.6 of student actors, and workers divide the batch of 16.

    Of ten GPUs four work, at 117 rows/s: one forward actor feeds 156 and two student actors feed 208.
    """
    recipe, made, costs = run()
    split = split_of(recipe, made, costs, gpus=10)
    assert split.workers == 4
    assert split.actors == {"forward_states": 1, "student_rollouts": 2}
    other = capacity(*resized(recipe, made, costs, split))
    assert other.workers == 4
    assert other.rows_per_s == pytest.approx(split.rows_per_s, rel=0.02)
    assert split_of(recipe, made, costs, gpus=2) is None


def test_actors_without_gpus_do_not_take_from_a_split():
    recipe, made, costs = run(forward_states={"batch_size": 4, "num_gpus": 0})
    split = split_of(recipe, made, costs, gpus=10)
    assert split.workers == 8
    assert split.actors == {"student_rollouts": 2, "forward_states": 2}


def test_a_split_without_actors_on_gpus_is_of_workers_alone():
    none = {"batch_size": 4, "num_gpus": 0}
    recipe, made, costs = run(forward_states=none, student_rollouts=none)
    split = split_of(recipe, made, costs, gpus=8)
    assert split.workers == 8
    assert split.actors == {"forward_states": 2, "student_rollouts": 3}


def test_kept_blocks_are_shared_by_all_workers_as_the_others_are():
    """38 kept rows are 10 blocks, which 2 workers take 5 of each; later ones cost nothing."""
    for workers in (2, (1, 2)):
        states, trainer = {"forward": 0.5, "teacher": 0.5}, {"num_workers": workers}
        settings = {"steps": 400, "batch_size": 16, **trainer}
        recipe, made, costs = run(
            states=states, trainer=settings, teacher_rollouts={"batch_size": 4, "keep_rows": 38, "num_gpus": 1}
        )
        teacher = next(s for s in sources_of(recipe, made, costs, 0) if s.origin is Origin.TEACHER)
        assert (teacher.block_s > 0).sum() == 5
