"""Pins distribution matching on Gaussians, where both scores and their difference are known in closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddil_ray.diffusion.denoiser import NetworkDenoiser
from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP, DiscreteVP, add_noise, levels
from ddil_ray.diffusion.threshold import StaticThreshold
from ddil_ray.objectives import DistributionMatching, RealData
from ddil_ray.objectives.dmd2 import (
    critic_adversarial_loss,
    matching_gradient,
    matching_loss,
    student_adversarial_loss,
)
from ddil_ray.states.batch import Origin
from ddil_ray.states.source import Conditions, SourceContext, StateRequest, make_states
from ddil_ray.testing import GaussianDenoiser, tiny_model
from ddil_ray.training.learner import Learner
from ddil_ray.training.optimizer import OptimizerSettings
from ddil_ray.training.parallel import Alone

SCHEDULE = CosineVP()
MEAN, OTHER, STD = 0.7, -0.2, 0.4


def _zeros(rows):
    return torch.zeros(rows, dtype=torch.int64), torch.zeros(rows)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_scores_of_two_gaussians_differ_by_what_the_closed_form_says(t):
    """Oracle 13: x0_fake - x0_real = sigma^2 / (alpha^2 s^2 + sigma^2) (m_fake - m_real), whatever x_t."""
    x_t, times = torch.randn(32, 4, dtype=torch.float64), torch.full((32,), t, dtype=torch.float64)
    real = GaussianDenoiser(SCHEDULE, MEAN, STD)(x_t, times, *_zeros(32))
    fake = GaussianDenoiser(SCHEDULE, OTHER, STD)(x_t, times, *_zeros(32))
    alpha, sigma = levels(SCHEDULE, times, x_t)
    expected = sigma**2 / (alpha**2 * STD**2 + sigma**2) * (OTHER - MEAN)
    torch.testing.assert_close(fake - real, expected.expand(32, 4), rtol=0, atol=1e-12)
    direction = matching_gradient(torch.zeros(32, 4), real, fake)
    assert bool((direction < 0).all())  # moving against it raises the samples, towards the teacher's mean
    assert float(matching_gradient(torch.zeros(32, 4), real, real).abs().max()) == 0


def test_the_loss_has_the_matching_gradient_as_its_derivative():
    """Oracle 12."""
    x_0 = torch.randn(8, 3, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(8, 3, 4, dtype=torch.float64)
    matching_loss(x_0, gradient).mean().backward()
    torch.testing.assert_close(x_0.grad, gradient / x_0.numel(), rtol=0, atol=1e-15)


def test_each_sample_is_normalised_by_itself():
    """Oracle 12: an error made ten times larger in one sample leaves the gradients of the others alone."""
    x_0, real, fake = torch.randn(3, 4, 5, dtype=torch.float64)
    before = matching_gradient(x_0, real, fake)
    torch.testing.assert_close(before[0], (fake - real)[0] / (x_0 - real)[0].abs().mean())
    real[0] += 10 * (real[0] - x_0[0])
    after = matching_gradient(x_0, real, fake)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_a_sample_that_the_teacher_leaves_alone_has_no_gradient_and_no_nan():
    x_0 = torch.randn(2, 4)
    assert torch.equal(matching_gradient(x_0, x_0, x_0 + 1), torch.zeros(2, 4, dtype=torch.float64))


def test_a_generator_of_one_number_converges_to_the_teachers_mean():
    """Oracle 13, with the exact fake score of the moving generator."""
    real, shift = GaussianDenoiser(SCHEDULE, MEAN, STD), torch.tensor(OTHER, requires_grad=True)
    optimizer = torch.optim.SGD([shift], lr=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        x_0 = shift + STD * torch.randn(64, 4, generator=generator)
        t = torch.rand(64, generator=generator, dtype=torch.float64) * 0.96 + 0.02
        x_t = add_noise(x_0.detach(), torch.randn(64, 4, generator=generator), t, SCHEDULE)
        fake = GaussianDenoiser(SCHEDULE, float(shift.detach()), STD)
        gradient = matching_gradient(x_0.detach(), real(x_t, t, *_zeros(64)), fake(x_t, t, *_zeros(64)))
        optimizer.zero_grad()
        matching_loss(x_0, gradient).mean().backward()
        optimizer.step()
    assert float(shift.detach()) == pytest.approx(MEAN, abs=5e-3)


def test_the_adversarial_losses_are_ln_2_where_the_discriminator_cannot_tell():
    """Oracle 15."""
    undecided = torch.zeros(5, dtype=torch.float64)
    assert float(student_adversarial_loss(undecided)) == pytest.approx(math.log(2))
    assert float(critic_adversarial_loss(undecided, undecided)) == pytest.approx(2 * math.log(2))


class _Affine(nn.Module):
    """eps prediction slope * x_t + intercept at one noise level."""

    def __init__(self):
        super().__init__()
        self.slope, self.intercept = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x_t, time, cond, w):
        return self.slope * x_t + self.intercept


def test_the_fake_score_learns_the_score_of_the_generator():
    """Oracle 14: for a Gaussian generator the best eps has slope sigma / V and intercept -alpha sigma m / V."""
    schedule = DiscreteVP(torch.tensor([0.5]))  # one timestep: alpha^2 = sigma^2 = 1 / 2 for every t
    objective = DistributionMatching(schedule, student_steps=1)
    objective.start(_Affine(), objective.phases[0], Alone())
    student = NetworkDenoiser(_Affine(), Prediction.EPSILON, schedule)
    optimizer = torch.optim.Adam(objective.critic.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        if step == 200:
            optimizer.param_groups[0]["lr"] = 0.003
        x_0 = MEAN + STD * torch.randn(2000, 1, generator=generator)
        loss, _ = objective._critic_loss(student, x_0, SimpleNamespace(cond=_zeros(2000)[0]), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    alpha = sigma = math.sqrt(0.5)
    variance = alpha**2 * STD**2 + sigma**2
    # 200 steps average the noise of 2,000 rows each: deviations beyond .01 are many standard errors.
    assert float(objective.critic.network.slope.detach()) == pytest.approx(sigma / variance, abs=0.01)
    assert float(objective.critic.network.intercept.detach()) == pytest.approx(
        -alpha * sigma * MEAN / variance, abs=0.01
    )


def _learner(**settings):
    settings = {"student_steps": 2, "gan_weight": 0.1, "gan_layer": "inside", **settings}
    objective = DistributionMatching(SCHEDULE, **settings)
    teacher = tiny_model()
    teacher.network.requires_grad_(False)
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    objective.equip(teacher.expert(guided=True), RealData(images, torch.arange(50) % 10))
    return Learner(tiny_model(), objective, OptimizerSettings(steps=100, lr=1e-3)), images


def _batch(learner, images, index=0, rows=16):
    objective = learner.objective
    context = SourceContext(SCHEDULE, (1, 8, 8), Conditions(torch.arange(50) % 10, (1.0, 1.0)), images=images)
    return make_states(context, objective.phases[0], StateRequest(Origin.FORWARD, 0, index, rows, 0), version=-1)


def test_of_twenty_iterations_four_move_the_student_and_all_move_the_critic():
    """Oracle 15: the two time scales."""
    learner, images = _learner()
    moved = {"student": 0, "critic": 0}
    networks = {"student": learner.student.network, "critic": learner.objective.critic}
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        before = {name: nn.utils.parameters_to_vector(net.parameters()).clone() for name, net in networks.items()}
        metrics = learner.update(_batch(learner, images, i), generator)
        for name, net in networks.items():
            moved[name] += not torch.equal(before[name], nn.utils.parameters_to_vector(net.parameters()))
        assert ("loss" in metrics) == (i % 5 == 0)
        assert "critic/loss" in metrics
    assert moved == {"student": 4, "critic": 20}


def test_the_students_loss_leaves_the_critic_alone_and_the_critics_loss_the_student():
    """Oracle 15: the adversarial gradient passes through the critic, and stays nowhere in it."""
    learner, images = _learner()
    objective, student = learner.objective, learner.student
    output = objective.loss(student.denoiser(), _batch(learner, images), objective.phases[0])
    output.loss.backward()
    assert all(p.grad is None for p in objective.critic.parameters())
    assert all(p.grad is not None for p in student.network.parameters())
    student.network.zero_grad(set_to_none=True)
    output.critic_loss.backward()
    assert all(p.grad is None for p in student.network.parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in objective.critic.parameters())


def test_the_adversarial_gradient_reaches_the_student():
    """Where both scores agree nothing but the discriminator moves the student."""
    learner, images = _learner(gan_weight=1.0)
    objective, student = learner.objective, learner.student  # student = fake score = teacher, unguided
    batch = _batch(learner, images)
    batch = type(batch)(**{**batch.__dict__, "w": torch.zeros_like(batch.w)})
    output = objective.loss(student.denoiser(), batch, objective.phases[0])
    assert output.metrics["dmd/gradient"] == 0
    output.loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in student.network.parameters()) > 0


def test_a_discriminator_learns_to_tell_samples_from_data():
    learner, images = _learner(critic_gan_weight=1.0, student_every=1000)
    generator = torch.Generator().manual_seed(0)
    images[:] = 1.0
    metrics = [learner.update(_batch(learner, images, i), generator) for i in range(100)]
    assert metrics[-1]["gan/real"] - metrics[-1]["gan/generated"] > 0.2


def test_states_at_the_end_of_the_schedule_are_pure_noise():
    """Oracle 20: at t = 1 nothing of the data is left, though this schedule would leave alpha = .5 of it."""
    schedule = DiscreteVP(torch.linspace(0.99, 0.25, 100))
    objective = DistributionMatching(schedule, student_steps=2)
    images = torch.full((50, 1, 8, 8), 4.0)
    context = SourceContext(schedule, (1, 8, 8), Conditions(torch.zeros(50, dtype=torch.int64), (0, 0)), images=images)
    states = make_states(context, objective.phases[0], StateRequest(Origin.FORWARD, 0, 0, 512, 0), version=-1)
    at_end = states.x_t[states.t == 1]
    assert abs(float(at_end.mean())) < 0.05  # 16,000 values: a standard error of .008
    assert float(at_end.std()) == pytest.approx(1, abs=0.03)
    middle = states.x_t[states.t == 0.5]
    assert float(middle.mean()) == pytest.approx(4 * float(schedule.alpha(torch.tensor([0.5]))), abs=0.05)


def test_one_step_students_start_from_noise_whatever_the_source():
    objective = DistributionMatching(SCHEDULE, student_steps=1)
    model = tiny_model()
    conditions = Conditions(torch.arange(50) % 10, (0.0, 0.0))
    context = SourceContext(SCHEDULE, (1, 8, 8), conditions, images=torch.ones(50, 1, 8, 8),
                            student=model.denoiser(), teacher=model.denoiser())  # fmt: skip
    for origin in (Origin.FORWARD, Origin.STUDENT, Origin.TEACHER):
        states = make_states(context, objective.phases[0], StateRequest(origin, 0, 0, 256, 0), version=0)
        assert bool((states.t == 1).all())
        assert abs(float(states.x_t.mean())) < 0.04  # standard error .008
    assert objective.sampling_times(1).tolist() == [1, 0]


def test_both_scores_are_thresholded_alike():
    learner, images = _learner(threshold=StaticThreshold(1e-3), gan_weight=0)
    objective = learner.objective
    objective.equip(tiny_model().expert(guided=True, threshold=StaticThreshold(1e-3)), RealData(images, images))
    output = objective.loss(learner.student.denoiser(), _batch(learner, images), objective.phases[0])
    assert output.metrics["dmd/scores_apart"] <= 2e-3


def test_the_four_step_grid_is_that_of_the_paper():
    objective = DistributionMatching(DiscreteVP(torch.linspace(0.99, 0.01, 1000)))
    assert objective.schedule.network_time(objective.phases[0].stages[:-1]).tolist() == [999, 749, 499, 249]
    assert torch.equal(objective.sampling_times(4), objective.phases[0].stages)


def test_micro_batches_add_up_the_gradients_of_student_and_critic():
    learner, images = _learner()
    learner.settings = OptimizerSettings(steps=100, lr=1e-3, accumulate=4)
    objective, batch, generator = learner.objective, _batch(learner, images), torch.Generator().manual_seed(0)
    total = {"student": 0.0, "critic": 0.0}
    networks = {"student": learner.student.network, "critic": objective.critic}
    for rows in torch.arange(16).chunk(4):
        output = objective.loss(learner.student.denoiser(), batch[rows], objective.phases[0], generator)
        for role, loss in (("student", output.loss), ("critic", output.critic_loss)):
            gradients = torch.autograd.grad(loss, list(networks[role].parameters()))
            total[role] = total[role] + torch.cat([g.flatten() for g in gradients]) / 4
    metrics = learner.update(batch, torch.Generator().manual_seed(0))
    assert metrics["grad_norm"] == pytest.approx(float(total["student"].norm()), rel=1e-5)
    assert metrics["critic/grad_norm"] == pytest.approx(float(total["critic"].norm()), rel=1e-5)
