"""Throughput of the data path at SD1.5's latent shape: states, columns, Arrow, replay; one thread, no Ray cluster.

Every figure is held against copying the same bytes from one buffer into another (`floor`), measured in turn with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from measuring import Outcome, Table

from ddil_ray.diffusion.schedule import DiscreteVP
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.law import TimeLaw
from ddil_ray.states.replay import ReplayBuffer
from ddil_ray.states.source import Conditions, Phase, SourceContext, StateRequest, make_states

SHAPE = (4, 64, 64)
ROWS = 32
HELD = 2048


def states(rows: int, *, version: int = 0) -> StateBatch:
    """Labelled random states."""
    return StateBatch(
        x_t=torch.randn(rows, *SHAPE),
        t=torch.rand(rows, dtype=torch.float64),
        cond=torch.arange(rows),
        w=torch.ones(rows),
        origin=torch.full((rows,), int(Origin.STUDENT), dtype=torch.int8),
        version=torch.full((rows,), version),
        phase=torch.zeros(rows, dtype=torch.int64),
        label=torch.randn(rows, *SHAPE),
    )


def size(batch: StateBatch) -> int:
    """Bytes of all columns."""
    return sum(part.nbytes for part in vars(batch).values())


def copying(nbytes: int) -> Callable[[], Any]:
    """Copy that many bytes between two buffers that are there."""
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    return lambda: target.copy_(source)


def through_arrow(batch: StateBatch) -> Callable[[], StateBatch]:
    """As Ray Data carries a batch: to a table, into shared memory, and read from there."""
    from ray.data.block import BlockAccessor

    shared = pa.allocate_buffer(2 * size(batch))

    def trip() -> StateBatch:
        table = BlockAccessor.batch_to_block(batch.to_columns())
        with pa.ipc.new_stream(pa.FixedSizeBufferWriter(shared), table.schema) as writer:
            writer.write_table(table)
        return StateBatch.from_columns(BlockAccessor.for_block(pa.ipc.open_stream(shared).read_all()).to_numpy())

    return trip


def replaying(*, held: int, reuse: int) -> tuple[Callable[[], StateBatch], int]:
    """One step of training: `ROWS` / `reuse` rows enter a buffer of `held` rows, `ROWS` are drawn; rows that are moved.

    Rows are held without being used up: the buffer is a reservoir, out of which the oldest are pushed.
    """
    buffer, generator = ReplayBuffer(capacity=held, reuse=10**9 if held > ROWS else reuse), torch.Generator()
    block = states(ROWS // reuse)
    while held > ROWS and len(buffer) < held:
        buffer.add(states(ROWS))

    def step() -> StateBatch:
        buffer.add(block)
        return buffer.draw(ROWS, step=0, generator=generator)

    return step, ROWS + ROWS // reuse


def noising() -> Callable[[], StateBatch]:
    """A block of forward states of 4,096 latents."""
    images = torch.randn(4096, *SHAPE)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    context = SourceContext(
        schedule=DiscreteVP((1 - betas).cumprod(0)),
        sample_shape=SHAPE,
        conditions=Conditions(torch.arange(4096), (1.0, 1.0)),
        images=images,
    )
    grid = uniform_grid(50)
    phase = Phase(0, 4, uniform_grid(4), TimeLaw.over(grid), "renoise", 2)
    index = iter(range(10**9))
    return lambda: make_states(context, phase, StateRequest(Origin.FORWARD, 0, next(index), ROWS, 0), version=-1)


def measure(quick: bool) -> Outcome:
    """Time every operation beside its floor."""
    torch.set_num_threads(1)
    batch, numbers = states(ROWS), torch.randperm(ROWS)
    columns, one = batch.to_columns(), size(batch)
    parts = [batch[:8], batch[8:20], batch[20:]]
    queue, queue_rows = replaying(held=ROWS, reuse=1)
    reservoir, reservoir_rows = replaying(held=HELD, reuse=4)
    arms: dict[str, tuple[Callable[[], Any], int]] = {
        "`to_columns` and `from_columns`": (lambda: StateBatch.from_columns(batch.to_columns()), one),
        "through Arrow and shared memory": (through_arrow(batch), one),
        "rows by number": (lambda: batch[numbers], one),
        "three sources put together": (lambda: StateBatch.cat(parts), one),
        "replay, every row once": (queue, one * queue_rows // ROWS),
        f"replay, {HELD} rows held": (reservoir, one * reservoir_rows // ROWS),
        "forward states": (noising(), one // 2),
        "normal numbers alone": (lambda: torch.randn(ROWS, *SHAPE), one // 2),
    }
    floors = {f"floor of {name}": copying(nbytes) for name, (_, nbytes) in arms.items()}
    calls = {name: call for name, (call, _) in arms.items()}
    found = measuring.medians(measuring.interleaved(calls | floors, repeats=3 if quick else 40, warm=3))
    rows, figures = [], {}
    for name, (_, nbytes) in arms.items():
        seconds, floor = found[name], found[f"floor of {name}"]
        figures[name] = {"seconds": seconds, "floor_seconds": floor, "bytes": nbytes, "rows": ROWS}
        rows.append(
            [
                name,
                f"{seconds * 1000.0:.3f}",
                f"{ROWS / seconds:,.0f}",
                f"{nbytes / seconds / 1000000000.0:.2f}",
                f"{floor * 1000.0:.3f}",
                f"{seconds / floor:.2f}",
            ]
        )
    assert columns["x_t"].nbytes == batch.x_t.nbytes
    heading = ["operation on 32 rows", "ms", "rows/s", "GB/s", "copying the bytes, ms", "ratio"]
    return Outcome([Table("data_path", heading, rows)], figures=figures)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
