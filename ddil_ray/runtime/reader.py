"""Takes the blocks of one stream off Ray Data for a training loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ddil_ray.errors import RunFailedError
from ddil_ray.states.batch import Origin, StateBatch

__all__ = ["StreamReader"]


class StreamReader:
    """Takes blocks of one stream off Ray Data in a thread of its own, up to two ahead of the trainer.

    A stream is entered at once when training starts, so that all of them start together, and never entered again.
    """

    def __init__(self, origin: Origin, shard: Any, rows: int) -> None:
        self.origin, self._shard, self._rows = origin, shard, rows
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
            RunFailedError: the stream failed, or ended before training did.
        """
        block = self._queue.get()
        if isinstance(block, BaseException):
            raise RunFailedError(f"The stream of {self.origin.label} states failed: {block}") from block
        if block is None:
            raise RunFailedError(f"The stream of {self.origin.label} states ended before training did.")
        return block
