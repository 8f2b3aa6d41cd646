"""Pins latent consistency on the Gaussian, whose exact consistency function is its flow."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ddil_ray.diffusion.denoiser import NetworkDenoiser
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.objectives import LatentConsistency
from ddil_ray.objectives.lcm import LCM_LOSSES
from ddil_ray.states.batch import StateBatch
from ddil_ray.testing import GaussianDenoiser, tiny_model
from ddil_ray.training.parallel import Alone

SCHEDULE = CosineVP()
TEACHER = GaussianDenoiser(SCHEDULE)


def _states(x_t, t):
    zeros = torch.zeros(len(x_t), dtype=torch.int64)
    return StateBatch(x_t, t, zeros, zeros.float(), zeros.to(torch.int8), zeros - 1, zeros, torch.zeros(len(x_t), 0))


def test_the_exact_flow_is_a_fixed_point():
    """Oracle 9a."""
    x_t, t = torch.randn(64, 4, dtype=torch.float64), torch.full((64,), 0.7, dtype=torch.float64)
    s, zero = torch.full_like(t, 0.3), torch.zeros_like(t)
    direct = TEACHER.flow(x_t, t, zero)
    torch.testing.assert_close(TEACHER.flow(TEACHER.flow(x_t, t, s), s, zero), direct)


def test_the_labels_error_falls_fourfold_when_the_grid_is_halved():
    """Oracle 9b: one DDIM step is wrong at second order in its length."""
    x_t, t = torch.randn(256, 4, dtype=torch.float64), torch.full((256,), 0.5, dtype=torch.float64)
    zero, residuals = torch.zeros_like(t), []
    for steps in (10, 20, 40, 80):
        objective = LatentConsistency(SCHEDULE, solver_steps=steps)
        label = objective.label(TEACHER, _states(x_t, t), objective.phases[0])
        gap = TEACHER.flow(label, t - 1 / steps, zero) - TEACHER.flow(x_t, t, zero)
        residuals.append(float(gap.abs().mean()))
    for coarse, fine in zip(residuals, residuals[1:], strict=False):
        assert coarse / fine == pytest.approx(4, rel=0.2)


def test_at_the_first_grid_time_the_target_is_the_label_itself():
    """Oracle 9c: f(x, 0) = x, so a network whose f equals the label has no loss, bit for bit."""
    objective = LatentConsistency(SCHEDULE, solver_steps=50)
    network = tiny_model().network
    objective.start(network, objective.phases[0], Alone())
    x = torch.randn(4, 1, 8, 8)
    batch = _states(x, torch.full((4,), 0.02, dtype=torch.float64))
    student = NetworkDenoiser(network, Prediction.V, SCHEDULE)
    with torch.no_grad():
        f = objective.student_denoiser(student)(batch.x_t, batch.t, batch.cond, batch.w)
        assert float(objective.loss(student, batch.labelled(f), objective.phases[0]).loss) == 0


def test_pseudo_huber_is_quadratic_then_linear_with_bounded_gradient():
    """Oracle 11."""
    huber, c = LCM_LOSSES["huber"], 1e-3
    d = torch.tensor([0.0, 1e-6, 10.0, -10.0], dtype=torch.float64, requires_grad=True)
    loss = huber(d, c)
    assert float(loss[0].detach()) == 0
    assert float(loss[1].detach()) == pytest.approx(1e-12 / (2 * c), rel=1e-3)
    torch.testing.assert_close(loss[2:].detach(), d[2:].detach().abs(), rtol=1e-3, atol=0)
    loss.sum().backward()
    assert float(d.grad.abs().max()) <= 1


def test_the_target_network_is_the_moving_average_of_the_student():
    """Oracle 24: after n updates from 0 towards a constant 1 it is 1 - d^n."""
    objective = LatentConsistency(SCHEDULE, ema_decay=0.9)
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    objective.start(network, objective.phases[0], Alone())
    network.weight.data.fill_(1.0)
    for _ in range(7):
        objective.after_update(network)
    assert float(objective.state_dict()["target"]["weight"]) == pytest.approx(1 - 0.9**7, rel=1e-5)


def test_the_target_sees_no_gradient_and_the_skip_step_is_taken():
    objective = LatentConsistency(SCHEDULE, solver_steps=50, skip=5)
    seen = []

    @dataclass
    class Spy:
        def __call__(self, x_t, t, cond, w):
            seen.append(t)
            return torch.zeros_like(x_t)

    t = torch.tensor([0.04, 0.5], dtype=torch.float64)
    label = objective.label(Spy(), _states(torch.randn(2, 4), t), objective.phases[0])
    assert label.shape == (2, 4)
    torch.testing.assert_close(objective._earlier(t), torch.tensor([0.0, 0.4], dtype=torch.float64))
