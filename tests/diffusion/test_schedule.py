"""Pins the kernel's coefficients to diffusers' and to closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from ddil_ray.diffusion.schedule import (
    CosineVP,
    DiscreteVP,
    RectifiedFlow,
    add_noise,
    rho,
    schedule_from_diffusers,
    snr,
)
from ddil_ray.errors import ConfigError, ShapeError

KINDS = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_discrete_schedules_equal_diffusers(kind, zero_snr):
    theirs = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=kind, rescale_betas_zero_snr=zero_snr)
    ours = schedule_from_diffusers(theirs.config)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(ours.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.alpha(t) ** 2 + ours.sigma(t) ** 2, torch.ones(1000).double())
    assert torch.equal(ours.network_time(t).long(), torch.arange(1000))


def test_stable_diffusions_levels_are_the_published_ones():
    schedule = schedule_from_diffusers(
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
    )
    t = torch.tensor([1, 250, 500, 750, 1000]) / 1000
    alphas = torch.tensor([0.99957, 0.82185, 0.52694, 0.23796, 0.06827]).double()
    torch.testing.assert_close(schedule.alpha(t), alphas, rtol=0, atol=1e-5)
    torch.testing.assert_close(snr(schedule, t)[1], torch.tensor(2.081).double(), rtol=1e-3, atol=0)
    assert schedule.alpha(torch.zeros(1)) == schedule.alpha(torch.full((1,), 0.001))


def test_adding_noise_equals_diffusers():
    theirs = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True)
    x_0, eps = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    index = torch.tensor([0, 249, 499, 999])
    ours = add_noise(x_0, eps, (index.double() + 1) / 1000, schedule_from_diffusers(theirs.config))
    torch.testing.assert_close(ours, theirs.add_noise(x_0, eps, index), rtol=0, atol=2e-6)


def test_flow_sigmas_equal_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    ours = schedule_from_diffusers({**theirs.config, "_class_name": "FlowMatchEulerDiscreteScheduler"})
    t = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(ours.sigma(t), theirs.sigmas[:4].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.network_time(t), theirs.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.alpha(t) + ours.sigma(t), torch.ones(4).double())


def test_cosine_has_no_signal_left_at_the_end_and_no_noise_at_the_start():
    ends = torch.tensor([0.0, 1.0])
    assert CosineVP().alpha(ends).tolist() == [1.0, 0.0]
    assert CosineVP().sigma(ends).tolist() == [0.0, 1.0]
    assert rho(CosineVP(), ends)[1] == 0


@pytest.mark.parametrize("schedule", [CosineVP(), RectifiedFlow(), RectifiedFlow(3.0)])
def test_noise_grows_with_time(schedule):
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    assert bool((rho(schedule, t).diff() < 0).all())


def test_unknown_betas_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"`beta_schedule`.*linear.*'wavy'"):
        schedule_from_diffusers({"beta_schedule": "wavy"})


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_a_dynamic_shift_is_that_of_diffusers_for_the_number_of_tokens(kind, tokens):
    theirs = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, time_shift_type=kind, base_shift=0.4, max_shift=1.2
    )
    mu = calculate_shift(tokens, base_shift=0.4, max_shift=1.2)
    t = torch.arange(8, 0, -1, dtype=torch.float64) / 8
    theirs.set_timesteps(sigmas=t.tolist(), mu=mu)
    ours = schedule_from_diffusers({**theirs.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}, tokens)
    torch.testing.assert_close(ours.sigma(t), theirs.sigmas[:8].double(), rtol=0, atol=1e-6)


def test_a_dynamic_shift_is_refused_without_a_number_of_tokens():
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        schedule_from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True})


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15), 0.3])
def test_flow_ends_in_noise_alone_and_starts_clean_exactly(shift):
    ends, schedule = torch.tensor([0.0, 1.0]), RectifiedFlow(shift)
    assert schedule.alpha(ends).tolist() == [1.0, 0.0]
    assert schedule.sigma(ends).tolist() == [0.0, 1.0]
    assert rho(schedule, ends).tolist() == [math.inf, 0.0]


def test_a_time_per_row_is_required():
    with pytest.raises(ShapeError, match=r"\(2,\).*\(3,\)"):
        add_noise(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(3), DiscreteVP(torch.tensor([0.9, 0.5])))
