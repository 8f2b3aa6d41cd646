"""Pins mixed rollouts (oracle 21): their limits, their chances, who steps when, and the teacher taking over."""

from __future__ import annotations

import itertools

import pytest
import torch
from rolls import GRID, SCHEDULE, STUDENT, TEACHER, context, phase, roll, seeded, trajectory
from scipy import stats

from ddil_ray.diffusion.solver import TRANSITIONS
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.states.batch import Origin
from ddil_ray.states.mixing import Mixing, bernoulli, takeover
from ddil_ray.states.prior import Prior
from ddil_ray.states.rollout import Policy
from ddil_ray.states.source import StateRequest, make_states
from ddil_ray.testing import GaussianDenoiser

SEGMENTS = [1, 2, 3, None]
EXPERT = Policy(TEACHER, SCHEDULE, "ddim")
NEAR = GaussianDenoiser(SCHEDULE, mean=0.6, std=0.6)  # a student whose rows stray from TEACHER at different stages


def _pupil(denoiser=STUDENT, transition="ddim"):
    return Policy(denoiser, SCHEDULE, transition)


def _rule(probability=0.5, *, segment=1, bound=None, generator=None):
    return Mixing(Prior(probability, probability), segment, bound).rule(0.0, generator or seeded(1))


def _watched(rule):
    """`rule`, and the list that its choices go to."""
    masks = []

    def choose(visit):
        masks.append(rule(visit).clone())
        return masks[-1]

    return choose, masks


def _masks(rule, noise, *, student=NEAR, stages=GRID, cond=None):
    """(stages, rows) who steps, by `rule`, and the (rows, stages, ...) states that it leads to."""
    choose, masks = _watched(rule)
    states = roll((_pupil(student), EXPERT), noise, choose=choose, stages=stages, cond=cond)
    return torch.stack(masks), states


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("transition", ["ddim", "renoise"])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_with_probability_zero_or_one_it_is_the_students_sampler_or_the_teachers_ddim_bitwise(
    probability, transition, segment
):
    noise = torch.randn(16, 8)
    states = roll((_pupil(transition=transition), EXPERT), noise, choose=_rule(probability, segment=segment))
    alone = trajectory(TEACHER, noise) if probability else trajectory(STUDENT, noise, transition=transition)
    assert torch.equal(states, alone)


@pytest.mark.parametrize("transition", ["ddim", "renoise"])
def test_draws_of_every_step_are_the_plain_recurrence_bitwise(transition):
    """Written out: a coin per row, the student's rows move, the teacher's rows move, all from one generator."""
    noise, cond, w = torch.randn(64, 8), torch.zeros(64).long(), torch.zeros(64)
    shared = seeded(4)
    both = (_pupil(transition=transition), EXPERT)
    states = roll(both, noise, choose=_rule(0.3, generator=shared), generator=shared)
    generator, x = seeded(4), noise
    for stage, (now, following) in enumerate(itertools.pairwise(GRID[:-1])):
        coin = torch.rand(64, generator=generator) < 0.3
        x, before = x.clone(), x
        for denoiser, how, rows in ((STUDENT, transition, ~coin), (TEACHER, "ddim", coin)):
            t, s = now.expand(int(rows.sum())), following.expand(int(rows.sum()))
            x_0 = denoiser(before[rows], t, cond[rows], w[rows])
            x[rows] = TRANSITIONS[how](before[rows], x_0, t, s, SCHEDULE, generator)
        assert torch.equal(states[:, stage + 1], x)


@pytest.mark.parametrize(("segment", "draws"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (4, [0, 4]), (None, [0])])
def test_a_draw_holds_for_its_segment_and_draws_are_independent_coins(segment, draws):
    """All 2^draws outcomes of 8,000 rows against their chances: fixed seed, chi-square p > 10^-3."""
    masks, _ = _masks(_rule(0.3, segment=segment), torch.randn(8000, 1), stages=uniform_grid(6))
    assert len(masks) == 5
    for stage in range(5):
        assert torch.equal(masks[stage], masks[max(d for d in draws if d <= stage)])
    outcomes = (masks[draws].long() * 2 ** torch.arange(len(draws))[:, None]).sum(0)
    seen = torch.bincount(outcomes, minlength=2 ** len(draws))
    ones = torch.tensor([bin(n).count("1") for n in range(2 ** len(draws))])
    chances = 0.3 ** ones.double() * 0.7 ** (len(draws) - ones).double()
    assert stats.chisquare(seen, 8000 * chances).pvalue > 1e-3


@pytest.mark.parametrize("settings", [{}, {"segment": 2}, {"segment": None}, {"bound": 0.14}])
def test_the_seed_alone_says_who_steps_and_who_steps_says_where_it_leads(settings):
    noise = torch.randn(64, 8)
    (masks, states), (again, same) = (_masks(_rule(**settings), noise) for _ in range(2))
    assert torch.equal(masks, again)
    assert torch.equal(states, same)
    assert bool(masks.any())
    assert not bool(masks.all())
    other, _ = _masks(_rule(**settings, generator=seeded(2)), noise)
    assert not torch.equal(masks, other)
    _, replayed = _masks(lambda visit: masks[visit.stage], noise)
    assert torch.equal(states, replayed)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)])
def test_the_chance_follows_its_ramp(progress, share):
    """Binomial(3 x 4,000) at a fixed seed; certain at both ends."""
    rule = Mixing(Prior(0.0, 1.0, "linear", over=0.5)).rule(progress, seeded(1))
    masks, _ = _masks(rule, torch.randn(4000, 1))
    assert stats.binomtest(int(masks.sum()), masks.numel(), share).pvalue > 1e-3


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize(("progress", "alone"), [(0.0, _pupil()), (1.0, Policy(TEACHER, SCHEDULE, "ddim", substeps=2))])
def test_a_ramp_from_zero_to_one_gives_student_states_first_and_teacher_states_last(progress, alone, segment):
    data, where = context(mixing=Mixing(Prior(0.0, 1.0), segment)), phase()
    request = StateRequest(Origin.MIXED, 0, 3, 32, 7, progress)
    generator = request.generator()
    wanted = where.law.stratified(8, 4, generator)
    cond, _ = data.conditions.draw(8, generator)
    noise = torch.randn(8, 8, generator=generator)
    expected = roll((alone,), noise, wanted=wanted, cond=cond).flatten(0, 1)
    made = make_states(data, where, request, version=0).x_t
    assert torch.equal(*(rows[rows[:, 0].argsort()] for rows in (made, expected)))  # a block's order is shuffled


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("transition", ["ddim", "renoise"])
def test_a_takeover_beyond_reach_changes_nothing_bitwise(transition, segment):
    noise, both = torch.randn(64, 8), (_pupil(transition=transition), EXPERT)
    shared = [seeded(4), seeded(4)]
    plain, bounded = (
        roll(both, noise, choose=_rule(segment=segment, bound=bound, generator=g), generator=g)
        for bound, g in zip((None, 1e9), shared, strict=True)
    )
    assert torch.equal(plain, bounded)


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_a_takeover_at_any_difference_is_the_teachers_trajectory_bitwise(probability, segment):
    noise = torch.randn(64, 8)
    states = roll((_pupil(), EXPERT), noise, choose=_rule(probability, segment=segment, bound=1e-9))
    assert torch.equal(states, trajectory(TEACHER, noise))


def _biased_below(t_first, bias):
    """The teacher, but for rows of condition 1 off by `bias` from time `t_first` on."""

    def denoiser(x_t, t, cond, w):
        off = torch.where((t <= t_first) & (cond == 1), bias, 0.0)
        return TEACHER(x_t, t, cond, w) + off[:, None]

    return denoiser


@pytest.mark.parametrize("bias", [0.3, float("nan")])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_a_student_that_strays_from_a_known_stage_is_taken_over_exactly_there(first, bias):
    """RMS of the planted bias is .3 for half of the rows and 0 for the others; the bound is .2."""
    noise, cond, stages = torch.randn(64, 8), torch.arange(64) % 2, uniform_grid(6)
    student = _biased_below(float(stages[first]), bias)
    masks, states = _masks(_rule(0.0, bound=0.2), noise, student=student, stages=stages, cond=cond)
    expected = (torch.arange(5)[:, None] >= first) & (cond == 1)
    assert torch.equal(masks, expected)
    assert torch.equal(states, trajectory(TEACHER, noise, stages=stages))  # not one biased step was made


def test_a_row_that_strayed_stays_the_teachers_whatever_is_drawn_later():
    noise, cond, stages = torch.randn(400, 8), torch.ones(400).long(), uniform_grid(6)
    student = _biased_below(float(stages[2]), 0.3)
    drawn, _ = _masks(_rule(0.5), noise, stages=stages)
    masks, _ = _masks(_rule(0.5, bound=0.2), noise, student=student, stages=stages, cond=cond)
    strayed = (torch.arange(5)[:, None] >= 2) & ~drawn
    assert torch.equal(masks, drawn | (strayed.cumsum(0) > 0))


class _Counting:
    """A denoiser that counts the rows it is asked about."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, x_t, t, cond, w):
        self.rows += len(x_t)
        return self.denoiser(x_t, t, cond, w)


def test_without_takeover_each_policy_is_asked_about_its_own_steps_only():
    student, teacher, noise = _Counting(NEAR), _Counting(TEACHER), torch.randn(64, 8)
    roll((_pupil(student), _pupil(teacher)), noise, choose=_rule())
    drawn, _ = _masks(_rule(), noise)
    assert (student.rows, teacher.rows) == (int((~drawn).sum()), int(drawn.sum()))


def test_a_takeover_asks_once_the_teacher_everywhere_and_the_student_until_it_strays():
    student, teacher, noise = _Counting(NEAR), _Counting(TEACHER), torch.randn(64, 8)
    choose, masks = _watched(_rule(bound=0.14))
    roll((_pupil(student), _pupil(teacher)), noise, choose=choose)
    drawn, _ = _masks(_rule(), noise)
    strayed = torch.stack(masks) & ~drawn
    before = strayed.cumsum(0) - strayed.long() > 0
    assert int(before.sum()) > 0
    assert (student.rows, teacher.rows) == (int((~(drawn | before)).sum()), 3 * 64)


def test_a_rule_that_served_one_rollout_serves_the_next():
    noise, generator = torch.randn(64, 8), seeded(1)
    rule = takeover(1e-9, bernoulli(0.0, generator))
    for _ in range(2):
        masks, _ = _masks(rule, noise)
        assert bool(masks.all())
    student = _masks(rule, noise, student=TEACHER)[0]
    assert not bool(student.any())
