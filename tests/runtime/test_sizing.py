"""Pins how pools are sized: wishes, bounds, and a rule that finds the number of actors that the trainer needs."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.runtime.sizing import Load, Rule, Sizing

IDLE = {"trainer/stall_share": 0.0, "trainer/stall_share/student": 0.0}, {"student": 1.0}
"""Of ten seconds."""


class _Pipeline:
    """A trainer that takes one block per second, and actors that need `work_s` for one: credits as the hub gives them.

    Time goes from block to block; a block may be begun when fewer than `actors + 2` are begun and not yet needed.
    """

    def __init__(self, work_s: float, *, spread: float, seed: int = 0) -> None:
        self.work_s, self.spread, self.random = work_s, spread, random.Random(seed)
        self.now = self.stalled = self.busy = 0.0
        self.ready: list[float] = []
        """When each block that was begun will be there, in order."""
        self.free: list[float] = []
        """When each actor will be free."""

    def resize(self, actors: int) -> None:
        while len(self.free) < actors:
            heapq.heappush(self.free, self.now)
        while len(self.free) > actors:
            heapq.heappop(self.free)

    def step(self) -> None:
        """One update of the trainer."""
        while len(self.ready) < len(self.free) + 2:
            begun = max(self.now, heapq.heappop(self.free))
            took = self.work_s * self.random.lognormvariate(0, self.spread)
            self.busy += took
            self.ready.append(begun + took)
            heapq.heappush(self.free, begun + took)
        there = self.ready.pop(0)
        self.stalled += max(0.0, there - self.now)
        self.now = max(self.now, there) + 1.0

    def record(self, steps: int) -> tuple[dict[str, float], dict[str, float]]:
        """What the trainer tells of `steps` updates, and the seconds that actors worked."""
        since, self.stalled, self.busy = self.now, 0.0, 0.0
        for _ in range(steps):
            self.step()
        stall = self.stalled / (self.now - since)
        return {"trainer/stall_share": stall, "trainer/stall_share/student": stall}, {"student": self.busy}


def _sizes(work_s, *, start, spread=0.15, seed=0, records=600, later=None):
    """The size after every record of 10 updates."""
    sizing, pipeline, sizes = Sizing({"student": (1, 64)}), _Pipeline(work_s, spread=spread, seed=seed), []
    sizing._pools["student"].wanted = start
    for i in range(records):
        if later is not None and i == records // 2:
            pipeline.work_s = later
        targets, _ = sizing.report({"student": len(pipeline.free)})
        pipeline.resize(targets["student"])
        sizing.report({"student": targets["student"]})
        sizing.observe(*pipeline.record(10), now=pipeline.now)
        sizes.append(targets["student"])
    return sizes


def _changes(sizes):
    return sum(a != b for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("start", [1, 40])
@pytest.mark.parametrize("work_s", [0.3, 0.9, 2.5, 7.0, 20.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_rule_finds_the_number_of_actors_that_is_needed_and_stays_there(work_s, start, seed):
    """One block a second of `work_s` each needs `work_s` actors: at least those, and head-room of a third or one."""
    sizes = _sizes(work_s, start=start, seed=seed)
    assert all(work_s <= size <= max(work_s + 1.5, 1.35 * work_s) for size in sizes[200:])
    assert _changes(sizes[200:]) <= 2
    assert _changes(sizes) <= 15


@pytest.mark.parametrize(("before", "after"), [(2.0, 8.0), (8.0, 2.0)])
def test_the_rule_follows_a_load_that_changes(before, after):
    sizes = _sizes(before, start=1, later=after)
    for size, needed in ((sizes[299], before), (sizes[-1], after)):
        assert needed <= size <= 1.35 * needed + 1


def test_actors_that_wait_themselves_are_not_added_to():
    """The trainer waits for something else then: for a publication, or the network."""
    assert Rule().size(4, Load(stall=0.3, stall_all=0.3, busy=0.2)) == 4


def test_a_pool_also_grows_for_the_pace_that_the_trainer_will_have_when_another_source_is_cured():
    assert Rule().size(4, Load(stall=0.05, stall_all=0.5, busy=0.9)) == 8
    assert Rule().size(8, Load(stall=0.0, stall_all=0.5, busy=0.4)) == 8


@given(
    actors=st.integers(1, 100),
    stall=st.floats(0, 1),
    other=st.floats(0, 1),
    busy=st.floats(0, 1),
    too_few=st.integers(0, 100),
)
def test_the_rule_never_goes_below_one_nor_beyond_twice(actors, stall, other, busy, too_few):
    size = Rule().size(actors, Load(stall, min(1.0, stall + other), busy), too_few=too_few)
    assert 1 <= size <= 2 * actors
    assert size >= actors or stall <= Rule().stalls


def test_a_wish_is_what_the_executor_gets_and_the_rule_leaves_it_alone():
    sizing = Sizing({"student": (1, 1), "labels/student": (1, 4)})
    sizing.resize({"student": (3, 3)})
    targets, changed = sizing.report({"student": 1, "labels/student": 1})
    assert targets == {"student": 3, "labels/student": 1}
    assert changed == {"actors/count/student": 1.0, "actors/count/labels/student": 1.0}
    for now in range(0, 1000, 10):
        sizing.observe(*IDLE, now=float(now))
    targets, changed = sizing.report({"student": 3, "labels/student": 1})
    assert targets["student"] == 3
    assert changed == {"actors/count/student": 3.0}


def test_a_rule_that_is_fixed_by_a_wish_can_be_given_back():
    sizing = Sizing({"student": (1, 8)})
    sizing.resize({"student": (6, 6)})
    sizing.report({"student": 6})
    sizing.resize({"student": (1, 8)})
    for now in range(0, 1000, 10):
        sizing.observe(*IDLE, now=float(now))
        target = sizing.report({"student": 6})[0]["student"]
    assert target < 6


def test_actors_that_the_cluster_does_not_start_are_not_added_to():
    busy = {"trainer/stall_share": 0.3, "trainer/stall_share/student": 0.3}, {"student": 10.0}
    sizing = Sizing({"student": (1, 8)})
    sizing.report({"student": 1})
    for now in range(0, 1000, 10):
        sizing.observe(*busy, now=float(now))
        targets, _ = sizing.report({"student": 1})
    assert targets == {"student": 2}


def test_a_restarted_stream_gets_the_size_that_it_had():
    sizing = Sizing({"student": (1, 1)})
    sizing.resize({"student": (4, 4)})
    sizing.report({"student": 4})
    assert sizing.report({"student": 1})[0] == {"student": 4}


def test_pools_that_are_at_work_keep_their_sizes_where_a_hub_is_new_to_them():
    sizing = Sizing({"student": (2, 16), "teacher": (1, 1)})
    assert sizing.report({"student": 10, "teacher": 3})[0] == {"student": 10, "teacher": 1}
    assert sizing.actors("student") == 10
