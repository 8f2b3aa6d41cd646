"""Pins how many actors are recommended, and how GPUs are split."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.capacity.sizing import Load, actors_needed, best_split

SD15_LCM = Load("actors", (0.046,))
"""46 ms of one GPU per row that a trainer of 34 ms trains on."""


@pytest.mark.parametrize(("gpus", "rows_per_s"), [(8, 88.2), (16, 195.7), (32, 391.3)])
def test_the_best_split_of_stable_diffusion_is_the_known_one(gpus, rows_per_s):
    split = best_split([SD15_LCM], gpus=gpus, worker_s=dict.fromkeys(range(1, gpus), 0.034))
    assert split.rows_per_s == pytest.approx(rows_per_s, abs=0.05)
    assert split.workers + split.actors["actors"] <= gpus


def test_actors_are_a_fifth_more_than_needed_and_whole():
    assert actors_needed(SD15_LCM, rows_per_s=8 / 0.034) == 13  # 1.2 * 10.82
    assert actors_needed(SD15_LCM, rows_per_s=8 / 0.034, headroom=1.0) == 11
    assert actors_needed(Load("forward_states", (0.0,)), rows_per_s=100) == 1


def test_too_few_gpus_for_one_of_each_have_no_split():
    loads = [Load("forward_states", (0.01,)), Load("student_rollouts", (0.01, 0.02))]
    assert best_split(loads, gpus=3, worker_s={1: 0.03}) is None
    assert best_split(loads, gpus=4, worker_s={1: 0.03}).actors == {"forward_states": 1, "student_rollouts": 1}


def test_a_trainer_whose_actors_have_no_gpus_gets_them_all():
    split = best_split([], gpus=4, worker_s=dict.fromkeys((1, 2, 4), 0.1))
    assert (split.workers, split.actors, split.stall) == (4, {}, 0)
    assert split.rows_per_s == pytest.approx(40)


def test_fractions_of_gpus_buy_more_actors():
    whole = best_split([Load("a", (0.1,))], gpus=4, worker_s={1: 0.01})
    half = best_split([Load("a", (0.1,), gpus=0.5)], gpus=4, worker_s={1: 0.01})
    assert (whole.actors["a"], half.actors["a"]) == (3, 6)


@given(
    st.lists(st.floats(0.005, 0.2), min_size=1, max_size=3),
    st.floats(0.01, 0.1),
    st.integers(4, 11),
)
def test_no_other_split_trains_on_more_rows(seconds, worker_s, gpus):
    loads = [Load(f"role {i}", (s,)) for i, s in enumerate(seconds)]
    split = best_split(loads, gpus=gpus, worker_s=dict.fromkeys(range(1, gpus + 1), worker_s))
    every = itertools.product(range(1, gpus), repeat=len(loads) + 1)
    best = max(
        min(workers / worker_s, *(n / s for n, s in zip(actors, seconds, strict=True)))
        for workers, *actors in every
        if workers + sum(actors) <= gpus
    )
    assert split.rows_per_s == pytest.approx(best)
