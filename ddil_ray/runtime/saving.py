"""Saves checkpoints beside training: written to this machine's disk at once, brought to the storage by a thread."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ddil_ray.errors import RunFailedError, first_line
from ddil_ray.runtime.staging import Staging
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.training.checkpoint import write_checkpoint

__all__ = ["Saver"]


class Saver:
    """One process's share of all checkpoints that it and the others write while they train together.

    Training waits while its state is written to a folder of this machine, and for the checkpoint before to be in the
    storage, which was begun `checkpoint.every` steps ago. A failure is told and does not end training: what was saved
    before stays, and the next checkpoint is the next try.

    Args:
        store: where checkpoints go.
        name: of a checkpoint in it, by its step; the same for all processes, and no others' ever.
        rank: of this process.
        ranks: processes that write a share.
        max_failures: checkpoints in a row that may fail.
        tell: called with what the user should know, from any thread.
        saved: called with a record of metrics when this process's share is in the storage, from a thread.
    """

    def __init__(
        self,
        store: CheckpointStore,
        name: Callable[[int], str],
        *,
        rank: int,
        ranks: int,
        max_failures: int,
        tell: Callable[[str], object],
        saved: Callable[[dict[str, float]], object],
    ) -> None:
        self._store, self._name, self._rank, self._ranks = store, name, rank, ranks
        self._max_failures, self._tell, self._saved = max_failures, tell, saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saving")
        self._storing: Future[None] | None = None
        self._step: int | None = None
        self._failures: list[str] = []
        """Of the last checkpoints in a row."""
        Staging.remove_left()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save `state`, which may change when this returns; nothing is done again for a step that was the last.

        Raises:
            RunFailedError: too many in a row have failed.
        """
        if step == self._step:
            return
        self._step, started = step, time.perf_counter()
        self._settle()
        try:
            staged = Staging()
        except OSError as error:
            self._failed(step, error, tempfile.gettempdir())
            return
        try:
            write_checkpoint(staged.path, state, rank=self._rank, ranks=self._ranks)
        except Exception as error:  # OSError, or what safetensors makes of one
            staged.remove()
            self._failed(step, error, str(staged.path.parent))
            return
        waited_s = time.perf_counter() - started
        self._storing = self._thread.submit(self._put, step, staged, waited_s)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until what is being saved is.

        Raises:
            RunFailedError: the last checkpoint is not saved; not in place of another error.
        """
        self._thread.shutdown()
        if self._failures and kind is None:
            raise RunFailedError(f"The last checkpoint must be saved, but is not. {self._failures[-1]}")

    def _settle(self) -> None:
        if self._storing is not None:
            self._storing.result()
            self._storing = None
        if len(self._failures) > self._max_failures:
            raise RunFailedError(
                f"Checkpoints must be saved, but {len(self._failures)} in a row could not be. {self._failures[-1]} "
                "Make room, or raise `checkpoint.max_failures`."
            )

    def _put(self, step: int, staged: Staging, waited_s: float) -> None:
        started, size = time.perf_counter(), sum(file.stat().st_size for file in staged.path.iterdir())
        try:
            self._store.put(self._name(step), staged.path)
        except Exception as error:  # every filesystem has errors of its own
            self._failed(step, error, self._store.url)
            return
        finally:
            staged.remove()
        if self._failures:
            self._tell(f"Checkpoints are saved again, from that of step {step} on.")
        self._failures = []
        seconds = waited_s + time.perf_counter() - started
        facts = {"checkpoint/seconds": seconds, "checkpoint/waited_s": waited_s, "checkpoint/bytes": float(size)}
        self._saved({"step": step, "checkpoint/step": step, **facts})

    def _failed(self, step: int, error: Exception, place: str) -> None:
        """Count a failure, and tell of the first in a row."""
        reason = f"That of step {step} could not be written to {place}: {first_line(error)}{_free(place)}."
        self._failures.append(reason)
        if len(self._failures) == 1:
            self._tell(
                f"A checkpoint is left out. {reason} Those before it are kept, and the next is tried in its turn; "
                f"more than {self._max_failures} in a row end the run."
            )


def _free(place: str) -> str:
    """Free space of a folder on a disk, in words; nothing of what is no folder."""
    try:
        return f" ({shutil.disk_usage(place).free / 2**20:.0f} MiB free)"
    except OSError:
        return ""
