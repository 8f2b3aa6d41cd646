"""Measures covariate shift while a run trains: one actor beside the trainer, which nothing waits for.

The hub holds the weights that are due until the monitor takes them, so the first publication is measured however long
the actor takes to start, and a monitor that cannot keep up measures fewer of them. When training has ended the driver
waits, for a bounded time, until the newest published weights are measured. A monitor that fails is not replaced: the
run goes on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray

from ddil_ray.config.groups import Shift
from ddil_ray.errors import first_line
from ddil_ray.runtime.context import RunContext, actor_options
from ddil_ray.runtime.logs import name_logs
from ddil_ray.runtime.stages import Stage
from ddil_ray.training.shift import ShiftMeter
from ddil_ray.training.wire import FlatWeights

__all__ = ["Monitor", "MonitorHandle"]

_POLL_S = 0.5


class Monitor(Stage):
    """Takes weights off the hub, measures them and pushes the figures, until training has ended."""

    def __init__(self, context: RunContext) -> None:
        name_logs(context.recipe.config.name, "shift")
        super().__init__(context, acts=True)
        assert self.student is not None
        self.meter = ShiftMeter(
            self.recipe, self.objective, self.student, images=self.images, conditions=self.conditions
        )

    def run(self) -> None:
        """Measure whatever is due."""

        logging.getLogger(__name__).info("Models are loaded: measures covariate shift.")

        def measure(version: int, weights: FlatWeights) -> None:
            record = self.meter.record(version, weights, self.expert)
            ray.get(self.context.hub.push.remote(record))

        while (grant := ray.get(self.context.hub.to_measure.remote())) is not None:
            self._take(grant, measure)


class MonitorHandle:
    """The driver's end of a monitor, which it starts.

    Args:
        context: the run.
        settings: what the actor asks of the cluster.
        say: tells the user of a failure, once.
    """

    def __init__(self, context: RunContext, settings: Shift, say: Callable[[str], None]) -> None:
        self._hub, self._settings, self._say = context.hub, settings, say
        options = {**actor_options(settings), "max_restarts": 0}
        self._actor: Any = ray.remote(Monitor).options(**options).remote(context)
        self._running: Any = self._actor.run.remote()

    def watch(self) -> bool:
        """Whether the monitor still works; says why it failed if it did."""
        if self._running is None:
            return False
        if not ray.wait([self._running], timeout=0)[0]:
            return True
        ended, self._running = self._running, None
        try:
            ray.get(ended)
        except Exception as error:  # whatever it is, training goes on
            reason = first_line(getattr(error, "cause", None) or error)
            self._say(f"Covariate shift is no longer measured, the run goes on: {reason}")
        return False

    def finish(self, meanwhile: Callable[[], bool]) -> None:
        """Training has ended: give the monitor at most `shift.wait_s` for its last measurement.

        Args:
            meanwhile: called twice a second; whether to go on waiting.
        """
        ray.get(self._hub.training_ended.remote())
        deadline = time.monotonic() + self._settings.wait_s
        while self.watch():
            if time.monotonic() > deadline:
                self._say(f"The last measurement of covariate shift took over {self._settings.wait_s:g} s: left out.")
                return
            time.sleep(_POLL_S)
            if not meanwhile():
                return

    def kill(self) -> None:
        """End the actor, whatever it is doing."""
        self._running = None
        ray.kill(self._actor)
