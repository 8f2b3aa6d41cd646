"""Pins what the soak (`tests/soak/soak.py`) takes for broken in a journal."""

from __future__ import annotations

from soak.soak import broken_in


def _step(step, *, age=0, used=1.0):
    return {"step": step, "loss": 1.0, "staleness/max": age, "replay/reuse/student": used}


def _broken(*records):
    return broken_in(records, bound=8, reuse=1)


def test_going_on_from_the_newest_checkpoint_is_sound():
    saved, weights = {"step": 4, "checkpoint/step": 4}, {"step": 4, "sync/bytes": 1}
    assert not _broken(_step(2), _step(4), saved, _step(6), {"step": 6, "sync/bytes": 1}, weights, _step(6))


def test_going_on_from_an_older_checkpoint_is_a_lost_one():
    (text,) = _broken(_step(2), _step(4), {"step": 4, "checkpoint/step": 4}, _step(4))
    assert "before the checkpoint at 4" in text


def test_rows_too_old_or_used_too_often_are_told():
    assert len(_broken(_step(2, age=9), _step(4, used=1.5))) == 2


def test_weights_go_back_to_a_checkpoint_and_no_further():
    saved, newer = {"step": 4, "checkpoint/step": 4}, {"step": 6, "sync/bytes": 1}
    (text,) = _broken(_step(4), saved, newer, {"step": 2, "sync/bytes": 1})
    assert "Weights of step 2 came after those of 6" in text
