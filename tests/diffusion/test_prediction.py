"""Pins the conversions between parameterisations (oracle 3)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.diffusion.prediction import Prediction, convert, from_x0, to_eps, to_x0
from ddil_ray.diffusion.schedule import CosineVP, RectifiedFlow, add_noise, levels, schedule_from_diffusers

SD = schedule_from_diffusers({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
SCHEDULES = {"sd": SD, "cosine": CosineVP(), "flow": RectifiedFlow(), "shifted": RectifiedFlow(3.0)}


def _state(schedule, t, dtype=torch.float64):
    x_0, eps = torch.randn(len(t), 3, 2, 2, dtype=dtype), torch.randn(len(t), 3, 2, 2, dtype=dtype)
    return x_0, eps, add_noise(x_0, eps, t, schedule)


@given(
    t=st.floats(0.001, 0.999),
    source=st.sampled_from(list(Prediction)),
    target=st.sampled_from(list(Prediction)),
    name=st.sampled_from(sorted(SCHEDULES)),
)
def test_round_trips_are_exact_in_float64(t, source, target, name):
    schedule, times = SCHEDULES[name], torch.full((2,), t, dtype=torch.float64)
    x_0, _, x_t = _state(schedule, times)
    output = from_x0(x_0, x_t, times, prediction=source, schedule=schedule)
    there = convert(output, x_t, times, source=source, target=target, schedule=schedule)
    back = to_x0(there, x_t, times, prediction=target, schedule=schedule)
    # eps at t -> 1 leaves x_0 = (x - sigma eps) / alpha with alpha down to .0016
    torch.testing.assert_close(back, x_0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", [0, 249, 499, 999])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_round_trips_at_stable_diffusions_ends(index, prediction):
    times = torch.full((2,), (index + 1) / 1000, dtype=torch.float64)
    for dtype, bound in ((torch.float64, 3e-14), (torch.float32, 2e-5)):
        x_0, _, x_t = _state(SD, times, dtype)
        output = from_x0(x_0, x_t, times, prediction=prediction, schedule=SD)
        back = to_x0(output, x_t, times, prediction=prediction, schedule=SD)
        torch.testing.assert_close(back, x_0, rtol=0, atol=bound)


def test_arithmetic_is_not_done_in_bfloat16():
    """A conversion in bf16 at the last timestep would be off by .27; ours rounds once, at the end."""
    times = torch.full((64,), 1.0, dtype=torch.float64)
    x_0, eps, x_t = _state(SD, times)
    naive = (x_t.bfloat16() - SD.sigma(times)[0].bfloat16() * eps.bfloat16()) / SD.alpha(times)[0].bfloat16()
    assert float((naive.double() - x_0).abs().max()) > 1e-2
    ours = to_x0(eps.float(), x_t.float(), times, prediction=Prediction.EPSILON, schedule=SD)
    assert float((ours.double() - x_0).abs().max()) < 1e-4


def test_the_definitions_hold():
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    for schedule in (CosineVP(), RectifiedFlow()):
        x_0, eps, x_t = _state(schedule, t)
        torch.testing.assert_close(to_eps(x_0, x_t, t, schedule), eps)
    alpha, sigma = levels(CosineVP(), t, x_0)
    x_t = add_noise(x_0, eps, t, CosineVP())
    v = from_x0(x_0, x_t, t, prediction=Prediction.V, schedule=CosineVP())
    torch.testing.assert_close(v, alpha * eps - sigma * x_0)
    x_t = add_noise(x_0, eps, t, RectifiedFlow())
    flow = from_x0(x_0, x_t, t, prediction=Prediction.FLOW, schedule=RectifiedFlow())
    torch.testing.assert_close(flow, eps - x_0)


def test_squared_errors_relate_by_snr():
    """Oracle 7d: eps error is SNR and v error 1 + SNR times the x_0 error."""
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    x_0, _, x_t = _state(CosineVP(), t)
    wrong = x_0 + 0.1 * torch.randn_like(x_0)
    ratio = (CosineVP().alpha(t) / CosineVP().sigma(t)) ** 2
    mse = (wrong - x_0).square().flatten(1).mean(1)
    for kind, factor in ((Prediction.EPSILON, ratio), (Prediction.V, 1 + ratio)):
        a, b = (from_x0(x, x_t, t, prediction=kind, schedule=CosineVP()) for x in (wrong, x_0))
        torch.testing.assert_close((a - b).square().flatten(1).mean(1), factor * mse)
