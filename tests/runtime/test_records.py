"""Pins what becomes of the records of several ranks."""

from __future__ import annotations

from ddil_ray.runtime.records import Ranks


def _record(step, stall, **more):
    return {"step": step, "trainer/stall_share": stall, "trainer/stall_share/student": stall, **more}


def test_a_trainer_waits_as_long_as_its_slowest_rank_and_is_as_fast_as_all_together():
    ranks = Ranks()
    first = _record(2, 0.0, loss=1.0) | {"throughput/samples_per_s": 8.0, "staleness/max": 3.0}
    last = _record(2, 0.5, loss=2.0) | {"throughput/samples_per_s": 8.0, "staleness/max": 5.0, "only/here": 1.0}
    first |= {"rows/dropped/student": 3.0}
    last |= {"rows/dropped/student": 1.0, "rows/expired/student": 1.0}
    assert ranks.add(last, 1, 2) is None
    assert ranks.add(first, 0, 2) == _record(2, 0.5, loss=1.0) | {
        "throughput/samples_per_s": 16.0,
        "staleness/max": 5.0,
        "rows/dropped/student": 4.0,
        "rows/expired/student": 1.0,
    }


def test_a_rank_that_is_ahead_waits_for_the_others_and_what_lacks_a_rank_is_left_out():
    ranks = Ranks()
    assert [ranks.add(_record(step, 0.1), 0, 2) for step in (2, 4, 6)] == [None] * 3
    assert ranks.add(_record(4, 0.3), 1, 2) == _record(4, 0.3)
    assert ranks.add(_record(2, 0.3), 1, 2) is None
    assert ranks.add(_record(6, 0.0), 1, 2) == _record(6, 0.1)


def test_ranks_that_begin_anew_are_not_mixed_with_those_before():
    ranks = Ranks()
    ranks.add(_record(2, 0.9), 1, 2)
    ranks.clear()
    assert ranks.add(_record(2, 0.1), 0, 2) is None
    assert ranks.add(_record(2, 0.2), 1, 2) == _record(2, 0.2)


def test_one_rank_has_the_record_of_all():
    assert Ranks().add(_record(2, 0.1), 0, 1) == _record(2, 0.1)
