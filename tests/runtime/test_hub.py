"""Pins admission, stopping and restarts as plain rules, without Ray."""

from __future__ import annotations

from ddil_ray.runtime.hub import HubState


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
