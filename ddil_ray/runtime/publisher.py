"""Publishes weights without stopping the trainer.

The trainer copies its weights into a flat buffer where they lie and goes on. A thread brings them to the CPU's memory
and tells the hub, which takes them over from this process. A publication that is still waiting when a newer one comes
is left out: whoever waited for it gets the newer one. The last is kept, since a hub that was started again has none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime.admission import Stream
from ddil_ray.runtime.hub import LAID_OUT, Publication
from ddil_ray.training.wire import FlatWeights, Snapshot

__all__ = ["Publisher"]

_HEARTBEAT_S = 1.0
"""How often the hub is asked whether it is the one that was told."""


@dataclass(frozen=True)
class _Parcel:
    phase: int
    version: int
    student: Snapshot
    teacher: FlatWeights | None
    since: float
    """When the trainer had the weights."""


class Publisher:
    """Rank 0's end of the hub; tells it first where training goes on.

    Args:
        hub: handle.
        start_step: where training goes on.
        streams: plans and credits of the run's streams, from there.
        float32_as: dtype that float32 weights travel in.
    """

    def __init__(
        self, hub: Any, start_step: int, streams: Mapping[str, Stream], *, float32_as: torch.dtype = torch.float32
    ) -> None:
        self._hub, self._start_step, self._streams, self._float32_as = hub, start_step, dict(streams), float32_as
        self._me = ray.get_runtime_context().current_actor
        self._changed = threading.Condition()
        self._waiting: _Parcel | None = None
        self._sent: _Parcel | None = None
        self._spare: list[Snapshot] = []
        self._busy = self._ended = False
        self._token = 0
        self._failure: BaseException | None = None
        self.reached = start_step
        """Step that the trainer is at; for a hub that must be told anew."""
        self._begin()
        self._thread = threading.Thread(target=self._run, name="publish", daemon=True)
        self._thread.start()

    def publish(self, phase: int, version: int, student: Iterable[Tensor], teacher: FlatWeights | None = None) -> None:
        """Copy the student's trained tensors and hand them on; nothing is waited for.

        Args:
            phase: of training.
            version: step after which the weights are these.
            student: what is trained of it, in the order of `trained_state`.
            teacher: weights of the phase's teacher; None for the given teacher.

        Raises:
            Exception: what an earlier publication failed with.
        """
        since = time.perf_counter()
        with self._changed:
            self._check()
            over = self._spare.pop() if self._spare else None
        parcel = _Parcel(phase, version, Snapshot(student, float32_as=self._float32_as, over=over), teacher, since)
        with self._changed:
            if self._waiting is not None:
                self._spare = [self._waiting.student]
            self._waiting = parcel
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until the hub has what was published last.

        Raises:
            Exception: what a publication failed with.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not (self._waiting or self._busy))
            self._check()

    def end(self) -> None:
        """`settle`, then stop."""
        self.settle()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _begin(self) -> None:
        self._token = ray.get(self._hub.begin.remote(self._start_step, self._streams, self.reached, self._token))

    def _run(self) -> None:
        try:
            while not self._ended:
                self._turn()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _turn(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended, timeout=_HEARTBEAT_S)
            parcel, self._waiting = self._waiting, None
            self._busy = parcel is not None
        if parcel is not None:
            self._send(parcel)
        elif self._sent is not None and ray.get(self._hub.begun.remote()) != self._token:
            self._announce(self._sent)
        with self._changed:
            self._busy = False
            self._changed.notify_all()

    def _send(self, parcel: _Parcel) -> None:
        LAID_OUT["student"] = parcel.student.on_host()
        if parcel.teacher is not None:
            LAID_OUT["teacher"] = parcel.teacher
        self._announce(parcel)
        free = self._sent if parcel.student.is_on_host else parcel  # what was laid out is kept
        with self._changed:
            self._spare = [free.student] if free is not None else []
        self._sent = parcel

    def _announce(self, parcel: _Parcel) -> None:
        """Let the hub take what is laid out."""
        with_teacher, waited_s = parcel.teacher is not None, time.perf_counter() - parcel.since
        publication = Publication(parcel.phase, parcel.version, self._me, with_teacher, waited_s)
        while not ray.get(self._hub.publish.remote(self._token, publication)):
            if ray.get(self._hub.begun.remote()) != 0:
                raise RunFailedError("The trainer must be the only one of its run, but another has begun.")
            self._begin()  # the hub was started again
