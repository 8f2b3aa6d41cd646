"""What a trainer that waits is short of, read from its own records."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["Advisor", "advice"]

_STALLS = 0.05
"""Share of the trainer's time spent waiting from which it is worth a word."""
_RECORDS = 3
"""Records in a row that must say the same: the first ones wait for actors to start."""
_ROLES = {
    "forward": "forward_states",
    "student": "student_rollouts",
    "mixed": "student_rollouts",
    "teacher": "teacher_rollouts",
}


def advice(record: Mapping[str, float]) -> str | None:
    """What to change so that the trainer waits less; None where it does not wait, or its actors have not worked yet."""
    if record.get("trainer/stall_share", 0.0) < _STALLS:
        return None
    name = max(_ROLES, key=lambda source: record.get(f"trainer/stall_share/{source}", 0.0))
    pools = {_ROLES[name]: name, "labels": f"labels/{name}"}
    busy = {role: record[key] for role, p in pools.items() if (key := f"actors/busy_share/{p}") in record}
    if not busy:
        return None
    if record.get(f"actors/waits_for_weights/{name}", 0.0) > 1 / 3:
        return f"Its {name} states wait for newer weights: raise `replay.max_staleness`, or lower `sync.every`."
    role = max(busy, key=busy.__getitem__)
    if busy[role] > 1 / 2:
        return f"It is short of {name} states, whose actors hardly wait: raise `{role}.num_actors` (`ddil-ray scale`)."
    return f"It is short of {name} states, though their actors wait for it: raise `replay.ahead`."


class Advisor:
    """Says what a run is short of, once, when several records in a row agree."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._last, self._times = say, "", 0

    def read(self, record: Mapping[str, float]) -> None:
        """Take in a record of the trainer."""
        found = advice(record) or ""
        self._times = self._times + 1 if found == self._last else 1
        self._last = found
        if found and self._times == _RECORDS:
            self._say(f"The trainer waits {record['trainer/stall_share']:.0%} of its time. {found}")
