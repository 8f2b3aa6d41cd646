"""Pins the solver steps to diffusers' schedulers, exact flows and the identities of distillation targets."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from ddil_ray.diffusion.denoiser import BoundaryConditioned
from ddil_ray.diffusion.prediction import Prediction, to_x0
from ddil_ray.diffusion.schedule import CosineVP, RectifiedFlow, expand_to, levels, schedule_from_diffusers
from ddil_ray.diffusion.solver import ddim_step, mean_x0, renoise_step, sample, times_between
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.testing import GaussianDenoiser, MixtureDenoiser

SCHEDULES = {"cosine": CosineVP(), "flow": RectifiedFlow(), "shifted": RectifiedFlow(3.0)}
NO_COND = torch.zeros(64, dtype=torch.int64)
NO_W = torch.zeros(64)


def _rows(value, rows=64):
    return torch.full((rows,), value, dtype=torch.float64)


def _run(denoiser, schedule, noise, steps, transition="ddim"):
    w, cond = torch.zeros(len(noise)), torch.zeros(len(noise), dtype=torch.int64)
    return sample(denoiser, noise, times=uniform_grid(steps), cond=cond, w=w, schedule=schedule, transition=transition)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_steps_equal_diffusers(kind, to_one, spacing):
    """Oracle 4, over a whole 10-step trajectory with random network outputs."""
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=to_one,
        prediction_type=kind,
        timestep_spacing=spacing,
    )
    schedule = schedule_from_diffusers(theirs.config)
    theirs.set_timesteps(10)
    indices = theirs.timesteps.tolist()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for i, index in enumerate(indices):
        output = torch.randn_like(x)
        expected = theirs.step(output, index, x).prev_sample
        t = _rows((index + 1) / 1000, 2)
        s = _rows((indices[i + 1] + 1) / 1000 if i + 1 < len(indices) else 0.0, 2)
        x_0 = to_x0(output, x, t, prediction=Prediction(kind), schedule=schedule)
        x = ddim_step(x, x_0, t, s, schedule)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_trailing_timesteps_are_the_uniform_grid():
    theirs = DDIMScheduler(timestep_spacing="trailing")
    for steps in (1, 2, 4, 8, 10, 50):
        theirs.set_timesteps(steps)
        assert [round(t * 1000) - 1 for t in uniform_grid(steps)[:-1].tolist()] == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    ("grid", "steps"), [(50, 1), (50, 2), (50, 4), (50, 8), (50, 22), (50, 44), (100, 22), (250, 30)]
)
def test_consistency_times_are_those_of_lcm_scheduler(grid, steps):
    """Oracles 5 and 6; in the last four a bit of rounding decides."""
    theirs = LCMScheduler(original_inference_steps=grid)
    theirs.set_timesteps(steps)
    assert [round(t * 1000) - 1 for t in consistency_grid(grid, steps)[:-1].tolist()] == theirs.timesteps.tolist()


def test_the_solver_grid_is_the_trailing_grid_of_fifty():
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(50)
    times = set(theirs.timesteps.tolist())
    assert {round(t * 1000) - 1 for t in consistency_grid(50, 4)[:-1].tolist()} <= times


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_consistency_steps_equal_diffusers(kind):
    """Oracle 5: boundary condition, denoised sample and re-noising, with the same noise."""
    theirs = LCMScheduler(prediction_type=kind, original_inference_steps=50)
    theirs.set_timesteps(4)
    schedule = schedule_from_diffusers(theirs.config)
    outputs = [torch.randn(3, 1, 4, 4) for _ in range(4)]
    index = [0]

    def network(x_t, t, cond, w):
        return to_x0(outputs[index[0]], x_t, t, prediction=Prediction(kind), schedule=schedule)

    consistent = BoundaryConditioned(network, schedule)
    x = theirs_x = torch.randn(3, 1, 4, 4)
    ours_g, theirs_g = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    grid = consistency_grid(50, 4).tolist()
    for i, timestep in enumerate(theirs.timesteps):
        index[0] = i
        theirs_x, denoised = theirs.step(outputs[i], timestep, theirs_x, generator=theirs_g, return_dict=False)
        f = consistent(x, _rows(grid[i], 3), NO_COND[:3], NO_W[:3])
        x = renoise_step(f, _rows(grid[i + 1], 3), schedule, ours_g)
        torch.testing.assert_close(f, denoised, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x, theirs_x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_ddim_converges_to_the_exact_flow_at_first_order(name):
    """Oracle 1: the error falls as 1/N; slope of log error over log N, N = 16 to 256."""
    schedule = SCHEDULES[name]
    gaussian = GaussianDenoiser(schedule)
    noise = torch.randn(64, 8, dtype=torch.float64)
    exact = gaussian.flow(noise, _rows(1.0), _rows(0.0))
    steps = torch.tensor([16, 32, 64, 128, 256])
    errors = torch.stack([(_run(gaussian, schedule, noise, int(n)) - exact).abs().mean() for n in steps])
    slope = torch.linalg.lstsq(
        torch.stack([steps.log().double(), torch.ones(5).double()], 1), errors.log()[:, None]
    ).solution[0]
    assert -1.1 < float(slope) < -0.9
    assert float(errors[-1]) < 0.02


def test_a_mixtures_score_is_the_gradient_of_its_density():
    """Oracle 2: (alpha D - x) / sigma^2 = grad log p_t."""
    mixture = MixtureDenoiser(CosineVP(), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).double())
    x_t, t = (
        torch.randn(64, 2, dtype=torch.float64, requires_grad=True),
        torch.rand(64, dtype=torch.float64) * 0.9 + 0.05,
    )
    (gradient,) = torch.autograd.grad(mixture.log_prob(x_t, t).sum(), x_t)
    alpha, sigma = levels(CosineVP(), t, x_t)
    torch.testing.assert_close((alpha * mixture(x_t, t, NO_COND, NO_W) - x_t) / sigma**2, gradient)


def test_samples_of_a_mixture_spread_over_all_its_modes():
    """Not only close to modes: all of them, equally. Counts are binomial(4000, 1/4), sd 27; 5 sd fails 1 in 10^6."""
    means = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).double()
    mixture = MixtureDenoiser(CosineVP(), means)
    samples = _run(mixture, CosineVP(), torch.randn(4000, 2, dtype=torch.float64), 64)
    nearest = torch.cdist(samples, means).min(1)
    assert float(nearest.values.square().mean().sqrt()) < 0.2  # sqrt(2) * .1 where exact
    assert bool(((nearest.indices.bincount() - 1000).abs() < 135).all())


class TestMeanX0:
    """Oracle 7, a to c'."""

    noise = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def _target(self, denoiser, schedule, t, s, substeps):
        return mean_x0(
            denoiser, self.noise, _rows(t), _rows(s), cond=NO_COND, w=NO_W, schedule=schedule, substeps=substeps
        )

    @pytest.mark.parametrize("t", [1.0, 0.7, 0.25])
    @pytest.mark.parametrize("s", [0.1, 0.0])
    def test_a_constant_teacher_gives_its_constant(self, t, s):
        target = self._target(lambda x, *_: torch.full_like(x, 0.3), CosineVP(), t, s, 4)
        torch.testing.assert_close(target, torch.full_like(target, 0.3), rtol=0, atol=1e-14)

    @pytest.mark.parametrize("name", sorted(SCHEDULES))
    @pytest.mark.parametrize("substeps", [2, 4, 8])
    @pytest.mark.parametrize("s", [0.25, 0.0])
    def test_one_step_with_it_lands_where_the_teachers_steps_land(self, name, substeps, s):
        schedule = SCHEDULES[name]
        teacher = MixtureDenoiser(schedule, torch.randn(5, 8, dtype=torch.float64))
        x, times = self.noise, times_between(_rows(0.75), _rows(s), substeps)
        for now, following in zip(times, times[1:], strict=False):
            last = teacher(x, now, NO_COND, NO_W)
            x = ddim_step(x, last, now, following, schedule)
        target = self._target(teacher, schedule, 0.75, s, substeps)
        torch.testing.assert_close(ddim_step(self.noise, target, _rows(0.75), _rows(s), schedule), x)
        if s > 0:
            assert float((target - last).abs().max()) > 0.01

    def test_it_is_the_published_target(self):
        """Salimans and Ho, appendix G: (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)."""
        schedule, teacher = CosineVP(), GaussianDenoiser(CosineVP())
        t, s, middle = _rows(0.8), _rows(0.4), _rows(0.6)
        z_mid = ddim_step(self.noise, teacher(self.noise, t, NO_COND, NO_W), t, middle, schedule)
        z_s = ddim_step(z_mid, teacher(z_mid, middle, NO_COND, NO_W), middle, s, schedule)
        ratio = expand_to(schedule.sigma(s) / schedule.sigma(t), z_s)
        alpha_s, alpha_t = (expand_to(schedule.alpha(u), z_s) for u in (s, t))
        published = (z_s - ratio * self.noise) / (alpha_s - ratio * alpha_t)
        torch.testing.assert_close(self._target(teacher, schedule, 0.8, 0.4, 2), published)

    def test_bounded_estimates_give_a_bounded_target(self):
        target = self._target(lambda x, *_: torch.randn_like(x).clamp(-1, 1), CosineVP(), 1.0, 0.2, 8)
        assert float(target.abs().max()) <= 1 + 1e-12


def test_renoising_ends_in_the_estimate_itself():
    x_0 = torch.randn(4, 3)
    assert torch.equal(renoise_step(x_0, torch.zeros(4), CosineVP(), None), x_0)
