"""Takes the blocks of one stream off Ray Data for a training loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ray.exceptions import RayError

from ddil_ray.errors import RunFailedError, StateError, StreamLostError, last_line
from ddil_ray.states.batch import Origin, StateBatch

__all__ = ["StreamReader"]


class StreamReader:
    """Takes blocks of one stream off Ray Data in a thread of its own, up to two ahead of the trainer.

    A stream is entered at once when training starts, so that all of them start together, and never entered again.

    Args:
        origin: source of the stream.
        shard: this rank's part of it.
        rows: of a block.
        patience_s: longest wait for a block.
        standing: tells what the actors of the stream are at.
    """

    def __init__(
        self, origin: Origin, shard: Any, rows: int, *, patience_s: float, standing: Callable[[Origin], str]
    ) -> None:
        self.origin, self._shard, self._rows = origin, shard, rows
        self._patience_s, self._standing = patience_s, standing
        self._queue: queue.Queue[StateBatch | BaseException | None] = queue.Queue(maxsize=1)

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name=f"read-{self.origin.label}", daemon=True).start()

    def _read(self) -> None:
        try:
            for block in self._blocks():
                self._queue.put(block)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _blocks(self) -> Iterator[StateBatch]:
        # Prefetching would hold a batch back until the next one is there, which may need this one to be trained on.
        batches = self._shard.iter_batches(
            batch_size=self._rows, batch_format="numpy", prefetch_batches=0, drop_last=True
        )
        for columns in batches:
            yield StateBatch.from_columns({k: np.asarray(v) for k, v in columns.items()})

    def next(self) -> StateBatch:
        """The next block.

        Raises:
            StreamLostError: the stream failed.
            StateError: the block is none of states.
            RunFailedError: it ended before training did, or gave nothing for too long.
        """
        try:
            block = self._queue.get(timeout=self._patience_s)
        except queue.Empty:
            raise RunFailedError(
                f"A block of {self.origin.label} states must come within {self._patience_s:g} s, but none did: "
                f"{self._standing(self.origin)}. See that its actors have room in the cluster; where they are just "
                "slow, raise `faults.timeout_s`. What was saved is there: `--resume` goes on from it."
            ) from None
        if isinstance(block, StateError) and not isinstance(block, RayError):  # met here, and would be met again
            raise block
        if isinstance(block, BaseException):
            raise StreamLostError(f"The stream of {self.origin.label} states broke off: {last_line(block)}") from block
        if block is None:
            raise RunFailedError(f"The stream of {self.origin.label} states ended before training did.")
        return block
