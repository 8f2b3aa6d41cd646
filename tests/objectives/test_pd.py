"""Pins progressive distillation on teachers whose answers are known in closed form."""

from __future__ import annotations

import torch

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import CosineVP, snr
from ddil_ray.diffusion.solver import sample
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives import ProgressiveDistillation
from ddil_ray.states.batch import StateBatch
from ddil_ray.testing import GaussianDenoiser

SCHEDULE = CosineVP()
TEACHER = GaussianDenoiser(SCHEDULE)


def _states(x_t, t):
    rows = len(x_t)
    zeros = torch.zeros(rows, dtype=torch.int64)
    return StateBatch(x_t, t, zeros, zeros.float(), zeros.to(torch.int8), zeros - 1, zeros, torch.zeros(rows, 0))


def _sample(denoiser, noise, steps):
    zeros = torch.zeros(len(noise))
    return sample(denoiser, noise, times=uniform_grid(steps), cond=zeros.long(), w=zeros, schedule=SCHEDULE)


def test_a_perfect_chain_of_rounds_ends_where_the_first_teacher_ends():
    """Oracle 8: each round's student answers its label exactly; after 8, 4, 2, 1 one step is the teacher's 8."""
    objective = ProgressiveDistillation(SCHEDULE, teacher_steps=8, student_steps=(4, 2, 1))
    noise, teacher = torch.randn(64, 4, dtype=torch.float64), TEACHER
    expected = _sample(TEACHER, noise, 8)
    for phase in objective.phases:

        def student(x_t, t, cond, w, teacher=teacher, phase=phase):
            return objective.label(teacher, _states(x_t, t), phase)

        torch.testing.assert_close(_sample(student, noise, phase.student_steps), expected, rtol=0, atol=1e-12)
        teacher = student


def test_a_linear_student_fits_the_product_of_the_teachers_affine_maps():
    """Oracle 7f: least squares on labels is exact, whatever states it is fitted on."""
    objective = ProgressiveDistillation(SCHEDULE, teacher_steps=8, student_steps=(2,))
    for spread in (0.5, 3.0):
        x = spread * torch.randn(200, 1, dtype=torch.float64)
        t = torch.full((200,), 0.5, dtype=torch.float64)
        label = objective.label(TEACHER, _states(x, t), objective.phases[0])
        design = torch.cat([x, torch.ones_like(x)], 1)
        slope, intercept = torch.linalg.lstsq(design, label).solution.flatten()
        torch.testing.assert_close(design @ torch.stack([slope, intercept])[:, None], label)


def test_rounds_halve_and_each_is_taught_by_the_grid_before_it():
    objective = ProgressiveDistillation(SCHEDULE, teacher_steps=16, student_steps=(8, 4, 1))
    assert [p.student_steps for p in objective.phases] == [8, 4, 1]
    assert [p.teacher_substeps for p in objective.phases] == [2, 2, 4]
    assert [len(p.law.times) for p in objective.phases] == [8, 4, 1]


def test_the_loss_is_zero_where_the_student_answers_the_label():
    """Oracle 7e, with its gradient."""
    network = torch.nn.Linear(4, 4).double()
    model = DiffusionModel(network=_Plain(network), prediction=Prediction.SAMPLE, schedule=SCHEDULE, sample_shape=(4,))
    x_t, t = torch.randn(8, 4, dtype=torch.float64), torch.full((8,), 0.5, dtype=torch.float64)
    batch = _states(x_t, t).labelled(network(x_t).detach())
    objective = ProgressiveDistillation(SCHEDULE, teacher_steps=4, student_steps=(2,))
    output = objective.loss(model.denoiser(), batch, objective.phases[0])
    output.loss.backward()
    assert float(output.loss) == 0
    assert float(network.weight.grad.abs().max()) == 0


def test_losses_weigh_squared_error_by_signal_to_noise():
    x_t, t = torch.randn(4, 3), torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    batch = _states(x_t, t).labelled(torch.ones(4, 3))
    ratio = snr(SCHEDULE, t).float()
    for loss, weight in (("snr_trunc", ratio.clamp(min=1)), ("v", 1 + ratio), ("x", torch.ones(4))):
        objective = ProgressiveDistillation(SCHEDULE, teacher_steps=8, student_steps=(4,), loss=loss)
        output = objective.loss(lambda x, *_: torch.zeros_like(x), batch, objective.phases[0])
        torch.testing.assert_close(output.per_row, weight)


class _Plain(torch.nn.Module):
    """A network that ignores time, condition and guidance."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x_t, time, cond, w):
        return self.inner(x_t)
