"""The training loop, the same in one process and on every Ray Train worker.

Per step: take the fresh blocks that the plan calls for into each source's replay buffer, draw the batch by the priors,
check its age, update the student. Where blocks come from (`Feed`) and where weights, metrics and checkpoints go
(`Hooks`) is the caller's matter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from ddil_ray.errors import StaleStateError
from ddil_ray.objectives.objective import Metrics
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.prior import ConsumptionPlan
from ddil_ray.states.replay import ReplayBuffer
from ddil_ray.states.stretch import Stretch
from ddil_ray.training.learner import Learner

__all__ = ["Feed", "Hooks", "LoopSettings", "TrainingLoop", "Wish"]

_SEEDS_APART = 1_000_003

Feed = Callable[[], StateBatch]
"""Gives the next block of labelled rows of one source, in order; blocks until it is there."""


Wish = Literal["save", "stop"]
"""What the world may want of the loop: a checkpoint out of turn, or one and then the end."""


class Hooks(Protocol):
    """What the loop tells the world."""

    def phase_started(self, step: int, learner: Learner) -> None:
        """A phase begins at global `step`, or training resumes there: publish student and, if new, teacher."""

    def publish(self, step: int, learner: Learner) -> None:
        """Make the weights after `step` updates available to rollouts."""

    def log(self, record: dict[str, float]) -> None:
        """Metrics of the steps since the last record."""

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state`, from which training goes on after `step` updates."""

    def wish(self, step: int) -> Wish | None:
        """What is wanted before `step` is done; the same answer on every rank."""


@dataclass(frozen=True)
class LoopSettings:
    """The loop's own numbers; see the config groups of the same names."""

    steps: int
    """Per phase."""
    sync_every: int
    max_staleness: int
    checkpoint_every: int
    log_every: int
    capacity: int
    reuse: int
    seed: int
    rank: int = 0


@dataclass
class TrainingLoop:
    """Trains `learner` through all phases from `step` on; `run` may be left early by `Hooks.wish`."""

    learner: Learner
    plans: list[ConsumptionPlan]
    feeds: Mapping[Origin, Feed]
    hooks: Hooks
    settings: LoopSettings
    step: int = 0
    """Updates done so far, over all phases."""
    stretch: Stretch = field(default_factory=lambda: Stretch(1))
    """That `plans` are those of."""
    _taken: dict[Origin, int] = field(default_factory=dict)
    _waited_s: dict[Origin, float] = field(default_factory=dict)
    _dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        s = self.settings
        self.generator = torch.Generator().manual_seed(s.seed * 1009 + s.rank)
        self.buffers = {
            origin: ReplayBuffer(capacity=s.capacity, reuse=s.reuse, max_staleness=s.max_staleness)
            for origin in self.feeds
        }
        self._taken = dict.fromkeys(self.feeds, 0)
        self._waited_s = dict.fromkeys(self.feeds, 0.0)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.settings.steps * len(self.plans)

    @property
    def _on_gpu(self) -> bool:
        return self.learner.device.type == "cuda"

    def run(self) -> bool:
        """Train to the end; False where it was stopped early, after a checkpoint."""
        resumed = self.step > 0
        window = _Window()
        while self.step < self.total_steps:
            wish = self.hooks.wish(self.step)
            if wish is not None:
                self.hooks.checkpoint(self.step, self.state_dict())
            if wish == "stop":
                return False
            phase, local = divmod(self.step, self.settings.steps)
            if local == 0 or resumed:
                self._start_phase(phase, fresh=local == 0)
                resumed = False
            batch = self._next_batch(phase, local)
            staleness = self._staleness(batch)
            metrics = self.learner.update(batch, self.generator)
            self.step += 1
            window.add(batch, metrics, staleness)
            self._after_step(phase, local, window)
        self.hooks.checkpoint(self.step, self.state_dict())
        return True

    def _start_phase(self, phase: int, *, fresh: bool) -> None:
        if fresh:
            self.learner.start(self.learner.objective.phases[phase])
            for origin, buffer in self.buffers.items():
                buffer.clear()
                self._taken[origin] = 0
        self.hooks.phase_started(self.step, self.learner)

    def _next_batch(self, phase: int, local: int) -> StateBatch:
        plan, parts = self.plans[phase], []
        for origin, count in plan.counts(local).items():
            needed = int(plan.fresh(origin)[local])
            while self._taken[origin] < needed:
                started = time.perf_counter()
                block = self.feeds[origin]()
                self._waited_s[origin] += time.perf_counter() - started
                block.check(
                    origin=origin,
                    phase=phase,
                    sample_shape=self.learner.student.sample_shape,
                    labelled=not self.learner.objective.asks_in_trainer,
                )
                self.buffers[origin].add(block)
                self._taken[origin] += len(block)
            if count:
                draw = self.buffers[origin].draw(count, step=self.step, generator=self.generator)
                parts.append(draw)
        batch = StateBatch.cat(parts)
        oldest = self._staleness(batch)
        if len(oldest) and int(oldest.max()) > self.settings.max_staleness:
            raise StaleStateError(
                f"`replay.max_staleness` must bound every state at {self.settings.max_staleness} steps, but one of "
                f"{int(oldest.max())} steps reached step {self.step}. This is a fault of the library: please report it."
            )
        return batch

    def _staleness(self, batch: StateBatch) -> torch.Tensor:
        """Updates between each row's student weights and now; rows that used none are left out."""
        return (self.step - batch.version)[batch.version >= 0]

    def _after_step(self, phase: int, local: int, window: _Window) -> None:
        s, end_of_phase = self.settings, local + 1 == self.settings.steps
        if end_of_phase:
            self.learner.finish()
        elif (local + 1) % s.sync_every == 0:
            self.hooks.publish(self.step, self.learner)
        if (local + 1) % s.log_every == 0 or end_of_phase:
            self.hooks.log(window.record(self, phase))
        if self.step % s.checkpoint_every == 0 and self.step < self.total_steps:
            self.hooks.checkpoint(self.step, self.state_dict())

    def take_waited_s(self) -> dict[Origin, float]:
        """Seconds spent waiting for blocks of each source since the last call."""
        waited, self._waited_s = self._waited_s, dict.fromkeys(self.feeds, 0.0)
        return waited

    def take_dropped(self) -> Counter[str]:
        """Rows that left the buffers before they were used up, since the last call, by reason and source."""
        before, self._dropped = self._dropped, self._all_dropped()
        return self._dropped - before

    def _all_dropped(self) -> Counter[str]:
        return Counter(
            {
                f"rows/{reason}/{origin.label}": getattr(buffer, reason)
                for origin, buffer in self.buffers.items()
                for reason in ("expired", "evicted")
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """All of this rank's state; blocks taken are whole, so streams resume at a block."""
        return {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "stretch": self.stretch.state_dict(),
            "held": self.stretch.workers * sum(len(buffer) for buffer in self.buffers.values()),
            "rank": {
                "generator": self.generator.get_state(),
                "torch": torch.get_rng_state(),
                "device": torch.cuda.get_rng_state(self.learner.device) if self._on_gpu else None,
                "taken": {int(o): n for o, n in self._taken.items()},
                "buffers": {int(o): b.state_dict() for o, b in self.buffers.items()},
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; the feeds must go on behind the blocks taken.

        Without what belongs to a rank, where there are as many workers as before, buffers stay empty: the plans must
        begin here.
        """
        self.step = state["step"]
        self.learner.load_state_dict(state["learner"])
        if "rank" not in state:
            self.generator.manual_seed(_SEEDS_APART * self.step + self.generator.initial_seed())
            return
        rank = state["rank"]
        self.generator.set_state(rank["generator"])
        torch.set_rng_state(rank["torch"])
        if self._on_gpu and rank["device"] is not None:
            torch.cuda.set_rng_state(rank["device"], self.learner.device)
        for origin, buffer in self.buffers.items():
            self._taken[origin] = rank["taken"][int(origin)]
            buffer.load_state_dict(rank["buffers"][int(origin)])
        self._dropped = self._all_dropped()


@dataclass
class _Window:
    """Metrics gathered between two records."""

    started: float = field(default_factory=time.perf_counter)
    rows: int = 0
    metrics: dict[str, list[float | torch.Tensor]] = field(default_factory=dict)
    staleness: list[torch.Tensor] = field(default_factory=list)
    loss: float | None = None
    """Of the last record; stands in where the student rested all the while."""

    def add(self, batch: StateBatch, metrics: Metrics, staleness: torch.Tensor) -> None:
        self.rows += len(batch)
        self.staleness.append(staleness)
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(value)

    def record(self, loop: TrainingLoop, phase: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        # A source without rows in a step has a share of 0 there, and no other figure.
        over = {name: len(self.staleness) if name.startswith("states/share_") else None for name in self.metrics}
        record = {name: float(sum(values)) / (over[name] or len(values)) for name, values in self.metrics.items()}
        self.loss = record.get("loss", self.loss)
        if self.loss is not None:
            record["loss"] = self.loss
        record |= {"step": loop.step, "total_steps": loop.total_steps, "phase": phase}
        record["throughput/samples_per_s"] = self.rows / seconds
        waited = {origin.label: min(1.0, s / seconds) for origin, s in loop.take_waited_s().items()}
        record |= {f"trainer/stall_share/{name}": share for name, share in waited.items()}
        record["trainer/stall_share"] = min(1.0, sum(waited.values()))
        ages = torch.cat(self.staleness)
        if len(ages):
            record["staleness/p50"] = float(ages.double().median())
            record["staleness/max"] = float(ages.max())
        if loop.learner.skipped:
            record["trainer/skipped_steps"] = loop.learner.skipped
        for origin, buffer in loop.buffers.items():
            record[f"replay/fill/{origin.label}"] = len(buffer)
            record[f"replay/reuse/{origin.label}"] = buffer.drawn / max(1, buffer.received)
            record[f"rows/dropped/{origin.label}"] = buffer.expired + buffer.evicted
        record |= loop.take_dropped()
        self.started, self.rows, self.metrics, self.staleness = now, 0, {}, []
        return record
