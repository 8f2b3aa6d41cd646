"""Parquet files with a column of images, or of prompts alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ddil_ray.data.footers import IDS, IMAGES, TEXTS, check_column, read_footers, unreadable
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

    def check(self, shards: Sequence[Shard]) -> None:
        """See `Reader.check`; the footers of all files are read."""
        footers = read_footers(self.fs, {self.path(shard.path): self.title(shard) for shard in shards})
        if not sum(footer.rows for footer in footers):
            raise DataError(
                f"`data.source` must hold a row, but the {len(shards)} Parquet files of {self.source} have none. Check "
                "the path."
            )
        check_column(footers, self.key, self.condition.setting, IDS | TEXTS if self.condition.classes else TEXTS)
        if self.images:
            check_column(footers, self.image_column, "data.image_column", IMAGES)

    def fields(self, shard: Shard) -> list[str]:
        """See `Reader.fields`."""
        with self._opened(shard) as file:
            return list(file.schema_arrow.names)

    def entries(self, shard: Shard) -> Iterator[Entry]:
        """See `Reader.entries`."""
        with self._opened(shard) as file:
            number = 0
            for group in range(file.num_row_groups):
                for within, value in enumerate(_values(file, group, self.key)):
                    yield Entry(f"{self.title(shard)}:{number}", {self.key: value()}, group, within)
                    number += 1

    def contents(self, shard: Shard, rows: Iterable[Row]) -> Iterator[Callable[[], Any]]:
        """See `Reader.contents`. A row group is read from its start to the last row that is wanted."""
        with self._opened(shard) as file:
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

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[pq.ParquetFile]:
        try:
            with self.fs.open(self.path(shard.path), "rb") as file:
                yield pq.ParquetFile(file, page_checksum_verification=True)
        except DataError:
            raise
        except Exception as error:  # Arrow's, the filesystem's own, or of values that a broken file has
            raise unreadable(self.title(shard), error) from None


def _values(file: pq.ParquetFile, group: int, column: str) -> Iterator[Callable[[], Any]]:
    """What gives the value, for each row of a row group."""
    for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[column]):
        values = batch.column(0)
        yield from (values[i].as_py for i in range(len(values)))
