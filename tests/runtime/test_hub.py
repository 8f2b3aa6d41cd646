"""Pins admission, stopping, restarts and what is measured as plain rules, without Ray."""

from __future__ import annotations

from ddil_ray.runtime.hub import Grant, HubState, Measured
from ddil_ray.training.cadence import Cadence


def test_a_block_is_not_admitted_until_its_phase_is_on_and_its_weights_are_there():
    hub = HubState()
    hub.incarnation_of("student")
    hub.begin(0)
    assert not hub.admits(0, -1)
    hub.phase, hub.version = 0, 0
    assert hub.admits(0, -5)
    assert hub.admits(0, 0)
    assert not hub.admits(0, 1)
    assert not hub.admits(1, 0)
    hub.version = 10
    assert hub.admits(0, 10)


def test_a_restart_voids_what_was_published_before_it():
    hub = HubState()
    for stream in ("forward", "student"):
        assert hub.incarnation_of(stream) == 1
    hub.begin(0)
    hub.phase, hub.version = 1, 30
    for stream in ("forward", "student"):
        assert hub.incarnation_of(stream) == 2
    assert hub.begun == 1
    hub.begin(16)
    assert (hub.begun, hub.start_step, hub.phase, hub.version) == (2, 16, -1, -1)


def test_all_ranks_stop_at_one_step_that_none_has_passed():
    hub = HubState()
    assert not hub.should_stop(4)
    assert not hub.should_stop(5)
    hub.request_stop()
    answers = {rank: next(step for step in range(5, 10) if hub.should_stop(step)) for rank in (0, 1)}
    assert answers == {0: 7, 1: 7}
    hub.request_stop()
    assert hub.stop_step == 7


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
