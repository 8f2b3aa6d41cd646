"""Until the first block of a stream is there, by the number of its requests: slices of tables, or a block for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import cloudpickle

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from measuring import Outcome, Table

from ddil_ray.runtime.cluster import ray_session

BLOCKS = (1_000, 10_000, 100_000)
"""SDXL's preset for DMD2 has 76,000 in its longest stream."""
EACH = 10_000
"""The most for which each is put by itself."""


def first_block(dataset: Callable[[], Any]) -> None:
    """What a start of trainers takes: the dataset is made, sent to a process, and begun to be read there."""
    made = cloudpickle.loads(cloudpickle.dumps(dataset().map_batches(lambda batch: batch, batch_size=1)))
    made.context.enable_progress_bars = made.context.print_on_execution_start = False
    next(iter(made.iter_batches(batch_size=None, prefetch_batches=0)))


def by_slices(blocks: int) -> Any:
    """As streams do it."""
    from ddil_ray.runtime.rows import row_blocks

    return row_blocks(pa.table({"place": range(blocks)}))


def by_blocks(blocks: int) -> Any:
    """As Ray has it."""
    from ray.data.read_api import from_blocks

    return from_blocks([pa.table({"place": pa.array([place])}) for place in range(blocks)])


def measure(quick: bool) -> Outcome:
    """Every number of requests."""
    rows, figures = [], {}
    with ray_session(cpus=2):
        for blocks in BLOCKS[:1] if quick else BLOCKS:
            arms = {"slices": lambda n=blocks: first_block(lambda: by_slices(n))}
            if blocks <= EACH:
                arms["blocks"] = lambda n=blocks: first_block(lambda: by_blocks(n))
            found = measuring.medians(measuring.interleaved(arms, repeats=1 if quick else 3))
            figures[str(blocks)] = found
            each = (
                [f"{found['blocks']:.2f}", f"{found['blocks'] / found['slices']:.1f}"]
                if "blocks" in found
                else ["-"] * 2
            )
            rows.append([f"{blocks:,}", f"{found['slices']:.2f}", *each])
    heading = ["requests", "slices of one table, s", "a block for each, s", "ratio"]
    return Outcome([Table("stream_start", heading, rows)], [], figures)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
