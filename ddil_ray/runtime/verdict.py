"""Whether a run that met a fault goes on, and how what ended it is told.

Whoever knows why a run must end tells the hub. Ray Train's controller, which looks after its workers every two seconds,
asks the hub then, and ends training in place of starting workers again; so it does where a worker failed of what would
fail again. All else, as a lost process or node, is started again up to `trainer.max_failures` times.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from ddil_ray.errors import DdilError, RunFailedError, StreamLostError, first_line, last_line

__all__ = ["Judge", "explain", "would_fail_again"]

_PATIENCE_S = 5.0
_MISTAKES: tuple[type[Exception], ...] = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, NameError),
    *(TypeError, ValueError),
)
"""What a program meets again that does the same again."""

_NO_ROOM = (
    "The trainer must find room for its {workers} workers, but the cluster had none for minutes: a node may be lost or "
    "taken. Add nodes, or lower `trainer.num_workers`; `--resume` goes on from the last checkpoint."
)

_SIGNS_OF_FULL_DISKS = ("OutOfDiskError", "the local disk's utilization is over capacity")
"""Ray's name for it, and its words where they come by way of a stream."""
_DISK_FULL = (
    "Ray's object store must have room, but it is full, and so is the disk that it goes on to (Ray's temporary folder, "
    "on some node). Free that disk, start Ray with `--object-spilling-directory` on a larger one, or lower "
    "`replay.ahead` and roles' `batch_size`; `--resume` goes on from the last checkpoint."
)


class Judge(WorkerGroupCallback):  # type: ignore[misc]
    """Lives in Ray Train's controller.

    Args:
        hub: handle.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """End training if it must end.

        Raises:
            RunFailedError: it must, with the reason; the controller retries no such error.
        """
        reason = self._told()
        errors = worker_group_status.errors.values()
        again = next((error for error in errors if would_fail_again(error)), None)
        if reason is None and again is not None:
            reason = explain(again)
        if reason is not None:
            raise RunFailedError(reason)

    def _told(self) -> str | None:
        try:
            reason: str | None = ray.get(self._hub.look.remote(), timeout=_PATIENCE_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None  # a hub that starts again is asked again
        return reason


def would_fail_again(error: BaseException) -> bool:
    """Whether starting again would not help."""
    return isinstance(error, (DdilError, *_MISTAKES)) and not isinstance(error, StreamLostError)


def explain(error: BaseException, last_words: str | None = None) -> str:
    """The library's own message where there is one in the chain of causes, else the last line.

    Args:
        error: what Ray Train raised, or a worker.
        last_words: of the trainer, where it ended itself.
    """
    if any(sign in str(error) for sign in _SIGNS_OF_FULL_DISKS):
        return _DISK_FULL
    causes = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None), error]
    for cause in causes:
        while cause is not None:
            if isinstance(cause, DdilError):
                return str(cause)
            if isinstance(cause, WorkerGroupStartupTimeoutError):
                return _NO_ROOM.format(workers=cause.num_workers)
            cause = getattr(cause, "cause", None) or cause.__cause__
    if last_words is not None:
        return f"Training failed: the trainer {last_words}. If that work is just slow, raise `faults.timeout_s`."
    worker = next((cause for cause in causes if isinstance(cause, _MISTAKES)), None)
    if worker is not None:
        return f"Training failed: {type(worker).__name__}: {first_line(worker)}"
    return f"Training failed: {last_line(error)}"
