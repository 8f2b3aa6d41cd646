"""Pins what GPUs deliver without a pipeline."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddil_ray.capacity.baselines import Draw, ideal_rate, naive_rate, stops, synchronised_rate

INFERENCE_S, TRAINER_S, LABEL_S = 0.0064, 0.034, 0.0128
"""Stable Diffusion 1.5 on an A100: a forward pass, an LCM update, a guided label, per row."""


def sd15_lcm() -> list[Draw]:
    """.4 forward states; rollouts that stop at random: .3 student of 4 steps, .2 teacher of 16, .1 of both."""
    inline = TRAINER_S + LABEL_S
    mixed = [
        Draw(0.1 / 4 * math.comb(n, k) / 2**n, inline + (n - k) * INFERENCE_S + k * 8 * INFERENCE_S)
        for n in range(1, 5)
        for k in range(n + 1)
    ]
    return [
        Draw(0.4, inline),
        *stops(0.3, stages=4, stage_s=INFERENCE_S, other_s=inline),
        *stops(0.2, stages=16, stage_s=2 * INFERENCE_S, other_s=inline),
        *mixed,
    ]


@pytest.mark.parametrize(("gpus", "naive", "ideal"), [(8, 47.3, 100), (16, 80.0, 200), (32, 145, 400)])
def test_stable_diffusion_inline_is_as_modelled_before(gpus, naive, ideal):
    """Within 4 %: that model's law of lengths is not known to the last step."""
    assert naive_rate(sd15_lcm(), gpus) == pytest.approx(naive, rel=0.04)
    assert ideal_rate(sd15_lcm(), gpus) == pytest.approx(ideal, rel=0.01)


def test_the_slowest_of_many_draws_is_what_drawing_gives():
    draws, generator = sd15_lcm(), np.random.default_rng(0)
    drawn = generator.choice([d.seconds for d in draws], p=[d.chance for d in draws], size=(20_000, 8))
    assert naive_rate(draws, 8) == pytest.approx(8 / drawn.max(1).mean(), rel=0.01)
    assert synchronised_rate(draws, 8) == pytest.approx(8 / drawn.mean(), rel=0.01)


def test_one_rank_waits_for_nobody():
    assert naive_rate(sd15_lcm(), 1) == pytest.approx(synchronised_rate(sd15_lcm(), 1))


def test_chances_must_sum_to_one():
    with pytest.raises(ValueError, match=r"sum to 0\.5 instead"):
        naive_rate([Draw(0.5, 1.0)], 2)
