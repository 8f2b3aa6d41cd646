"""Pins admission, stopping, restarts and what is measured as plain rules, without Ray."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.runtime.admission import Ask, Stream, StreamPlan
from ddil_ray.runtime.hub import Grant, HubState
from ddil_ray.runtime.measured import Measured
from ddil_ray.training.cadence import Cadence


def _stream(*, needed, versions=None, actors=2, ready=3):
    n = len(needed)
    plan = StreamPlan(
        phases=np.zeros(n, int),
        needed=np.array(needed),
        versions=np.full(n, -1) if versions is None else np.array(versions),
        indices=np.arange(n),
        progress=np.zeros(n),
    )
    return Stream(plan, actors, ready)


def _hub(stream, start_step=0):
    hub = HubState()
    hub.begin(start_step, {"student": stream}, start_step, now=1)
    return hub


def _lacks(hub, block, phase=0):
    return hub.lacks(Ask("student", phase, block, known=(-1, -1)))


def test_a_block_is_not_admitted_until_its_phase_is_on_and_its_weights_are_there():
    hub = _hub(_stream(needed=[0, 0, 5, 9], versions=[-5, 0, 1, 10]))
    assert _lacks(hub, 0) == "phase"
    hub.phase, hub.version = 0, 0
    assert [_lacks(hub, block) for block in range(4)] == [None, None, "weights", "weights"]
    assert _lacks(hub, 0, phase=1) == "phase"
    hub.version = 10
    assert [_lacks(hub, block) for block in range(4)] == [None] * 4


def test_labels_wait_for_their_phase_alone():
    hub = _hub(_stream(needed=[50], versions=[40]))
    assert _lacks(hub, None) == "phase"
    hub.phase, hub.version = 0, 0
    assert _lacks(hub, None) is None


def test_a_block_beyond_the_plan_is_never_made():
    """Requests are those of a whole run; where training goes on with fewer, nobody takes the rest."""
    hub = _hub(_stream(needed=[0, 8]))
    hub.phase, hub.version, hub.seen_step = 0, 0, 1000
    assert [_lacks(hub, block) for block in (1, 2, 7)] == [None, "credit", "credit"]


@given(
    steps=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    actors=st.integers(1, 5),
    ready=st.integers(1, 6),
    step=st.integers(0, 60),
)
def test_credits_bound_what_is_ahead_and_never_hold_back_what_is_needed(steps, actors, ready, step):
    """Whatever the plan: at most actors + ready blocks are begun that no step up to the trainer's needs, and every
    block that such a step needs may be made."""
    needed = np.cumsum(steps)
    hub = _hub(_stream(needed=needed, actors=actors, ready=ready))
    hub.phase = hub.version = 0
    hub.seen_step = step
    admitted = [block for block in range(len(needed)) if _lacks(hub, block) is None]
    assert admitted == list(range(len(admitted)))
    ahead = [block for block in admitted if needed[block] > step]
    assert len(ahead) <= actors + ready
    assert set(np.flatnonzero(needed <= step).tolist()) <= set(admitted)


def test_a_trainer_that_begins_later_voids_what_was_published_before_it():
    hub = _hub(_stream(needed=[0]))
    first = hub.begun
    hub.phase, hub.version = 1, 30
    assert hub.begin(16, {}, 20, now=first - 1) > first  # a clock that was set back
    assert (hub.start_step, hub.phase, hub.version, hub.seen_step) == (16, -1, -1, 20)


def test_actors_wait_for_no_clock_where_a_hub_starts_again_on_a_machine_whose_clock_is_behind():
    """Their streams' numbers are of the machine before it; plans are given where `begun` is no smaller."""
    ahead, behind = 1000, 10
    hub = HubState()
    of_streams = hub.incarnation(now=ahead)
    token = hub.begin(0, {}, 0, now=ahead + 1)
    again = HubState()
    assert again.begin(0, {}, 0, now=behind, before=token) >= of_streams
    of_the_next = again.incarnation(now=behind)
    assert of_the_next > again.begun  # they wait for the trainer that begins next
    assert again.begin(0, {}, 0, now=behind) >= of_the_next


def test_what_actors_did_is_told_in_shares_of_their_time():
    hub = _hub(_stream(needed=[0, 1, 2, 3]))
    hub.phase = hub.version = 0
    assert hub.work() == {"actors/blocks_ahead/student": 0}
    hub.granted(Ask("student", 0, 0, (-1, -1)))
    hub.works["student"].waited_s["credit"] += 1.0
    hub.granted(Ask("student", 0, 1, (0, 0), busy_s=3.0))
    assert hub.work() == {
        "actors/blocks_ahead/student": 1,
        "actors/busy_share/student": 0.75,
        "actors/waits_for_weights/student": 0.0,
        "actors/waits_for_trainer/student": 0.25,
        "actors/block_s/student": 1.5,
    }
    assert hub.work() == {"actors/blocks_ahead/student": 1}


def test_rows_are_counted_and_what_lies_ahead_is_weighed_by_the_newest_block_that_went_through_all_pools():
    hub = _hub(_stream(needed=[0, 1, 2, 3]))
    hub.phase = hub.version = 0
    for block in range(3):
        hub.granted(Ask("student", 0, block, (0, 0), busy_s=1.0, rows=16 * (block > 0), size=1000 * (block > 0)))
    assert hub.work().items() >= {"rows/made/student": 32.0, "actors/bytes_ahead/student": 2000}.items()
    hub.granted(Ask("labels/student", 0, None, (0, 0), busy_s=1.0, rows=16, size=1500))
    record = hub.work()
    assert record["actors/bytes_ahead/student"] == 3000
    assert "rows/made/student" not in record
    assert record["rows/made/labels/student"] == 16.0


def test_all_ranks_stop_at_one_step_that_none_has_passed():
    hub = HubState()
    hub.begin(0, {}, 3, now=1)
    assert hub.wish(4) is None
    assert hub.wish(5) is None
    hub.request_stop()
    answers = {rank: next(step for step in range(5, 10) if hub.wish(step) == "stop") for rank in (0, 1)}
    assert answers == {0: 7, 1: 7}
    hub.request_stop()
    assert hub.stop_step == 7


def test_a_group_that_begins_anew_stops_where_it_is_and_not_where_the_one_before_was_to():
    hub = HubState()
    hub.begin(0, {}, 500, now=1)
    hub.request_stop()
    hub.begin(400, {}, 400, now=2)
    hub.request_stop()
    assert next(step for step in range(400, 600) if hub.wish(step) == "stop") == 402


def test_all_ranks_save_once_at_one_step_that_none_has_passed_and_go_on():
    hub = HubState()
    hub.begin(0, {}, 3, now=1)
    hub.wish(5)
    hub.request_save()
    assert [[step for step in range(5, 12) if hub.wish(step) == "save"] for rank in (0, 1)] == [[7], [7]]
    hub.request_save()
    hub.begin(0, {}, 3, now=2)
    assert {hub.wish(step) for step in range(3, 20)} == {None}, "a group that began anew has had no notice"


def test_a_hub_that_was_started_again_names_no_step_before_it_knows_how_far_ranks_are():
    hub = HubState()
    hub.request_stop()
    hub.request_save()
    assert [hub.wish(step) for step in (40, 41)] == [None, None]
    hub.begin(0, {}, 42, now=1)
    hub.request_stop()
    assert hub.stop_step == 44


def test_a_hub_that_was_started_again_lets_a_block_beyond_the_plan_wait():
    assert HubState().lacks(Ask("student", -1, 7, known=(-1, -1))) == "phase"


def test_records_beyond_what_is_kept_leave_oldest_first():
    hub = HubState()
    for step in range(10_005):
        hub.records.append({"step": step})
    assert len(hub.records) == 10_000
    assert hub.records[0]["step"] == 5


def _taken(measured, publications):
    """(phase, version) that a monitor gets which always waits."""
    taken = []
    for phase, version in publications:
        measured.published(Grant(phase, version))
        if (grant := measured.take()) is not None:
            taken.append((grant.phase, grant.version))
    return taken


def test_a_monitor_gets_the_first_weights_of_a_phase_and_then_those_that_are_newer_enough():
    measured = Measured(Cadence(every=10))
    assert _taken(measured, [(0, v) for v in range(0, 40, 4)] + [(1, 40), (1, 44), (1, 52)]) == [
        (0, 0), (0, 12), (0, 24), (0, 36), (1, 40), (1, 52)
    ]  # fmt: skip


def test_a_slow_monitor_gets_the_first_weights_and_then_the_newest():
    measured = Measured(Cadence(every=10))
    for version in range(0, 28, 4):
        measured.published(Grant(0, version))
    assert measured.take() == Grant(0, 0)
    assert measured.take() == Grant(0, 24)
    assert measured.take() is None


def test_at_the_end_a_monitor_gets_the_newest_weights_unless_it_has_them():
    measured = Measured(Cadence(every=10))
    for version in (0, 4):
        measured.published(Grant(0, version))
        measured.take()
    measured.end()
    assert (measured.take(), measured.take()) == (Grant(0, 4), None)
    unstarted = Measured(Cadence(every=10))
    for version in (0, 4):
        unstarted.published(Grant(0, version))
    unstarted.end()
    assert (unstarted.take(), unstarted.take()) == (Grant(0, 4), None)
    busy = Measured(Cadence(every=10))
    busy.published(Grant(0, 0))
    assert busy.take() == Grant(0, 0)
    busy.end()
    assert busy.take() is None


def test_training_that_goes_back_to_an_earlier_phase_is_measured_there_again():
    measured = Measured(Cadence(every=10))
    assert _taken(measured, [(0, 0), (1, 20), (0, 12), (0, 16), (1, 20)]) == [(0, 0), (1, 20), (0, 12), (1, 20)]


def test_nothing_is_held_where_nothing_is_measured():
    measured = Measured(None)
    assert _taken(measured, [(0, 0), (0, 20)]) == []
    measured.end()
    assert measured.take() is None
