"""What the driver does while a run trains: takes the records, shows them, passes signals on, copies files out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import ray

from ddil_ray.errors import RunFailedError
from ddil_ray.folder import RunFolder
from ddil_ray.runtime.advice import Advisor
from ddil_ray.runtime.metrics import RunMetrics
from ddil_ray.runtime.scaling import Scaling
from ddil_ray.runtime.signals import Signals
from ddil_ray.tracking import Journal, View

if TYPE_CHECKING:
    from ddil_ray.runtime.monitor import MonitorHandle

__all__ = ["Watch"]

_PATIENCE_S = 10.0
_UNWIND_S = 120.0
"""For training to end once it must."""
_IDLE_S = 60.0
"""Without a trainer that runs: longer than one takes to start."""


class Watch:
    """Called now and then until training has ended; returns whether to go on, which a signal denies.

    Args:
        hub: handle.
        view: where records are shown.
        signals: of this process.
        folder: of the run, whose journal records are appended to.
        metrics: what is told to Prometheus of them.
        monitor: of covariate shift, where it is measured.
        scaling: answers requests for other numbers of actors.
        prune: removes checkpoints that are not kept; called whenever there is another.
    """

    def __init__(
        self,
        hub: Any,
        view: View,
        signals: Signals,
        folder: RunFolder,
        metrics: RunMetrics,
        monitor: MonitorHandle | None,
        scaling: Scaling,
        prune: Callable[[], None],
    ) -> None:
        self._metrics, self._scaling, self._prune, self._told = metrics, scaling, prune, set[str]()
        self._hub, self._view, self._signals, self._folder, self._monitor = hub, view, signals, folder, monitor
        self._failed_at: float | None = None
        self._idle = False
        self._draining: Any = None
        self._journal, self._advisor = Journal(folder.local / "metrics.jsonl", view.say), Advisor(view.say)

    def __call__(self) -> bool:
        """See the class."""
        if self._signals.fresh():
            self._view.say("Stopping after a last checkpoint; once more to stop at once.")
        if self._signals.received is not None:
            self._hub.request_stop.remote()  # each time: a hub that was started again knows of none
        self._take(self._drained())
        self._heed(self._asked(self._hub.failure))
        self._scaling.watch()
        if self._monitor is not None:
            self._monitor.watch()
        return self._signals.received is None

    def trainer_runs(self) -> bool:
        """Tell of a trainer that has not run for a minute; False where none is left to heed a signal that came."""
        seconds = self._asked(self._hub.idle_s)
        if seconds is None:
            return True
        idle, self._idle = self._idle, seconds >= _IDLE_S
        if self._idle and not idle:
            self._view.say(
                f"No trainer has run for {seconds:.0f} s: its workers wait for room in the cluster, or start slowly. "
                "Add nodes, or stop here: what was saved is there, and `--resume` goes on from it."
            )
        return not self._idle or self._signals.received is None

    def trainer_words(self) -> str | None:
        """Why a process of the trainer ended itself, if it was that which ended training."""
        words: str | None = self._asked(self._hub.trainer_words)
        return words

    def _drained(self) -> list[dict[str, Any]]:
        """The records that the hub has, or had when it was asked before and was too slow."""
        self._draining = self._draining or self._hub.drain.remote()
        try:
            taken: list[dict[str, Any]] = ray.get(self._draining, timeout=_PATIENCE_S)
        except ray.exceptions.GetTimeoutError:
            return []
        except ray.exceptions.RayActorError:
            taken = []
        self._draining = None
        return taken

    def _asked(self, method: Any) -> Any:
        """What the hub answers; None while it is being started again, or the fit thread tells why not."""
        try:
            return ray.get(method.remote(), timeout=_PATIENCE_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return None

    def _heed(self, failure: str | None) -> None:
        """Ray Train ends training that must end; where it cannot, as it hangs itself, this process does."""
        if failure is None:
            return
        self._failed_at = self._failed_at or time.monotonic()
        if time.monotonic() - self._failed_at > _UNWIND_S:
            raise RunFailedError(failure)

    def _take(self, taken: list[dict[str, Any]]) -> None:
        for note in [record["note"] for record in taken if "note" in record]:
            if note not in self._told:
                self._told.add(note)
                self._view.say(note)
        records: list[dict[str, float]] = [record for record in taken if "note" not in record]
        for record in records:
            if "loss" in record:
                record["system/cpu_percent"] = psutil.cpu_percent()
                record["system/memory_percent"] = psutil.virtual_memory().percent
                self._advisor.read(record)
            self._view.show(record)
        self._metrics.show(records)
        if not self._folder.others:
            self._journal.append(records)
        if any("checkpoint/step" in record for record in records):
            self._prune()
            self._folder.sync_soon(self._view.say)
