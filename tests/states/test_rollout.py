"""Pins rollouts: limits of mixing (oracle 21), marginals of visited states (oracle 20), one law of t (trap A)."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ddil_ray.diffusion.schedule import CosineVP, schedule_from_diffusers
from ddil_ray.diffusion.solver import ddim_step, sample
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.states.batch import Origin
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.rollout import Policy, bernoulli, rollout
from ddil_ray.states.source import Conditions, Phase, SourceContext, StateRequest, make_states
from ddil_ray.testing import GaussianDenoiser

SCHEDULE = CosineVP()
TEACHER = GaussianDenoiser(SCHEDULE)
STUDENT = GaussianDenoiser(SCHEDULE, mean=-0.2, std=0.6)
GRID = uniform_grid(4)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _roll(policies, noise, wanted=None, choose=None, stages=GRID, seed=0):
    wanted = stages[:-1].expand(len(noise), -1) if wanted is None else wanted
    w, cond = torch.zeros(len(noise)), torch.zeros(len(noise)).long()
    return rollout(
        policies,
        noise,
        stages=stages,
        wanted=wanted,
        cond=cond,
        w=w,
        generator=_generator(seed),
        choose=choose,
    )


def _trajectory(denoiser, noise, transition="ddim", stages=GRID, seed=0):
    """States at every stage, by the sampler itself."""
    zeros, generator = torch.zeros(len(noise)), _generator(seed)
    states = [noise]
    for now, following in zip(stages[:-2], stages[1:-1], strict=True):
        times = torch.stack([now, following])
        step = sample(
            denoiser, states[-1], times=times, cond=zeros.long(), w=zeros, schedule=SCHEDULE, transition=transition,
            generator=generator,
        )  # fmt: skip
        states.append(step)
    return torch.stack(states, 1)


@pytest.mark.parametrize("transition", ["ddim", "renoise"])
@pytest.mark.parametrize("denoiser", [TEACHER, STUDENT])
def test_a_policy_alone_visits_its_samplers_trajectory_bitwise(transition, denoiser):
    noise = torch.randn(16, 8)
    states = _roll((Policy(denoiser, SCHEDULE, transition),), noise)
    assert torch.equal(states, _trajectory(denoiser, noise, transition))


@pytest.mark.parametrize(("probability", "alone"), [(0.0, STUDENT), (1.0, TEACHER)])
def test_mixing_with_probability_zero_or_one_is_one_policy_bitwise(probability, alone):
    noise = torch.randn(16, 8)
    both = (Policy(STUDENT, SCHEDULE, "ddim"), Policy(TEACHER, SCHEDULE, "ddim"))
    states = _roll(both, noise, choose=bernoulli(probability, _generator(1)))
    assert torch.equal(states, _trajectory(alone, noise))


def test_the_choice_of_policies_reproduces_the_trajectory():
    noise = torch.randn(64, 8)
    masks = torch.rand(4, 64, generator=_generator(5)) < 0.5
    both = (Policy(STUDENT, SCHEDULE, "ddim"), Policy(TEACHER, SCHEDULE, "ddim"))
    states = _roll(both, noise, choose=lambda stage, rows: masks[stage])
    x, zeros = noise, torch.zeros(64)
    for stage in range(3):
        t, s = GRID[stage].expand(64), GRID[stage + 1].expand(64)
        moved = [ddim_step(x, d(x, t, zeros.long(), zeros), t, s, SCHEDULE) for d in (STUDENT, TEACHER)]
        x = torch.where(masks[stage][:, None], moved[1], moved[0])
        torch.testing.assert_close(states[:, stage + 1], x)


def test_the_teachers_share_of_steps_is_its_probability():
    """Binomial(4 x 5,000, .3): a two-sided test at 10^-6."""
    choose = bernoulli(0.3, _generator(2))
    taken = sum(int(choose(stage, 5000).sum()) for stage in range(4))
    assert stats.binomtest(taken, 20_000, 0.3).pvalue > 1e-6


def test_a_state_between_stages_is_a_partial_ddim_step_from_the_stage_above():
    noise = torch.randn(16, 8)
    wanted = torch.full((16, 1), 0.6, dtype=torch.float64)
    got = _roll((Policy(STUDENT, SCHEDULE, "ddim"),), noise, wanted=wanted)
    stages = torch.tensor([1.0, 0.75, 0.6, 0.5], dtype=torch.float64)
    assert torch.equal(got[:, 0], _trajectory(STUDENT, noise, stages=stages)[:, 2])


def test_a_state_between_stages_is_the_estimate_of_the_stage_above_with_new_noise():
    """The noise is recovered and tested for normality; fails by chance once in 10^5."""
    noise, zeros = torch.randn(500, 8), torch.zeros(500)
    wanted = torch.tensor([0.75, 0.6], dtype=torch.float64).expand(500, 2)
    above, between = _roll((Policy(STUDENT, SCHEDULE, "renoise"),), noise, wanted=wanted).unbind(1)
    x_0 = STUDENT(above, wanted[:, 0], zeros.long(), zeros)
    alpha, sigma = (f(wanted[:, 1])[:, None] for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    assert stats.kstest(((between - alpha * x_0) / sigma).flatten(), "norm").pvalue > 1e-5


def test_an_exact_teacher_visits_the_forward_marginals():
    """No covariate shift for an exact policy: re-noised posterior samples of Dirac data are N(alpha x_0, sigma^2).

    20,000 rows: sd of a mean .0069, of a standard deviation .0049; five sd fail once in 10^6.
    """
    schedule = schedule_from_diffusers({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    dirac = Policy(lambda x, *_: torch.full_like(x, 1.3), schedule, "renoise")
    states = _roll((dirac,), torch.randn(20_000, 1), stages=consistency_grid(50, 4))
    for column, t in enumerate(consistency_grid(50, 4)[:-1]):
        visited, u = states[:, column], t[None]
        if column > 0:
            assert abs(float(visited.mean()) - 1.3 * float(schedule.alpha(u))) < 0.035
            assert abs(float(visited.std()) - float(schedule.sigma(u))) < 0.025


def test_visited_states_of_a_gaussian_have_the_moments_of_the_affine_recursion():
    """Oracle 20: D(x) = c + k x gives mean' = a (c + k mean), var' = a^2 k^2 var + s^2. 20,000 x 4 values, 5 sd."""
    states = _roll((Policy(TEACHER, SCHEDULE, "renoise"),), torch.randn(20_000, 4))
    mean, variance = 0.0, 1.0
    for stage in range(3):
        t, s = GRID[stage][None], GRID[stage + 1][None]
        ends = TEACHER(torch.tensor([[0.0], [1.0]], dtype=torch.float64), t.repeat(2), torch.zeros(2), torch.zeros(2))
        c, k = float(ends[0]), float(ends[1] - ends[0])
        alpha, sigma = float(SCHEDULE.alpha(s)), float(SCHEDULE.sigma(s))
        mean, variance = alpha * (c + k * mean), (alpha * k) ** 2 * variance + sigma**2
        visited = states[:, stage + 1]
        assert abs(float(visited.mean()) - mean) < 5 * (variance / 80_000) ** 0.5
        assert abs(float(visited.var()) - variance) < 5 * variance * (2 / 80_000) ** 0.5


def test_pure_noise_is_where_every_rollout_starts():
    noise = torch.randn(16, 8)
    states = _roll((Policy(STUDENT, SCHEDULE, "ddim"),), noise)
    assert torch.equal(states[:, 0], noise)


def _context():
    return SourceContext(
        schedule=SCHEDULE,
        sample_shape=(8,),
        conditions=Conditions(torch.arange(500) % 10, (1.0, 3.0)),
        images=torch.randn(500, 8, generator=_generator(9)),
        student=STUDENT,
        teacher=TEACHER,
    )


def _phase(stages, law):
    return Phase(0, len(stages) - 1, stages, law, "ddim", 2)


@pytest.mark.parametrize("origin", list(Origin))
@pytest.mark.parametrize(("stages", "grid"), [(GRID, GRID), (consistency_grid(50, 4), uniform_grid(50))])
def test_every_source_has_the_same_law_of_t(origin, stages, grid):
    """Trap A. Chi-square over the law's times with 6,000 rows; fails by chance once in 10^5 per case, 8 cases.

    Stratified draws are more even than independent ones, so the test is on the safe side.
    """
    phase = _phase(stages, TimeLaw.over(grid))
    t = torch.cat([make_states(_context(), phase, StateRequest(origin, 0, i, 600, 0), version=7).t for i in range(10)])
    counts = torch.stack([(t == u).sum() for u in phase.law.times])
    assert int(counts.sum()) == 6000
    assert stats.chisquare(counts).pvalue > 1e-5


@pytest.mark.parametrize("origin", list(Origin))
def test_any_part_of_a_block_has_the_law_of_the_whole(origin):
    """Shares of the 4 times among the first quarter of 40 blocks; same odds as above."""
    phase = _phase(GRID, TimeLaw.over(GRID))
    t = torch.cat(
        [make_states(_context(), phase, StateRequest(origin, 0, i, 400, 0), version=7).t[:100] for i in range(40)]
    )
    assert stats.chisquare(torch.stack([(t == u).sum() for u in phase.law.times])).pvalue > 1e-5


@pytest.mark.parametrize("origin", list(Origin))
def test_a_request_makes_the_same_rows_anywhere_and_others_make_others(origin):
    phase = _phase(GRID, TimeLaw.over(GRID))
    make = lambda index: make_states(_context(), phase, StateRequest(origin, 0, index, 30, 5), version=7)  # noqa: E731
    a, b, c = make(3), make(3), make(4)
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.t, b.t)
    assert not torch.equal(a.x_t, c.x_t)
    assert a.x_t.shape == (30, 8)
    assert set(a.version.tolist()) == {7}
    assert bool(((a.w >= 1) & (a.w <= 3)).all())
    assert set(a.cond.tolist()) <= set(range(10))


def test_the_data_is_walked_once_per_epoch():
    phase, context = _phase(GRID, TimeLaw(torch.tensor([1e-9], dtype=torch.float64))), _context()
    requests = [StateRequest(Origin.FORWARD, 0, i, 50, 0) for i in range(20)]
    x = torch.cat([make_states(context, phase, r, version=-1).x_t for r in requests])
    rows = torch.cdist(x, context.images).argmin(1)
    assert sorted(rows[:500].tolist()) == sorted(rows[500:].tolist()) == list(range(500))
    assert rows[:500].tolist() != rows[500:].tolist()
