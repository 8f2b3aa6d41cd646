"""Pins rollouts: the sampler's own states, marginals of visited states (oracle 20), one law of t (trap A)."""

from __future__ import annotations

import pytest
import torch
from rolls import GRID, SCHEDULE, STUDENT, TEACHER, context, phase, roll, seeded, trajectory
from scipy import stats

from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.states.batch import Origin
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.rollout import Policy
from ddil_ray.states.source import Conditions, StateRequest, make_states


@pytest.mark.parametrize("transition", ["ddim", "renoise"])
@pytest.mark.parametrize("denoiser", [TEACHER, STUDENT])
def test_a_policy_alone_visits_its_samplers_trajectory_bitwise(transition, denoiser):
    noise = torch.randn(16, 8)
    states = roll((Policy(denoiser, SCHEDULE, transition),), noise)
    assert torch.equal(states, trajectory(denoiser, noise, transition=transition))


def test_a_state_between_stages_is_a_partial_ddim_step_from_the_stage_above():
    noise = torch.randn(16, 8)
    wanted = torch.full((16, 1), 0.6, dtype=torch.float64)
    got = roll((Policy(STUDENT, SCHEDULE, "ddim"),), noise, wanted=wanted)
    stages = torch.tensor([1.0, 0.75, 0.6, 0.5], dtype=torch.float64)
    assert torch.equal(got[:, 0], trajectory(STUDENT, noise, stages=stages)[:, 2])


def test_a_state_between_stages_is_the_estimate_of_the_stage_above_with_new_noise():
    """The noise is recovered and tested for normality; fails by chance once in 10^5."""
    noise, zeros = torch.randn(500, 8), torch.zeros(500)
    wanted = torch.tensor([0.75, 0.6], dtype=torch.float64).expand(500, 2)
    above, between = roll((Policy(STUDENT, SCHEDULE, "renoise"),), noise, wanted=wanted).unbind(1)
    x_0 = STUDENT(above, wanted[:, 0], zeros.long(), zeros)
    alpha, sigma = (f(wanted[:, 1])[:, None] for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    assert stats.kstest(((between - alpha * x_0) / sigma).flatten(), "norm").pvalue > 1e-5


def test_an_exact_teacher_visits_the_forward_marginals():
    """No covariate shift for an exact policy: re-noised posterior samples of Dirac data are N(alpha x_0, sigma^2).

    20,000 rows: sd of a mean .0069, of a standard deviation .0049; five sd fail once in 10^6.
    """
    schedule = schedule_from_diffusers({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    dirac = Policy(lambda x, *_: torch.full_like(x, 1.3), schedule, "renoise")
    states = roll((dirac,), torch.randn(20_000, 1), stages=consistency_grid(50, 4))
    for column, t in enumerate(consistency_grid(50, 4)[:-1]):
        visited, u = states[:, column], t[None]
        if column > 0:
            assert abs(float(visited.mean()) - 1.3 * float(schedule.alpha(u))) < 0.035
            assert abs(float(visited.std()) - float(schedule.sigma(u))) < 0.025


def test_visited_states_of_a_gaussian_have_the_moments_of_the_affine_recursion():
    """Oracle 20: D(x) = c + k x gives mean' = a (c + k mean), var' = a^2 k^2 var + s^2, cov(x', x) = a k var.

    80,000 values, 5 sd; a covariance has variance (var var' + cov^2) / n.
    """
    states = roll((Policy(TEACHER, SCHEDULE, "renoise"),), torch.randn(20_000, 4, generator=seeded(1)))
    mean, variance = 0.0, 1.0
    for stage in range(3):
        t, s = GRID[stage][None], GRID[stage + 1][None]
        ends = TEACHER(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t.repeat(2), torch.zeros(2), torch.zeros(2))
        c, k = float(ends[0]), float(ends[1] - ends[0])
        alpha, sigma = float(SCHEDULE.alpha(s)), float(SCHEDULE.sigma(s))
        mean, covariance = alpha * (c + k * mean), alpha * k * variance
        before, variance = variance, (alpha * k) ** 2 * variance + sigma**2
        visited = states[:, stage + 1]
        seen = float(torch.cov(torch.stack([states[:, stage].flatten(), visited.flatten()]))[0, 1])
        assert abs(seen - covariance) < 5 * ((before * variance + covariance**2) / 80_000) ** 0.5
        assert abs(float(visited.mean()) - mean) < 5 * (variance / 80_000) ** 0.5
        assert abs(float(visited.var()) - variance) < 5 * variance * (2 / 80_000) ** 0.5


def test_pure_noise_is_where_every_rollout_starts():
    noise = torch.randn(16, 8)
    states = roll((Policy(STUDENT, SCHEDULE, "ddim"),), noise)
    assert torch.equal(states[:, 0], noise)


@pytest.mark.parametrize("origin", list(Origin))
def test_rollout_states_at_the_top_know_nothing_of_the_data_unlike_forward_ones(origin):
    """Oracle 20, against the image of each row's class. 4,000 x 8 values: sd .0056; five sd fail once in 10^6.

    Stable Diffusion's schedule leaves alpha(1) = .068 of the image in a forward state, here .2 sd of it.
    """
    schedule = schedule_from_diffusers({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    images = 3 * torch.randn(10, 8, generator=seeded(3))
    data = context(schedule=schedule, images=images, conditions=Conditions(torch.arange(10), (0.0, 0.0)))
    top = phase(law=TimeLaw(torch.ones(1, dtype=torch.float64)))
    states = make_states(data, top, StateRequest(origin, 0, 0, 4000, 0), version=0)
    seen = float(torch.corrcoef(torch.stack([states.x_t.flatten(), images[states.cond].flatten()]))[0, 1])
    assert seen > 0.1 if origin == Origin.FORWARD else abs(seen) < 0.028


@pytest.mark.parametrize("origin", list(Origin))
@pytest.mark.parametrize(("stages", "grid"), [(GRID, GRID), (consistency_grid(50, 4), uniform_grid(50))])
def test_every_source_has_the_same_law_of_t(origin, stages, grid):
    """Trap A. Chi-square over the law's times with 6,000 rows; fails by chance once in 10^5 per case, 8 cases.

    Stratified draws are more even than independent ones, so the test is on the safe side.
    """
    where = phase(stages, TimeLaw.over(grid))
    t = torch.cat([make_states(context(), where, StateRequest(origin, 0, i, 600, 0), version=7).t for i in range(10)])
    counts = torch.stack([(t == u).sum() for u in where.law.times])
    assert int(counts.sum()) == 6000
    assert stats.chisquare(counts).pvalue > 1e-5


@pytest.mark.parametrize("origin", list(Origin))
def test_any_part_of_a_block_has_the_law_of_the_whole(origin):
    """Shares of the 4 times among the first quarter of 40 blocks; same odds as above."""
    where = phase()
    t = torch.cat(
        [make_states(context(), where, StateRequest(origin, 0, i, 400, 0), version=7).t[:100] for i in range(40)]
    )
    assert stats.chisquare(torch.stack([(t == u).sum() for u in where.law.times])).pvalue > 1e-5


@pytest.mark.parametrize("origin", list(Origin))
def test_a_request_makes_the_same_rows_anywhere_and_others_make_others(origin):
    where = phase()
    make = lambda index: make_states(context(), where, StateRequest(origin, 0, index, 30, 5), version=7)  # noqa: E731
    a, b, c = make(3), make(3), make(4)
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.t, b.t)
    assert not torch.equal(a.x_t, c.x_t)
    assert a.x_t.shape == (30, 8)
    assert set(a.version.tolist()) == {7}
    assert bool(((a.w >= 1) & (a.w <= 3)).all())
    assert set(a.cond.tolist()) <= set(range(10))


def test_the_data_is_walked_once_per_epoch():
    where, data = phase(law=TimeLaw(torch.tensor([1e-9], dtype=torch.float64))), context()
    requests = [StateRequest(Origin.FORWARD, 0, i, 50, 0) for i in range(20)]
    x = torch.cat([make_states(data, where, r, version=-1).x_t for r in requests])
    rows = torch.cdist(x, data.images).argmin(1)
    assert sorted(rows[:500].tolist()) == sorted(rows[500:].tolist()) == list(range(500))
    assert rows[:500].tolist() != rows[500:].tolist()


def test_each_phase_walks_the_data_in_an_order_of_its_own():
    """A phase may take fewer rows than there are: all phases would see the same ones."""
    where, data = phase(law=TimeLaw(torch.tensor([1e-9], dtype=torch.float64))), context()
    rows = [
        torch.cdist(make_states(data, where, request, version=-1).x_t, data.images).argmin(1).tolist()
        for request in (StateRequest(Origin.FORWARD, number, 0, 200, 0) for number in range(3))
    ]
    assert all(len(set(taken)) == 200 for taken in rows)
    assert len(set().union(*rows)) > 350  # 392 are expected
