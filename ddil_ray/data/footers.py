"""What Parquet files say of themselves in their footers, which are read of all files before any data is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ddil_ray.errors import DataError, first_line

__all__ = ["IDS", "IMAGES", "TENSORS", "TEXTS", "Footer", "Kinds", "check_column", "read_footers", "unreadable"]

_READERS = 16
"""Threads: they wait for storage."""


class Footer(NamedTuple):
    """Of one file."""

    name: str
    """As messages call the file."""
    schema: pa.Schema
    rows: int


def read_footers(fs: Any, files: Mapping[str, str]) -> list[Footer]:
    """The footers of `files`, name by path; of each file its end alone is read.

    Raises:
        DataError: no Parquet, or cut short; names the first such file.
    """
    with ThreadPoolExecutor(_READERS) as threads:
        return list(threads.map(partial(_read, fs), files, files.values()))


def _read(fs: Any, path: str, name: str) -> Footer:
    try:
        with fs.open(path, "rb") as file:
            metadata = pq.read_metadata(file)
            rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            return Footer(name, metadata.schema.to_arrow_schema(), rows)
    except Exception as error:  # Arrow's, or the filesystem's own
        raise unreadable(name, error) from None


def unreadable(name: str, error: BaseException) -> DataError:
    """What to raise where the file `name` cannot be read."""
    return DataError(
        f"`data.source` must hold whole Parquet files, but {name} cannot be read ({first_line(error)}). Write it "
        "again, or remove it."
    )


Kinds = dict[str, Callable[[pa.DataType], bool]]
"""What a column may hold: words for messages, and whether a type is that. The first that fits counts."""


def check_column(footers: Sequence[Footer], column: str, setting: str, kinds: Kinds, remedy: str = "") -> None:
    """Check that every file that has rows has `column`, of one of `kinds`, and all of the same kind and size.

    Args:
        footers: of all files.
        column: its name.
        setting: that names it.
        kinds: that it may be of. Within a kind, numbers of any width are alike: they are cast when they are read.
        remedy: what to do where it is of none.

    Raises:
        DataError: names the file, what it has and what was expected.
    """
    first: tuple[str, str, tuple[int, ...] | None] | None = None
    for name, schema, rows in footers:
        if not rows:
            continue
        _check_there(name, schema.names, column, setting)
        found = schema.field(column).type
        if pa.types.is_null(found):
            continue  # every value is missing, which is said of its row
        kind = next((words for words, fits in kinds.items() if fits(found)), None)
        if kind is None:
            raise DataError(
                f"`{setting}` {column!r} must hold {_either(list(kinds))}, but is {found} in {name} instead."
                + (f" {remedy}" if remedy else "")
            )
        size = _size(found)
        if first is None:
            first = name, kind, size
        elif first[1:] != (kind, size):
            raise DataError(
                f"`{setting}` {column!r} must be alike in all files, but holds {_worded(*first[1:])} in {first[0]} and "
                f"{_worded(kind, size)} in {name}. Write all files with one schema."
            )


def _check_there(name: str, columns: Sequence[str], column: str, setting: str) -> None:
    if column not in columns:
        close = difflib.get_close_matches(column, columns, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " Name another column, or write the file again."
        raise DataError(
            f"`{setting}` must be a column of every file, but {name} has {', '.join(columns) or 'none'} and not "
            f"{column!r}.{hint}"
        )
    if columns.count(column) > 1:
        raise DataError(
            f"`{setting}` must be one column of every file, but {name} has {column!r} {columns.count(column)} times. "
            "Rename the others."
        )


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _worded(kind: str, size: tuple[int, ...] | None) -> str:
    return f"{kind} of shape {size}" if size else kind


def _size(kind: pa.DataType) -> tuple[int, ...] | None:
    """Of a type whose values are all of one."""
    if isinstance(kind, pa.FixedShapeTensorType):
        return tuple(kind.shape)
    if pa.types.is_fixed_size_list(kind):
        return (kind.list_size, *(_size(kind.value_type) or ()))
    return None


def _encoded(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _structs(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(f.name == "bytes" and _encoded(f.type) for f in kind.fields)


def _arrays(kind: pa.DataType) -> bool:
    """Lists of lists of numbers, once or twice more."""
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth in (2, 3) and (pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _ids(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind))


def _texts(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _tensors(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.FixedShapeTensorType) and pa.types.is_floating(kind.value_type)


IMAGES: Kinds = {"encoded images": _encoded, "structs with the bytes of encoded images": _structs, "arrays": _arrays}
IDS: Kinds = {"whole numbers": _ids}
TEXTS: Kinds = {"text": _texts}
TENSORS: Kinds = {"tensors of numbers": _tensors}
