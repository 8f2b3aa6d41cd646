"""metrics.jsonl: one record per line, flushed as it comes; the source of every other view of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["Journal", "parse_records", "read_after", "read_journal", "training_records"]

Record = dict[str, float]


class Journal:
    """Appends records; a line cut off by a crash is completed by a newline at the next start and then ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" if torn else "")

    def append(self, records: Sequence[Record]) -> None:
        """Write `records` and flush them."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read_journal(path: Path) -> list[Record]:
    """All records; lines that are not whole records are left out."""
    return read_after(path, 0)[0]


def read_after(path: Path, offset: int) -> tuple[list[Record], int]:
    """The records of whole lines beyond byte `offset`, and the offset behind them."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return parse_records(whole), offset + len(whole)


def parse_records(content: bytes) -> list[Record]:
    """The records of a journal's content; lines that are not whole records are left out."""
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
