"""Pins that a run which goes on with other numbers of workers keeps its mixture, and uses no block twice."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.states.batch import Origin
from ddil_ray.states.prior import ConsumptionPlan, Prior, SourcePriors
from ddil_ray.states.stretch import Stretch

STEPS, PHASES, BATCH, ROWS = 30, 2, 24, 8
PRIORS = SourcePriors({Origin.FORWARD: Prior(0.8, 0.3), Origin.STUDENT: Prior(0.2, 0.7)})

changes = st.lists(st.tuples(st.integers(1, STEPS * PHASES - 1), st.sampled_from([1, 2, 3, 4])), max_size=4)


def plan_of(stretch, phase, reuse):
    return ConsumptionPlan(
        PRIORS, steps=STEPS, batch_size=BATCH // stretch.workers, seed=3, phase=phase, reuse=reuse,
        begin=stretch.begin(phase, STEPS),
    )  # fmt: skip


def run(changes, reuse):
    """By stretch (stretch, its end); changes to the same number of workers change nothing."""
    stretches, now = [], Stretch(2)
    for step, workers in sorted(changes):
        follower = now.followed_by(
            workers, plan_of(now, step // STEPS, reuse), step=step, rows=dict.fromkeys(Origin, ROWS)
        )
        if follower is not now:
            stretches.append((now, step))
            now = follower
    return [*stretches, (now, STEPS * PHASES)]


def blocks(stretch, end, origin, reuse):
    """(phase, index) of every block that any worker takes of `origin` before global step `end`."""
    for phase in range(stretch.step // STEPS, -(-end // STEPS)):
        plan, whole = plan_of(stretch, phase, reuse), end >= (phase + 1) * STEPS
        taken = plan.blocks(origin, ROWS) if whole else stretch.taken(plan, origin, step=end, rows=ROWS)
        first = stretch.used_in(phase, STEPS, origin)
        yield from ((phase, first + index) for index in range(taken * stretch.workers))


@given(changes=changes, reuse=st.integers(1, 3))
def test_no_block_is_used_twice_and_none_is_left_out(changes, reuse):
    stretches = run(changes, reuse)
    for origin in PRIORS.origins:
        used = [block for stretch, end in stretches for block in blocks(stretch, end, origin, reuse)]
        assert len(used) == len(set(used))
        for phase in range(PHASES):
            of_phase = sorted(index for p, index in used if p == phase)
            assert of_phase == list(range(len(of_phase)))


@given(changes=changes, reuse=st.integers(1, 3))
def test_every_step_has_its_batch_by_the_priors_whoever_does_it(changes, reuse):
    """Of every source a worker has its expected rows, rounded down or up; and enough fresh ones, counted from empty."""
    for stretch, end in run(changes, reuse):
        for step in range(stretch.step, end):
            phase, local = divmod(step, STEPS)
            plan = plan_of(stretch, phase, reuse)
            counts = plan.counts(local)
            assert sum(counts.values()) * stretch.workers == BATCH
            for origin, share in PRIORS.at(local / (STEPS - 1)).items():
                assert abs(counts[origin] - share * BATCH / stretch.workers) < 1
                since = [plan.counts(n)[origin] for n in range(stretch.begin(phase, STEPS), local + 1)]
                assert plan.fresh(origin)[local] >= max(counts[origin], -(-sum(since) // reuse))


@given(changes=changes, reuse=st.integers(1, 3), step=st.integers(0, STEPS * PHASES - 1))
def test_a_run_that_goes_on_with_as_many_workers_is_the_same_stretch(changes, reuse, step):
    stretch, _ = run(changes, reuse)[-1]
    plan = plan_of(stretch, step // STEPS, reuse)
    assert stretch.followed_by(stretch.workers, plan, step=step, rows=dict.fromkeys(Origin, ROWS)) is stretch
    assert Stretch.from_state_dict(stretch.state_dict()) == stretch


def test_nothing_is_taken_before_a_plan_begins():
    plan = plan_of(Stretch(2, 10), 0, 1)
    assert all(not plan.fresh(origin)[:10].any() for origin in PRIORS.origins)
    later = plan_of(Stretch(2, 10), 1, 1)
    whole = plan_of(Stretch(2), 1, 1)
    assert all(np.array_equal(later.fresh(o), whole.fresh(o)) for o in PRIORS.origins)
