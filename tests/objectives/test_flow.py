"""Pins the methods where a flow schedule differs from others: t = 1 is noise alone, t = 0 clean, times are shifted."""

from __future__ import annotations

import pytest
import torch

from ddil_ray.diffusion.denoiser import BoundaryConditioned, NetworkDenoiser
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import RectifiedFlow, add_noise, levels
from ddil_ray.objectives import DistributionMatching, LatentConsistency, ProgressiveDistillation
from ddil_ray.objectives.dmd2 import matching_gradient
from ddil_ray.states.batch import StateBatch
from ddil_ray.testing import GaussianDenoiser

SCHEDULE = RectifiedFlow(3.0)
TEACHER = GaussianDenoiser(SCHEDULE)


def velocity(x_t, time, cond, w):
    """What a network of this schedule that is the Gaussian teacher predicts."""
    sigma = time.double() / 1000
    t = sigma / (3 - 2 * sigma)
    v = (x_t.double() - TEACHER(x_t.double(), t, cond, w)) / sigma.clamp(min=1e-9)[:, None]
    return v.to(x_t.dtype)


STUDENT = NetworkDenoiser(velocity, Prediction.FLOW, SCHEDULE)


def states_at(t, rows=16):
    zeros = torch.zeros(rows, dtype=torch.int64)
    times = torch.full((rows,), t, dtype=torch.float64)
    x_t = add_noise(0.7 + 0.4 * torch.randn(rows, 4), torch.randn(rows, 4), times, SCHEDULE)
    return StateBatch(x_t, times, zeros, zeros.float(), zeros.to(torch.int8), zeros - 1, zeros, torch.zeros(rows, 0))


@pytest.mark.parametrize("loss", ["snr_trunc", "v", "x"])
@pytest.mark.parametrize("t", [1.0, 0.75, 0.25])
def test_a_progressive_student_that_answers_the_target_has_no_loss_at_either_end(loss, t):
    pd = ProgressiveDistillation(SCHEDULE, teacher_steps=8, student_steps=(4,), loss=loss)
    states, phase = states_at(t), pd.phases[0]
    target = pd.label(TEACHER, states, phase)
    right = NetworkDenoiser(lambda *_: target, Prediction.SAMPLE, SCHEDULE)
    wrong = NetworkDenoiser(lambda *_: target + 1, Prediction.SAMPLE, SCHEDULE)
    labelled = states.labelled(target)
    assert float(pd.loss(right, labelled, phase).loss) == 0
    weight = float(pd.loss(wrong, labelled, phase).loss)
    alpha, sigma = (float(c[0]) for c in levels(SCHEDULE, states.t, states.x_t))
    ratio = (alpha / sigma) ** 2
    assert weight == pytest.approx({"snr_trunc": max(1, ratio), "v": 1 + ratio, "x": 1}[loss], rel=1e-5)


def test_a_consistency_function_is_the_identity_at_the_clean_end():
    states = states_at(0.5)
    zero = torch.zeros_like(states.t)
    consistent = BoundaryConditioned(STUDENT, SCHEDULE)
    assert torch.equal(consistent(states.x_t, zero, states.cond, states.w), states.x_t)


@pytest.mark.parametrize("t", [1.0, 0.02])
def test_a_consistency_students_label_is_one_step_of_the_flow_at_either_end(t):
    lcm = LatentConsistency(SCHEDULE)
    states = states_at(t)
    label = lcm.label(TEACHER, states, lcm.phases[0])
    sigma, less = (SCHEDULE.sigma(u)[:, None] for u in (states.t, states.t - 0.02))
    v = (states.x_t - TEACHER(states.x_t, states.t, states.cond, states.w)) / sigma
    torch.testing.assert_close(label.double(), states.x_t + (less - sigma) * v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [1e-3, 0.5, 0.98])
def test_the_scores_of_two_gaussians_differ_by_what_the_closed_form_says(t):
    """Oracle 13."""
    states = states_at(t)
    other = GaussianDenoiser(SCHEDULE, -0.2)(states.x_t, states.t, states.cond, states.w)
    real = STUDENT(states.x_t, states.t, states.cond, states.w)
    alpha, sigma = levels(SCHEDULE, states.t, states.x_t)
    expected = sigma**2 / (alpha**2 * 0.4**2 + sigma**2) * (-0.2 - 0.7)
    torch.testing.assert_close((other - real).double(), expected.expand(16, 4), rtol=0, atol=1e-4)
    assert bool(matching_gradient(states.x_t, real, other).isfinite().all())


def test_a_matched_student_is_asked_at_shifted_times():
    stages = DistributionMatching(SCHEDULE).phases[0].stages
    expected = torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64)
    torch.testing.assert_close(SCHEDULE.sigma(stages), expected)
