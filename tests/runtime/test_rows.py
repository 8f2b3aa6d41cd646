"""A dataset with a block for every row."""

from __future__ import annotations

import pyarrow as pa
import pytest
from ray.data import ActorPoolStrategy

from ddil_ray.runtime import rows
from ddil_ray.runtime.rows import row_blocks


class Square:
    """Says how many rows it was given, with what it makes of them."""

    def __call__(self, batch):
        return {"square": batch["place"] ** 2, "given": [len(batch["place"])]}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_row_is_a_block_in_its_order_and_reaches_an_actor_by_itself(monkeypatch):
    monkeypatch.setattr(rows, "_ROWS", 4)  # several parts, the last of them shorter
    dataset = row_blocks(pa.table({"place": range(10)}))
    dataset.context.execution_options.preserve_order = True
    squares = dataset.map_batches(Square, batch_size=1, compute=ActorPoolStrategy(size=1), num_cpus=0)
    (part,) = squares.streaming_split(1)
    assert [block.to_pydict() for block in part.iter_batches(batch_size=None, batch_format="pyarrow")] == [
        {"square": [k**2], "given": [1]} for k in range(10)
    ]


@pytest.mark.parametrize(("each", "parts", "largest"), [(8, 2, 4096), (2**18, 5, 3), (2**22, 15, 1)])
def test_parts_of_a_table_are_small_however_large_its_rows_are(each, parts, largest):
    table = pa.table({"request": [bytes(each)] * (15 if each > 8 else 5000)})
    made = [len(part) for part in rows._parts(table)]
    assert (len(made), max(made), sum(made)) == (parts, largest, len(table))
