"""What the training loop of a Ray Train worker tells the world: weights and records to the hub, checkpoints to disk."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import ray
from ray.train.v2._internal.execution.context import get_train_context

from ddil_ray.runtime.publisher import Publisher
from ddil_ray.runtime.saving import Saver
from ddil_ray.runtime.waits import STEP_TIMES
from ddil_ray.runtime.watchdog import Watchdog
from ddil_ray.trained import named_trained
from ddil_ray.training.learner import Learner
from ddil_ray.training.loop import Wish
from ddil_ray.training.wire import FlatWeights, Snapshot

if TYPE_CHECKING:
    from ray.train.v2.api.preemption import PreemptionInfo

__all__ = ["RayHooks"]

_ASKED_AGAIN = 10
"""Steps after which a checkpoint is asked for again, as a hub that was started again knows of none."""


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
    _wish: Any = None
    _noticed: Any = None
    _save_at: int | None = None
    """The step at which to ask, again, for the checkpoint that a notice calls for; None once it is wished."""

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

    def wish(self, step: int) -> Wish | None:
        """The answer asked for one step ago, so that no step waits for the hub."""
        if self.watchdog is not None:
            self.watchdog.begin(f"step {step}", times=STEP_TIMES)
        if self.publisher is not None:
            self.publisher.reached = step + 1
        if self.rank == 0:
            self._heed_notice(step)
        asked, self._wish = self._wish, self.hub.wish.remote(step + 1)
        wish: Wish | None = asked and ray.get(asked)
        if wish == "save":
            self._save_at = None
        return wish

    def _heed_notice(self, step: int) -> None:
        """Have a checkpoint saved when a node of this group's is about to be taken away, once per notice.

        Ray Train tells each worker of the notice. `ray.train.get_preemption_info` gives it too, but has all ranks wait
        for each other, and every step would do that.
        """
        notice = get_train_context().preemption_context.preemption_info
        if notice is not None and notice != self._noticed:
            self._noticed, self._save_at = notice, step
            self.hub.tell.remote(_told(notice))
        if self._save_at is not None and step >= self._save_at:
            self._save_at = step + _ASKED_AGAIN
            self.hub.request_save.remote()


def _told(notice: PreemptionInfo) -> str:
    """A notice of preemption in words."""
    when = "soon"
    if notice.deadline_ms:
        when = f"at {datetime.fromtimestamp(notice.deadline_ms / 1000, timezone.utc):%H:%M:%S} UTC"
    ranks = ", ".join(map(str, notice.preempted_ranks))
    return (
        f"A node is taken away {when}, with trainer worker {ranks}. A checkpoint is saved now, from which "
        "training goes on elsewhere; that does not count as a failure."
    )


def _phase_teacher(learner: Learner) -> FlatWeights:
    """Weights of the finished round before this one, which teach it."""
    weights = learner.rounds[learner.objective.phases[learner.phase.index - 1].student_steps]
    return Snapshot([weights[name] for name, _ in named_trained(learner.student.network)]).on_host()
