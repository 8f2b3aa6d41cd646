"""A Ray Data dataset with a block for every row of a table; what is private in Ray for it is here.

Ray's own `from_blocks` puts every block into the object store by itself. A stream has a request for each of its blocks,
10^5 of them in a long run, and that takes Ray minutes, whenever trainers start.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.data._internal.execution.interfaces import BlockEntry, RefBundle
from ray.data._internal.execution.interfaces.ref_bundle import BlockSlice
from ray.data._internal.logical.interfaces import LogicalPlan
from ray.data._internal.logical.operators import InputData
from ray.data._internal.stats import DatasetStats
from ray.data.block import BlockAccessor

__all__ = ["row_blocks"]

_ROWS, _BYTES = 4096, 2**20
"""Of a part of the table at most, which goes to whoever takes one of its rows: so many places go with a call."""


def row_blocks(table: pa.Table) -> Dataset:
    """A dataset whose block k is row k of `table`, for whatever it is mapped by; it must be mapped.

    The blocks are slices, as Ray cuts its own, of parts of the table.
    """
    bundles = []
    for part in _parts(table):
        entry = BlockEntry(ray.put(part), BlockAccessor.for_block(part).get_metadata())
        bundles += [
            RefBundle((entry,), schema=table.schema, owns_blocks=False, slices=(BlockSlice(row, row + 1),))
            for row in range(len(part))
        ]
    context = DataContext.get_current().copy()
    return Dataset(LogicalPlan(InputData(bundles), context), context, DatasetStats(metadata={}, parent=None))


def _parts(table: pa.Table) -> Iterator[pa.Table]:
    """`table` in pieces of at most `_ROWS`, fewer where rows are large on average."""
    rows = max(1, min(_ROWS, _BYTES * len(table) // max(1, table.nbytes)))
    for begin in range(0, len(table), rows):
        yield table.slice(begin, rows).combine_chunks()
