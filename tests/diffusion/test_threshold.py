"""Pins thresholds (oracle 16) and the reflection (oracle 17)."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.diffusion.prediction import Prediction, from_x0, to_eps, to_x0
from ddil_ray.diffusion.schedule import levels, schedule_from_diffusers
from ddil_ray.diffusion.solver import ddim_step
from ddil_ray.diffusion.threshold import (
    THRESHOLDS,
    DynamicThreshold,
    PerChannelThreshold,
    StaticThreshold,
    clip_fraction,
    reflect,
)

_RNG = torch.Generator().manual_seed(0)
X_0 = 4 * torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=_RNG)
_DATA = torch.randn(500, 3, 4, 4, dtype=torch.float64, generator=_RNG)
FITTED = PerChannelThreshold.fit(_DATA * torch.tensor([0.5, 1.0, 2.0])[:, None, None])
ALL = {"static": StaticThreshold(0.9), "per_channel": FITTED, "dynamic": DynamicThreshold()}


def test_every_threshold_of_the_config_is_tested_here():
    assert {*ALL, "none"} == set(THRESHOLDS)


@pytest.mark.parametrize("threshold", [THRESHOLDS["none"](), StaticThreshold(1e9), DynamicThreshold(bound=1e9)])
def test_out_of_reach_bounds_change_nothing_bitwise(threshold):
    assert torch.equal(threshold(X_0), X_0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_results_are_bounded_and_stay_when_thresholded_again(name):
    threshold = ALL[name]
    once = threshold(X_0)
    assert float(once.abs().max()) < float(X_0.abs().max())
    torch.testing.assert_close(threshold(once), once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ALL))
def test_the_noise_is_derived_again_so_that_the_state_is_kept(name):
    schedule = schedule_from_diffusers({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
    t = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    x_t, x_0 = torch.randn_like(X_0), ALL[name](X_0)
    alpha, sigma = levels(schedule, t, x_t)
    torch.testing.assert_close(alpha * x_0 + sigma * to_eps(x_0, x_t, t, schedule), x_t)
    v = from_x0(x_0, x_t, t, prediction=Prediction.V, schedule=schedule)
    torch.testing.assert_close(to_x0(v, x_t, t, prediction=Prediction.V, schedule=schedule), x_0)


def test_a_static_threshold_is_diffusers_clipping_with_the_noise_rederived():
    theirs = DDIMScheduler(clip_sample=True, clip_sample_range=0.8, timestep_spacing="trailing")
    theirs.set_timesteps(10)
    schedule = schedule_from_diffusers(theirs.config)
    x_t, eps = torch.randn(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    t, s = torch.full((2,), 0.9).double(), torch.full((2,), 0.8).double()
    x_0 = StaticThreshold(0.8)(to_x0(eps, x_t, t, prediction=Prediction.EPSILON, schedule=schedule))
    ours = ddim_step(x_t, x_0, t, s, schedule)
    expected = theirs.step(eps, 899, x_t, use_clipped_model_output=True).prev_sample
    other = theirs.step(eps, 899, x_t, use_clipped_model_output=False).prev_sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert float((ours - other).abs().max()) > 0.01


def test_the_dynamic_threshold_is_imagens():
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=1e9)
    torch.testing.assert_close(
        DynamicThreshold(0.995)(X_0).float(), theirs._threshold_sample(X_0.float()), rtol=1e-4, atol=1e-5
    )


def test_bounds_are_fitted_per_channel():
    widths = [high - low for low, high in zip(FITTED.low, FITTED.high, strict=True)]
    assert widths[0] < widths[1] < widths[2]
    assert clip_fraction(X_0, X_0.clamp(-1, 1)) == pytest.approx(float((X_0.abs() > 1).double().mean()))


def test_gradients_through_a_threshold_are_finite():
    for threshold in ALL.values():
        x = X_0.clone().requires_grad_()
        threshold(x).sum().backward()
        assert bool(x.grad.isfinite().all())


@given(x=st.floats(-50, 50, allow_nan=False))
def test_reflection_is_a_fold_of_period_two(x):
    value = torch.tensor([x], dtype=torch.float64)
    folded = reflect(value, 0.0, 1.0)
    assert 0 <= float(folded) <= 1
    torch.testing.assert_close(reflect(folded, 0.0, 1.0), folded)
    torch.testing.assert_close(reflect(value + 2, 0.0, 1.0), folded, rtol=0, atol=1e-12)


def test_a_reflected_walk_becomes_uniform():
    """4,000 walkers, sd of the mean .0046, of the variance .0012: five sd fail once in 10^6."""
    x = torch.full((4000,), 0.1, dtype=torch.float64)
    for _ in range(200):
        x = reflect(x + 0.2 * torch.randn_like(x), 0.0, 1.0)
    assert abs(float(x.mean()) - 0.5) < 0.023
    assert abs(float(x.var()) - 1 / 12) < 0.006
