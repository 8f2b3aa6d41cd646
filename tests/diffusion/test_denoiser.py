"""Pins guidance (oracle 19), the boundary condition (oracle 10) and the composition of wrappers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ddil_ray.diffusion.denoiser import (
    BoundaryConditioned,
    Guided,
    NetworkDenoiser,
    Thresholded,
    guidance_scale_from_w,
    w_from_guidance_scale,
)
from ddil_ray.diffusion.prediction import Prediction, from_x0
from ddil_ray.diffusion.schedule import CosineVP, schedule_from_diffusers
from ddil_ray.diffusion.threshold import StaticThreshold
from ddil_ray.testing import tiny_model

T = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
COND = torch.tensor([1, 2, 3])


@dataclass
class Counted:
    """Counts network passes and rows."""

    denoiser: object
    calls: int = 0
    rows: int = 0

    def __call__(self, x_t, t, cond, w):
        self.calls, self.rows = self.calls + 1, self.rows + len(x_t)
        return self.denoiser(x_t, t, cond, w)


@pytest.mark.parametrize("kind", [Prediction.EPSILON, Prediction.V, Prediction.SAMPLE])
def test_imagens_scale_equals_w_plus_one_in_every_parameterisation(kind):
    w, scale = 2.5, guidance_scale_from_w(2.5)
    cond, uncond = (torch.randn(3, 1, 8, 8, dtype=torch.float64) for _ in range(2))
    ours = cond + w * (cond - uncond)
    x_t = X.double()
    output = lambda x_0: from_x0(x_0, x_t, T, prediction=kind, schedule=CosineVP())  # noqa: E731
    imagen = output(uncond) + scale * (output(cond) - output(uncond))
    torch.testing.assert_close(output(ours), imagen)
    assert w_from_guidance_scale(scale) == w


def test_no_guidance_is_one_conditional_pass():
    inner = Counted(tiny_model().denoiser())
    guided = Guided(inner, null_cond=10)
    assert torch.equal(guided(X, T, COND, torch.zeros(3)), inner.denoiser(X, T, COND, torch.zeros(3)))
    assert (inner.calls, inner.rows) == (1, 3)


def test_guidance_is_both_passes_in_one_batch_with_w_per_row():
    inner = Counted(tiny_model().denoiser())
    w = torch.tensor([0.0, 1.0, 3.0])
    result = Guided(inner, null_cond=10)(X, T, COND, w)
    assert (inner.calls, inner.rows) == (1, 6)
    a = inner.denoiser(X, T, COND, w)
    b = inner.denoiser(X, T, torch.full((3,), 10), w)
    torch.testing.assert_close(result, a + w[:, None, None, None] * (a - b), rtol=1e-5, atol=1e-5)


def test_thresholding_goes_outside_guidance():
    model = tiny_model()
    expert = model.expert(guided=True, threshold=StaticThreshold(0.01))
    assert isinstance(expert, Thresholded)
    assert isinstance(expert.denoiser, Guided)
    assert float(expert(X, T, COND, torch.full((3,), 5.0)).abs().max()) <= 0.0100001


def test_the_boundary_is_the_identity_at_zero_and_almost_the_network_elsewhere():
    schedule = schedule_from_diffusers({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    consistent = BoundaryConditioned(lambda x, *_: torch.zeros_like(x), schedule)
    c_skip, c_out = consistent.coefficients(torch.tensor([0.0, 0.02], dtype=torch.float64))
    assert (float(c_skip[0]), float(c_out[0])) == (1.0, 0.0)
    assert float(c_skip[1]) == pytest.approx(6.925e-6, rel=1e-3)
    assert torch.equal(consistent(X, torch.zeros(3), COND, torch.zeros(3)), X)


def test_autocast_reaches_the_network_and_nothing_else():
    model = tiny_model()
    plain = NetworkDenoiser(model.network, model.prediction, model.schedule)
    mixed = NetworkDenoiser(model.network, model.prediction, model.schedule, torch.bfloat16)
    a, b = (d(X, T, COND, torch.zeros(3)) for d in (plain, mixed))
    assert a.dtype == b.dtype == torch.float32
    assert 0 < float((a - b).abs().max()) < 0.1
