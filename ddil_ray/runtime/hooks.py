"""What the training loop of a Ray Train worker tells the world: weights and records to the hub, checkpoints to disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from ddil_ray.runtime.publisher import Publisher
from ddil_ray.runtime.saving import Saver
from ddil_ray.runtime.waits import STEP_TIMES
from ddil_ray.runtime.watchdog import Watchdog
from ddil_ray.trained import named_trained
from ddil_ray.training.learner import Learner
from ddil_ray.training.wire import FlatWeights, Snapshot

__all__ = ["RayHooks"]


@dataclass
class RayHooks:
    """Publishes from rank 0, which has the publisher; checkpoints from every rank."""

    hub: Any
    rank: int
    ranks: int
    student_becomes_teacher: bool
    saver: Saver
    publisher: Publisher | None = None
    watchdog: Watchdog | None = None
    _teacher: FlatWeights | None = None
    _stop: Any = None

    def phase_started(self, step: int, learner: Learner) -> None:
        if self.rank == 0 and self.student_becomes_teacher and learner.phase.index > 0:
            self._teacher = _phase_teacher(learner)
        self.publish(step, learner)

    def publish(self, step: int, learner: Learner) -> None:
        student = learner.published()  # which all ranks gather where it is cut up
        if self.publisher is not None and student is not None:
            self.publisher.publish(learner.phase.index, step, student.values(), self._teacher)

    def log(self, record: dict[str, float]) -> None:
        self.hub.log.remote(record, self.rank, self.ranks)

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        self.saver.save(step, state)

    def should_stop(self, step: int) -> bool:
        """The answer asked for one step ago, so that no step waits for the hub."""
        if self.watchdog is not None:
            self.watchdog.begin(f"step {step}", times=STEP_TIMES)
        if self.publisher is not None:
            self.publisher.reached = step + 1
        asked, self._stop = self._stop, self.hub.should_stop.remote(step + 1)
        return bool(asked is not None and ray.get(asked))


def _phase_teacher(learner: Learner) -> FlatWeights:
    """Weights of the finished round before this one, which teach it."""
    weights = learner.rounds[learner.objective.phases[learner.phase.index - 1].student_steps]
    return Snapshot([weights[name] for name, _ in named_trained(learner.student.network)]).on_host()
