"""What the training loop of a Ray Train worker tells the world: weights and records to the hub, checkpoints to Ray."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from ddil_ray.runtime.storage import RANK_FILE, SHARED_FILE
from ddil_ray.training.learner import Learner
from ddil_ray.training.weights import flatten_weights, load_trained_state

__all__ = ["RayHooks"]


@dataclass
class RayHooks:
    """Publishes from rank 0 to the hub, checkpoints from every rank through Ray Train."""

    hub: Any
    rank: int
    student_becomes_teacher: bool
    _adopting: Any = None
    _stop: Any = None

    def phase_started(self, step: int, learner: Learner) -> None:
        if self.rank != 0:
            return
        student = ray.put(flatten_weights(learner.student.network))
        taught = self.student_becomes_teacher and learner.phase.index > 0
        teacher = [ray.put(_phase_teacher(learner))] if taught else []
        ray.get(self.hub.start_phase.remote(learner.phase.index, step, [student], teacher))

    def publish(self, step: int, learner: Learner) -> None:
        if self.rank != 0:
            return
        if self._adopting is not None:
            ray.get(self._adopting)  # at most one publication on its way: memory stays bounded
        student = ray.put(flatten_weights(learner.student.network))
        self._adopting = self.hub.publish.remote(step, [student])

    def log(self, record: dict[str, float]) -> None:
        if self.rank == 0:
            self.hub.push.remote(record)

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state["rank"], Path(folder) / RANK_FILE.format(rank=self.rank))
            if self.rank == 0:
                shared = {"step": step, "learner": state["learner"]}
                torch.save(shared, Path(folder) / SHARED_FILE)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))
        if self.rank == 0:
            self.hub.push.remote({"step": step, "checkpoint/step": step})

    def should_stop(self, step: int) -> bool:
        """The answer asked for one step ago, so that no step waits for the hub."""
        asked, self._stop = self._stop, self.hub.should_stop.remote(step + 1)
        return bool(asked is not None and ray.get(asked))


def _phase_teacher(learner: Learner) -> Any:
    """Weights of the finished round before this one, which teach it."""
    network = learner.student.copy().network
    before = learner.objective.phases[learner.phase.index - 1].student_steps
    load_trained_state(network, learner.rounds[before])
    return flatten_weights(network)
