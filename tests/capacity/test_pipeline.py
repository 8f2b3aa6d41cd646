"""Pins the run in virtual time: against cases counted by hand, and by what must hold of any pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.capacity.pipeline import Stream, Update, forecast

STEPS = 60
EACH = np.arange(1, STEPS + 1)
"""A block per worker and step."""


def _stream(actors: int, block_s: float, **settings) -> Stream:
    blocks = int(settings.get("needed", EACH)[-1])
    settings = {"needed": EACH, "ready": 4, **settings}
    return Stream("forward", actors=actors, block_s=np.full(blocks, block_s), **settings)


def test_a_trainer_that_is_slower_than_its_actors_never_waits_once_it_has_begun():
    found = forecast([_stream(2, 1.0)], Update(2.0), ranks=1)
    assert found.waits.tolist() == [1.0] + [0.0] * (STEPS - 1)
    assert found.ends[:3].tolist() == [3.0, 5.0, 7.0]
    assert found.step_s == pytest.approx(2.0)
    assert found.stall == 0.0
    assert found.busy["forward"] == pytest.approx(0.25, abs=0.04)  # at the end nothing is left to do ahead


def test_a_trainer_that_is_faster_goes_at_its_actors_pace():
    """Three actors of 6 s give a block every 2 s; an update takes half of that."""
    found = forecast([_stream(3, 6.0)], Update(1.0), ranks=1)
    assert found.step_s == pytest.approx(2.0, rel=0.02)
    assert found.stall == pytest.approx(0.5, rel=0.05)
    assert found.busy["forward"] == pytest.approx(1.0, abs=0.02)


def test_actors_come_whole():
    """Two ranks need 2 blocks of 3 s per 4 s, so 1.5 actors: one gives two thirds of the speed, two are enough."""
    steps = [forecast([_stream(n, 3.0)], Update(4.0), ranks=2).step_s for n in (1, 2)]
    assert steps == pytest.approx([6.0, 4.0], rel=0.02)


def test_with_one_actor_and_nothing_ready_making_and_training_overlap_by_one_block():
    """The block behind the one in training may be made while it is trained on: the step is the longer of both."""
    found = forecast([_stream(1, 3.0, ready=0)], Update(2.0), ranks=1)
    assert found.step_s == pytest.approx(3.0, rel=0.02)


def test_a_burst_is_smoothed_by_blocks_that_lie_ready():
    """Four blocks every fourth step: an actor keeps up in the mean, and does so if it may work ahead."""
    bursts = np.repeat(np.arange(4, STEPS + 1, 4), 4)[:STEPS]
    stalls = [forecast([_stream(1, 1.0, needed=bursts, ready=n)], Update(1.2), ranks=1).stall for n in (0, 1, 2)]
    assert stalls[0] > stalls[1] > stalls[2]
    assert stalls[2] == 0.0


def test_blocks_wait_for_weights():
    """Each block needs the weights of the step before: rollout and update take turns, 1 s + 2 s."""
    found = forecast([_stream(4, 1.0, after=np.arange(STEPS))], Update(2.0), ranks=1)
    assert found.step_s == pytest.approx(3.0)
    lagging = forecast([_stream(4, 1.0, after=np.arange(STEPS))], Update(2.0, lag_s=0.5), ranks=1)
    assert lagging.step_s == pytest.approx(3.5)


def test_a_publication_keeps_the_trainer_at_every_nth_step():
    found = forecast([_stream(9, 1.0)], Update(2.0, every=4, publication_s=1.0), ranks=1)
    assert found.step_s == pytest.approx(2.25, rel=0.01)
    assert found.stall == 0.0


def test_labels_of_their_own_pool_are_a_second_station():
    """States take 1 s and labels 4 s: with three labellers the label station is the slower, at 4/3 s a block."""
    found = forecast([_stream(4, 1.0, label_s=4.0, labellers=3)], Update(0.5), ranks=1)
    assert found.step_s == pytest.approx(4 / 3, rel=0.03)


def test_ranks_wait_for_the_slowest_source():
    slow, fast = _stream(1, 5.0), replace(_stream(1, 0.1), name="student")
    found = forecast([fast, slow], Update(1.0), ranks=1)
    assert found.step_s == pytest.approx(5.0, rel=0.02)
    assert found.busy["forward"] > 0.95 > 0.1 > found.busy["student"]


pipelines = st.fixed_dictionaries(
    {
        "actors": st.integers(1, 6),
        "block_s": st.floats(0.1, 8),
        "update_s": st.floats(0.1, 4),
        "ranks": st.integers(1, 4),
        "ready": st.integers(0, 12),
    }
)


def _step_s(actors, block_s, update_s, ranks, ready) -> float:
    ends = forecast([_stream(actors, block_s, ready=ready)], Update(update_s), ranks=ranks).ends
    return float(ends[-1])


@given(pipelines)
def test_no_pipeline_beats_its_slowest_part(pipeline):
    p = pipeline
    assert _step_s(**p) >= max(p["update_s"], p["ranks"] * p["block_s"] / p["actors"]) * STEPS * 0.99 - p["block_s"]


@given(pipelines)
def test_more_actors_more_room_and_shorter_work_never_slow_it_down(pipeline):
    before = _step_s(**pipeline)
    for change in ({"actors": pipeline["actors"] + 1}, {"ready": pipeline["ready"] + 3}, {"block_s": 0.05}):
        assert _step_s(**{**pipeline, **change}) <= before + 1e-9
