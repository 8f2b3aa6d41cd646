"""What every format of images and captions is read as: shards, and rows with a condition each.

A shard is what one process looks through: a tar, a Parquet file, a metadata file, a class folder. Its rows keep their
order, and a row says where its image lies, so that any part of a shard can be read alone.
"""

from __future__ import annotations

import difflib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from ddil_ray.data.images import MOST_CLASSES
from ddil_ray.errors import DataError, RunFailedError, first_line
from ddil_ray.storage import open_url

__all__ = ["Condition", "Entry", "Missing", "Reader", "Row", "Shard", "rows_of", "table_of"]

_MOST_DIGITS = 9
"""Of a class id in a text: Python refuses to read very long numbers."""
_HEAD = 100
"""Entries that the names of fields are taken from."""


class Shard(NamedTuple):
    """A part of the source."""

    path: str
    """Below the source."""
    size: int
    """Bytes, to notice that a source has changed."""
    label: int = -1
    """Class id of all its rows, where it is a class folder."""


class Entry(NamedTuple):
    """A row as it lies in the source."""

    name: str
    """Unique in the source."""
    fields: dict[str, Any]
    place: int
    """With `within`, where the image lies, in the reader's own terms; below 0 if nowhere."""
    within: int


class Row(NamedTuple):
    """A row with its condition: a stripped text or a class id."""

    name: str
    condition: str | int
    place: int
    within: int


class Missing(NamedTuple):
    """A row that is left out, and why."""

    name: str
    reason: str


def table_of(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table, to be kept; what is no text in UTF-8, such as half an emoji, becomes `?`."""
    rows = [row._replace(name=_text(row.name), condition=_text(row.condition)) for row in rows]
    condition = pa.large_string() if isinstance(rows[0].condition, str) else pa.int64()
    kinds = (pa.string(), condition, pa.int64(), pa.int64())
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    return pa.table(columns, names=Row._fields)


def _text(text: Any) -> Any:
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


def rows_of(table: pa.Table) -> list[Row]:
    """The rows that `table_of` made a table of."""
    return [Row(**row) for row in table.to_pylist()]


@dataclass(frozen=True)
class Condition:
    """Which field of an entry is its condition."""

    classes: bool
    column: str | None
    """None for the first of the usual names that is there."""

    @property
    def setting(self) -> str:
        """What it is set by."""
        return "data.label_column" if self.classes else "data.caption_column"

    def pick(self, found: Sequence[str], where: str) -> str:
        """The field to read, of those `found`.

        Raises:
            DataError: not there; names the nearest.
        """
        usual = ("cls", "label", "class") if self.classes else ("txt", "text", "caption", "prompt")
        wanted = [self.column] if self.column is not None else list(usual)
        picked = next((name for name in wanted if name in found), None)
        if picked is None:
            close = [c for name in wanted for c in difflib.get_close_matches(name, found, n=1)]
            raise DataError(
                f"`{self.setting}` must be a field of the data, but {where} has {', '.join(found) or 'none'} and not "
                f"{' or '.join(map(repr, wanted))}." + (f" Did you mean {close[0]!r}?" if close else "")
            )
        return picked

    def of(self, value: Any) -> str | int | None:
        """The condition in a field's `value`; None where there is none."""
        if not self.classes:
            return (value.strip() or None) if isinstance(value, str) else None
        if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) <= _MOST_DIGITS:
            value = int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        return int(value) if whole and 0 <= value < MOST_CLASSES else None


@dataclass(frozen=True)
class Reader(ABC):
    """One format of sources. Small, and sent to every process. Its files are shards at first, by path and size."""

    format: ClassVar[str]
    """As messages call it."""

    source: str
    condition: Condition
    image_column: str = "image"
    key: str = field(default="", kw_only=True)
    """The field that is the condition, once it has been picked."""
    images: bool = field(default=True, kw_only=True)
    """Whether there are images."""

    @cached_property
    def fs(self) -> Any:
        """The filesystem of the source."""
        return open_url(self.source)[0]

    @cached_property
    def root(self) -> str:
        """The source on its filesystem."""
        return str(open_url(self.source)[1]).rstrip("/")

    def path(self, name: str) -> str:
        """Where what is called `name` lies on the filesystem; the source itself has an empty name."""
        return f"{self.root}/{name}" if name else self.root

    def title(self, shard: Shard) -> str:
        """What messages and rows call a shard."""
        return shard.path or self.root.rpartition("/")[2]

    @abstractmethod
    def shards(self, files: Sequence[Shard]) -> list[Shard]:
        """The shards of a source of `files`, in an order that is always the same."""

    def check(self, shards: Sequence[Shard]) -> None:  # noqa: B027 - most formats can tell nothing
        """Check all shards for what can be told without looking through them; `key` has been picked.

        Raises:
            DataError: a shard is cut short, lacks a column or has another type, or there is no row; names it.
        """

    def check_there(self, shard: Shard) -> None:
        """Check that a shard is where it was, since a row of it could not be read: storage, credentials or a mount may
        be gone, which is no fault of the row.

        Raises:
            RunFailedError: it is not.
        """
        try:
            self.fs.invalidate_cache()
            self.fs.info(self.path(shard.path))
        except Exception as error:  # every filesystem has errors of its own
            raise RunFailedError(
                f"`data.source` must stay readable while it is prepared, but {self.title(shard)} of {self.source} no "
                f"longer is ({first_line(error)}). See that it is there and that credentials are valid; the same "
                "command goes on."
            ) from error

    @abstractmethod
    def entries(self, shard: Shard) -> Iterator[Entry]:
        """All rows of a shard.

        Raises:
            DataError: the shard cannot be read.
        """

    def fields(self, shard: Shard) -> list[str]:
        """Names of the fields of a shard's rows."""
        head = itertools.islice(self.entries(shard), _HEAD)
        return list(dict.fromkeys(name for entry in head for name in entry.fields))

    @abstractmethod
    def contents(self, shard: Shard, rows: Iterable[Row]) -> Iterator[Callable[[], Any]]:
        """For each row what reads its image: bytes of an image file, or an array. They may be called by threads."""

    def scan(self, shard: Shard) -> Iterator[Row | Missing]:
        """All rows of a shard with their conditions."""
        kind = "class id" if self.condition.classes else "caption"
        for name, fields, place, within in self.entries(shard):
            condition = self.condition.of(fields.get(self.key))
            if place < 0 or condition is None:
                yield Missing(name, "no image" if place < 0 else f"no {kind}")
            else:
                yield Row(name, condition, place, within)

    def ending(self, files: Sequence[Shard], *suffixes: str) -> list[Shard]:
        """Those of `files` whose names end so."""
        return [file for file in files if self.title(file).lower().endswith(suffixes)]
