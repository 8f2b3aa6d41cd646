"""metrics.jsonl: one record per line, flushed as it comes; the source of every other view of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ddil_ray.errors import first_line
from ddil_ray.storage import room_at

__all__ = ["TIME", "Journal", "parse_records", "read_after", "read_journal", "training_records"]

Record = dict[str, float]
TIME = "time"
"""Seconds since 1970 at which a record was appended: trackers that get it later show it there."""


class Journal:
    """Appends records; a line cut off by a crash is completed by a newline at the next start and then ignored.

    Where the disk is full, records wait in memory and are appended with the next ones that can be: nobody stops.

    Args:
        path: of the file.
        say: tells the user that records wait, and that they no longer do.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self.path, self._say = path, say
        self._waiting: list[str] = []
        self._end, self._failing = path.stat().st_size if path.exists() else 0, False
        if self._end and not path.read_bytes().endswith(b"\n"):
            self._waiting.append("\n")
        self._write()

    @property
    def waiting(self) -> int:
        """Records that are not in the file yet."""
        return len(self._waiting)

    def append(self, records: Sequence[Record]) -> None:
        """Write `records` and flush them."""
        now = round(time.time(), 3)
        self._waiting += [json.dumps({**record, TIME: now}) + "\n" for record in records]
        if self._waiting:
            self._write()

    def _write(self) -> None:
        """Append what waits, all of it or none."""
        content = "".join(self._waiting).encode()
        try:
            with self.path.open("ab") as file:
                if self._failing:
                    file.truncate(self._end)  # what was written before the disk was full
                else:
                    self._end = file.tell()
                file.write(content)
        except OSError as error:
            if not self._failing:
                self._say(
                    f"{self.path} could not be written ({first_line(error)}; {room_at(self.path.parent)}). The run "
                    "goes on; its records wait in memory. Make room."
                )
            self._failing = True
            return
        if self._failing:
            self._say(f"{self.path} is written again, and has all records.")
        self._end, self._failing = self._end + len(content), False
        self._waiting.clear()


def read_journal(path: Path) -> list[Record]:
    """All records, without their times; lines that are not whole records are left out."""
    return parse_records(path.read_bytes()) if path.exists() else []


def read_after(path: Path, offset: int) -> tuple[list[Record], int]:
    """The records of whole lines beyond byte `offset`, with their times, and the offset behind them."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return _records(whole), offset + len(whole)


def parse_records(content: bytes) -> list[Record]:
    """The records of a journal's content, without their times; lines that are not whole records are left out."""
    return [{name: value for name, value in record.items() if name != TIME} for record in _records(content)]


def _records(content: bytes) -> list[Record]:
    records = []
    for line in content.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def training_records(records: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Those of training steps, in their order; of a step done again after a checkpoint the last time counts."""
    return sorted({r["step"]: r for r in records if "loss" in r}.values(), key=lambda r: r["step"])
