"""Parquet files with a column of images, or of prompts alone."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddil_ray.errors import DataError
from ddil_ray.prepare.rows import Entry, Reader, Row, Shard

__all__ = ["ParquetFiles"]

_BATCH = 64
"""Rows in memory at once."""


class ParquetFiles(Reader):
    """A row's place is its row group. Groups of more than some thousand images cost time: each item reads through its
    group from the start."""

    format = "parquet"

    def shards(self, files: Sequence[Shard]) -> list[Shard]:
        """See `Reader.shards`."""
        return self.ending(files, ".parquet")

    def fields(self, shard: Shard) -> list[str]:
        """See `Reader.fields`."""
        with self._opened(shard) as file:
            return list(file.schema_arrow.names)

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """See `Reader.entries`."""
        with self._opened(shard) as file:
            self._known(file.schema_arrow.names, self.key, self.condition.setting, shard)
            number = 0
            for group in range(file.num_row_groups):
                for within, value in enumerate(_values(file, group, self.key)):
                    yield Entry(f"{self.title(shard)}:{number}", {self.key: value()}, group, within)
                    number += 1

    def contents(self, shard: Shard, rows: Iterable[Row]) -> Iterator[Callable[[], Any]]:
        """See `Reader.contents`. A row group is read from its start to the last row that is wanted."""
        with self._opened(shard) as file:
            self._known(file.schema_arrow.names, self.image_column, "data.image_column", shard)
            for group, members in itertools.groupby(rows, key=lambda row: row.place):
                wanted = {row.within for row in members}
                values = itertools.islice(_values(file, group, self.image_column), max(wanted) + 1)
                yield from (value for within, value in enumerate(values) if within in wanted)

    def could_hold_images(self, shard: Shard) -> bool:
        """Whether some column is neither numbers nor text."""
        with self._opened(shard) as file:
            kinds = [field.type for field in file.schema_arrow]
        tests = (pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary)
        return any(isinstance(kind, pa.BaseExtensionType) or any(test(kind) for test in tests) for kind in kinds)

    def check_image_column(self, shard: Shard) -> None:
        """Check that there are images.

        Raises:
            DataError: no such column; names the nearest.
        """
        self._known(self.fields(shard), self.image_column, "data.image_column", shard)

    def _known(self, names: list[str], name: str, setting: str, shard: Shard) -> None:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"`{setting}` must be a column of every file, but {self.title(shard)} has {', '.join(names)} and not "
                f"{name!r}.{hint}"
            )

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[pq.ParquetFile]:
        try:
            with self.fs.open(self.path(shard.path), "rb") as file:
                yield pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"`data.source` must hold whole Parquet files, but {self.title(shard)} cannot be read ({error}). "
                "Write it again."
            ) from None


def _values(file: pq.ParquetFile, group: int, column: str) -> Iterator[Callable[[], Any]]:
    """What gives the value, for each row of a row group."""
    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[column]):
        values = batch.column(0)
        yield from (values[i].as_py for i in range(len(values)))
