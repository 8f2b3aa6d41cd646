"""Pins the mixture: exact in expectation, within one row per step, the same for everyone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.errors import StaleStateError
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.prior import ConsumptionPlan, Prior, SourcePriors
from ddil_ray.states.replay import ReplayBuffer

RAMPED = SourcePriors(
    {
        Origin.FORWARD: Prior(1.0, 0.25, "cosine", 0.8),
        Origin.STUDENT: Prior(0.0, 0.5, "cosine", 0.8),
        Origin.TEACHER: Prior(0.0, 0.25, "cosine", 0.8),
    }
)


def _plan(priors=RAMPED, **settings):
    return ConsumptionPlan(priors, **({"steps": 300, "batch_size": 32, "seed": 3} | settings))


@given(progress=st.floats(0, 1))
def test_ramped_priors_sum_to_one_all_along(progress):
    assert sum(RAMPED.at(progress).values()) == pytest.approx(1)


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    batch=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_every_batch_is_full_and_within_one_row_of_its_shares(shares, batch, seed):
    total = sum(shares)
    priors = SourcePriors({Origin(i): Prior(p / total, p / total) for i, p in enumerate(shares)})
    plan = _plan(priors, steps=20, batch_size=batch, seed=seed)
    for step in range(20):
        counts = plan.counts(step)
        assert sum(counts.values()) == batch
        for origin, count in counts.items():
            assert abs(count - batch * priors.at(0)[origin]) < 1 + 1e-6


def test_the_mean_mixture_is_the_prior():
    """Systematic sampling: each count has variance <= 1/4, so the mean of 4,000 has sd <= .008; 6 sd fail 1 in 10^9."""
    priors = SourcePriors.constant(forward=0.37, student=0.41, teacher=0.22)
    plan = _plan(priors, steps=4000, batch_size=5)
    for origin, share in priors.at(0).items():
        mean = np.mean([plan.counts(n)[origin] for n in range(4000)])
        assert mean == pytest.approx(5 * share, abs=0.048)


def test_the_mixture_follows_its_ramp():
    plan = _plan()
    student = [plan.counts(n)[Origin.STUDENT] for n in range(300)]
    assert student[0] == 0
    assert set(student[-30:]) == {16}
    assert plan.counts(0)[Origin.FORWARD] == 32


def test_the_plan_is_a_function_of_seed_phase_and_step_only():
    a, b, other = _plan(), _plan(), _plan(seed=4)
    assert [a.counts(n) for n in range(300)] == [b.counts(n) for n in range(300)]
    assert [a.counts(n) for n in range(300)] != [other.counts(n) for n in range(300)]


def test_one_and_two_workers_see_the_same_mixture():
    """Two ranks of half the batch draw the same counts, within a row of half the single worker's."""
    one, half = _plan(batch_size=32), _plan(batch_size=16)
    for n in range(300):
        for origin in one.origins:
            assert abs(2 * half.counts(n)[origin] - one.counts(n)[origin]) <= 2


@given(reuse=st.integers(1, 5), rows=st.integers(1, 100))
def test_fresh_rows_always_cover_what_is_trained_on(reuse, rows):
    plan = _plan(steps=60, reuse=reuse)
    for origin in plan.origins:
        counts = np.array([plan.counts(n)[origin] for n in range(60)])
        fresh = plan.fresh(origin)
        assert bool((np.diff(fresh) >= 0).all())
        assert bool((fresh * reuse >= np.cumsum(counts)).all())
        assert bool((fresh >= counts).all())
        if reuse == 1:
            assert fresh.tolist() == np.cumsum(counts).tolist()
        steps = (f(origin, rows).tolist() for f in (plan.first_steps, plan.last_steps, plan.progress))
        for block, (first, last, progress) in enumerate(zip(*steps, strict=True)):
            assert first <= last < 60
            assert fresh[first] > block * rows
            assert first == 0 or fresh[first - 1] <= block * rows
            taken = min((block + 1) * rows, fresh[-1])
            assert fresh[last] >= taken
            assert reuse > 1 or last == 0 or fresh[last - 1] < taken
            assert progress == first / 59
        assert block == plan.blocks(origin, rows) - 1


def test_smallest_staleness_is_a_blocks_span_and_a_publication():
    plan = _plan(SourcePriors.constant(student=1.0), steps=40, batch_size=8)
    assert plan.smallest_staleness(Origin.STUDENT, rows=32, sync_every=5) == 3 + 5


@pytest.mark.parametrize(("over", "longest"), [(0.5, 150), (0.05, 60)])
def test_a_source_that_ends_early_needs_no_bound_that_lasts_to_the_end(over, longest):
    """Its last block lasts while the ramp does: d steps before the end of a ramp of L steps, 64 d^2 / 2L rows are
    left, so the last 128 rows last 2 sqrt(L) steps."""
    priors = SourcePriors({Origin.FORWARD: Prior(0.5, 1.0, over=over), Origin.STUDENT: Prior(0.5, 0.0, over=over)})
    plan = _plan(priors, steps=10_000, batch_size=128, seed=0)
    assert 20 < plan.smallest_staleness(Origin.STUDENT, rows=128, sync_every=20) <= longest + 20


def _block(index, rows, version):
    nothing, number = torch.zeros(rows, 0), torch.zeros(rows, dtype=torch.int64)
    return StateBatch(
        x_t=nothing,
        t=number.double(),
        cond=number + index,
        w=number.float(),
        origin=number.to(torch.int8) + 1,
        version=number + version,
        phase=number,
        label=nothing,
    )


@given(
    start=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    end=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    over=st.sampled_from([0.2, 0.5, 1.0]),
    reuse=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 60),
    batch=st.integers(1, 24),
    every=st.integers(1, 8),
    begin=st.sampled_from([0, 25]),
)
def test_no_row_is_drawn_beyond_the_smallest_bound_though_blocks_are_as_old_as_they_may_be(
    start, end, over, reuse, rows, batch, every, begin
):
    """As the trainer takes and draws them. Every row is used by its block's last step where there is no reuse; where
    there is, rows of the newest block are never too old, and the buffer drops older blocks' rows that are."""
    priors = SourcePriors(
        {Origin.FORWARD: Prior(1 - start, 1 - end, over=over), Origin.STUDENT: Prior(start, end, over=over)}
    )
    plan = _plan(priors, steps=80, batch_size=batch, reuse=reuse, begin=begin)
    if start == end == 0:
        assert plan.origins == [Origin.FORWARD]
        return
    bound = plan.smallest_staleness(Origin.STUDENT, rows=rows, sync_every=every)
    first, last, fresh = (
        f.tolist()
        for f in (
            plan.first_steps(Origin.STUDENT, rows),
            plan.last_steps(Origin.STUDENT, rows),
            plan.fresh(Origin.STUDENT),
        )
    )
    unbounded, bounded = (ReplayBuffer(capacity=10**6, reuse=reuse, max_staleness=most) for most in (None, bound))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    taken = last_draw = 0
    for step in range(begin, 80):
        while taken * rows < fresh[step]:
            version = max(begin, last[taken] - bound)
            assert first[taken] == step
            assert version <= max(begin, step // every * every)  # it is published: nothing stalls
            for buffer in (unbounded, bounded):
                buffer.add(_block(taken, rows, version))
            taken += 1
        count = plan.counts(step)[Origin.STUDENT]
        if count == 0:
            continue
        last_draw = step
        drawn = unbounded.draw(count, step=step, generator=generators[0])
        of_newest = drawn.cond == taken - 1
        assert bool((step - drawn.version[of_newest] <= bound).all())
        assert step <= last[taken - 1]
        if reuse == 1:
            assert bool((step - drawn.version <= bound).all())
        try:
            assert bool((step - bounded.draw(count, step=step, generator=generators[1]).version <= bound).all())
        except StaleStateError:  # rows that expired had uses left, and those of the newest block are all used
            assert reuse > 1
            return
    assert bounded.expired == 0 or reuse > 1
    assert max(last, default=0) <= last_draw
