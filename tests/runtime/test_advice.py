"""Pins what a waiting trainer is told to change."""

from __future__ import annotations

import pytest

from ddil_ray.runtime.advice import Advisor, advice


def _record(stall=0.4, *, source="student", **actors):
    record = {"trainer/stall_share": stall, f"trainer/stall_share/{source}": stall, "trainer/stall_share/forward": 0.01}
    return record | {f"actors/{name}/{source}": share for name, share in actors.items()}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (_record(0.01, busy_share=1.0), None),
        (_record(), None),
        (_record(busy_share=0.9, waits_for_weights=0.05), "`student_rollouts.num_actors`"),
        (_record(busy_share=0.9, source="mixed"), "`student_rollouts.num_actors`"),
        (_record(busy_share=0.9, source="teacher"), "`teacher_rollouts.num_actors`"),
        (_record(busy_share=0.3, waits_for_weights=0.6), "`replay.max_staleness`"),
        (_record(busy_share=0.3, waits_for_trainer=0.6), "`replay.ahead`"),
        (_record(busy_share=0.6) | {"actors/busy_share/labels/student": 0.9}, "`labels.num_actors`"),
    ],
)
def test_the_advice_names_what_is_short(record, expected):
    found = advice(record)
    assert found is None if expected is None else expected in found


def test_it_is_said_once_and_not_while_actors_start():
    said = []
    advisor = Advisor(said.append)
    for _ in range(2):
        advisor.read(_record(busy_share=0.9))
    advisor.read(_record(0.0, busy_share=0.9))
    assert said == []
    for _ in range(10):
        advisor.read(_record(busy_share=0.9))
    (line,) = said
    assert line.startswith("The trainer waits 40% of its time. It is short of student states")
