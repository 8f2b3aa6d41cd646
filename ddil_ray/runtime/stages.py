"""Ray Data stages: the actors that make states and labels.

A request row is only its place in the stream. The actor turns it into a (phase, index) of the plan, counted from the
step that the trainer resumed at, waits for admission, takes newer weights if there are any, and makes the rows.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ObjectLostError

from ddil_ray.models import DiffusionModel
from ddil_ray.runtime.admission import Ask, StreamPlan
from ddil_ray.runtime.context import Columns, RunContext
from ddil_ray.runtime.hub import Grant
from ddil_ray.runtime.poison import Sieve
from ddil_ray.runtime.turns import Turns
from ddil_ray.runtime.watchdog import Watchdog
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import Conditions, StateRequest
from ddil_ray.states.stretch import Stretch
from ddil_ray.training.kept import kept_blocks
from ddil_ray.training.placement import actor_networks
from ddil_ray.training.producer import USES_STUDENT, USES_TEACHER, StateMaker
from ddil_ray.training.recipe import ROLE_OF_ORIGIN, Recipe
from ddil_ray.training.wire import FlatWeights

__all__ = ["LabelStage", "Stage", "StateStage", "best_device", "bind_prompts", "shared_tensor", "stream_plan"]

_NO_PHASE = -1
_PATIENCE_S = 2.0
"""That a block waits before it lets an earlier one ask that came to its actor later."""


def best_device() -> torch.device:
    """CUDA where Ray gave this process a GPU or a share of one, else the CPU."""
    return torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")


def bind_prompts(model: DiffusionModel, context: RunContext) -> None:
    """Give a model of prompts this process's bank of embeddings, before copies of it are made."""
    prompts = ray.get(context.prompts)
    model.bind(prompts.bank() if prompts is not None else None)


def shared_tensor(reference: Any) -> torch.Tensor:
    """An array of the object store as a tensor on its memory, which all processes of a node share: only to be read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(ray.get(reference))


def stream_plan(
    recipe: Recipe, origin: Origin, *, phases: int, start_step: int, max_staleness: int, stretch: Stretch | None = None
) -> StreamPlan:
    """All blocks of a stream from `start_step` on, in the order in which ranks take them.

    Block k goes to rank k mod W, so the blocks of a phase are a multiple of W. The oldest weights that a block may come
    from are those of `max_staleness` steps before the last step that depends on it (`ConsumptionPlan.last_steps`), or
    with `sync.deterministic` the newest that are published before it is needed.
    Without a `stretch` the largest number of workers does the whole run.
    """
    stretch = stretch or Stretch(recipe.config.trainer.workers[1])
    ranks, rows = stretch.workers, recipe.rows_per_block(origin)
    steps = recipe.config.trainer.steps
    first_phase = start_step // steps
    parts = []
    for phase, plan in enumerate(recipe.plans(phases, stretch)):
        if phase < first_phase:
            continue
        taken = stretch.taken(plan, origin, step=start_step, rows=rows) if phase == first_phase else 0
        needed, last = (f(origin, rows)[taken:] for f in (plan.first_steps, plan.last_steps))
        versions = _oldest(recipe, needed, last - max_staleness) + phase * steps
        versions = versions if origin in USES_STUDENT else np.full(len(last), -1)
        indices = stretch.used_in(phase, steps, origin) + taken * ranks + np.arange(len(last) * ranks)
        each_rank = (plan.progress(origin, rows)[taken:], needed + phase * steps, versions, np.full(len(last), phase))
        progress, needed, versions, phase_of = (np.repeat(column, ranks) for column in each_rank)
        parts.append(StreamPlan(phase_of, needed, versions, indices, progress))
    if not parts:  # all is done
        return StreamPlan(*np.zeros((len(fields(StreamPlan)), 0), int))
    return StreamPlan(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(StreamPlan)))


def _oldest(recipe: Recipe, needed: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The oldest weights for each block, in steps of a phase: `bound`, or where the run is deterministic the newest.

    These are the newest that there are at the step that needs the block. The trainer cannot pass that step without it,
    so they are the only ones that it can be made from.
    """
    every = recipe.config.sync.every
    return needed // every * every if recipe.config.sync.deterministic else bound


class Stage:
    """What states, labels and monitor share: the run's models, on this actor's device, kept at the newest weights.

    Args:
        context: the run.
        acts: whether this actor needs a student, for its rollouts or to measure it.
        asked: whether it asks the expert.
    """

    def __init__(self, context: RunContext, *, acts: bool, asked: bool = True) -> None:
        torch.set_num_threads(1)
        self.context, self.recipe, self.device = context, context.recipe, best_device()
        self.teacher = self.recipe.load_teacher()
        bind_prompts(self.teacher, context)
        self.images = shared_tensor(context.images)
        self.conditions = Conditions(shared_tensor(context.labels), self.recipe.guidance)
        student = self.recipe.student_of(self.teacher)
        self.objective = self.recipe.objective(student, self.images)
        self.expert, self.student = actor_networks(
            self.teacher,
            student,
            config=self.recipe.config,
            objective=self.objective,
            threshold=self.recipe.teacher_threshold(self.images),
            device=self.device,
            acts=acts,
            asked=asked,
        )
        self.teacher = self.expert.teacher
        self.known = (-1, -1)
        self.watchdog: Watchdog | None = None
        """Told of every block that is begun and done."""
        self._admitted_at = self._busy_s = 0.0
        self._made = (0, 0)
        """Rows and bytes that nobody was told of."""
        self._turns = Turns()
        self._actor: str = ray.get_runtime_context().get_actor_id() or ""

    def _sieve(self, role: str, origin: Origin) -> Sieve:
        most = self.recipe.config.faults.max_poisoned
        return Sieve(role, origin.label, self._actor, folder=self.context.poisoned, most=most)

    @contextmanager
    def _admitted(
        self, stream: str, phase: int, block: int | None, *, sieve: Sieve, maker: StateMaker | None = None
    ) -> Iterator[None]:
        """Wait until a block may be made, and take newer weights; while it is made, no other is.

        Ray Data has several requests wait in an actor, in any order. The earliest asks first, and one that came before
        it and may not be made yet gives way: an earlier block, which it may depend on, is never stuck behind it.
        """
        while True:
            with self._turns.of(block or 0):
                if self._let_on(stream, phase, block, sieve, maker.load_student if maker else None):
                    yield
                    return

    def _let_on(
        self,
        stream: str,
        phase: int,
        block: int | None,
        sieve: Sieve,
        load_student: Callable[[int, FlatWeights], None] | None,
    ) -> bool:
        """Ask to make a block, and take newer weights; False where it must ask again."""
        ask = Ask(stream, phase, block, self.known, self._busy_s, self._actor, sieve.count, *self._made)
        grant = ray.get(self.context.hub.admit.remote(ask, _PATIENCE_S))
        if grant is None:
            return False
        self._admitted_at, self._busy_s, sieve.count, self._made = time.perf_counter(), 0.0, 0, (0, 0)
        if self.watchdog is not None:
            self.watchdog.begin(f"{'a block' if block is None else f'block {block}'} of {stream} states")
        if self._take(grant, load_student):
            return True
        if self.watchdog is not None:
            self.watchdog.stop()
        time.sleep(_PATIENCE_S)
        return False

    def _done(self, states: StateBatch) -> Columns:
        """A block that was admitted, ready to travel."""
        columns = states.to_columns()
        self._made = len(states), sum(column.nbytes for column in columns.values())
        self._busy_s = time.perf_counter() - self._admitted_at
        if self.watchdog is not None:
            self.watchdog.end()
        return columns

    def _take(self, grant: Grant, load_student: Callable[[int, FlatWeights], None] | None) -> bool:
        """Be taught by the teacher of the grant's phase, and hand on what it has of the student.

        False where these weights are gone, with the hub or their node: others come, to be asked for.
        """
        asks = grant.student is not None and load_student is not None
        try:
            teacher = ray.get(grant.teacher[0]) if grant.teacher and self.known[0] != grant.phase else None
            student = ray.get(grant.student[0]) if asks else None
        except ObjectLostError:
            return False
        if self.known[0] != grant.phase:
            self.expert.enter(grant.phase, teacher)
        if student is not None and load_student is not None:
            load_student(grant.version, student)
        self.known = (grant.phase, grant.version)
        return True

    def _label(self, states: StateBatch) -> StateBatch:
        size = self.recipe.config.labels.batch_size
        parts = [states[slice(i, i + size)] for i in range(0, len(states), size)]
        return StateBatch.cat([self.expert.label(self.objective, p, self.device) for p in parts])


class StateStage(Stage):
    """Makes the states of one source, and their labels unless a pool of its own does that."""

    def __init__(self, context: RunContext, origin: int, incarnation: int) -> None:
        self.origin = Origin(origin)
        fused = context.recipe.config.labels.placement == "fused"
        super().__init__(context, acts=self.origin in USES_STUDENT, asked=fused or self.origin in USES_TEACHER)
        self.maker = StateMaker(
            self.objective,
            self.teacher,
            self.conditions,
            images=self.images,
            student=self.student,
            expert=self.expert,
            mixing=self.recipe.mixing,
            autocast=self.recipe.rollout_autocast,
            device=self.device,
        )
        self.fused = fused
        self.kept = kept_blocks(self.recipe, self.origin, self.conditions.pool, folder=context.kept)
        self.incarnation = incarnation
        self.sieve = self._sieve(ROLE_OF_ORIGIN[self.origin], self.origin)

    @cached_property
    def plan(self) -> StreamPlan:
        """The stream's blocks. Waits until the trainer has begun, which loads its models at the same time."""
        plan: StreamPlan = ray.get(self.context.hub.plan_of.remote(self.incarnation, self.origin.label))
        return plan

    def __call__(self, batch: Columns) -> Columns:
        """The rows of one request. Beyond the plan, where training went on, it waits until its actor is dropped."""
        place = int(batch["place"][0])
        phase = int(self.plan.phases[place]) if place < len(self.plan) else _NO_PHASE
        maker = self.maker if self.maker.student else None
        with self._admitted(self.origin.label, phase, place, sieve=self.sieve, maker=maker):
            rows, seed = self.recipe.rows_per_block(self.origin), self.recipe.config.seed
            index, progress = int(self.plan.indices[place]), float(self.plan.progress[place])
            request = StateRequest(self.origin, phase, index, rows, seed, progress)
            return self._done(self.kept.block(request, self.expert, self._sound) if self.kept else self._sound(request))

    def _sound(self, request: StateRequest) -> StateBatch:
        """Rows that may travel, and be kept: with labels then, which a pool behind passes on."""
        states = self.maker.make(request)
        return self.sieve.sift(self._label(states) if self.fused or self.kept else states)


class LabelStage(Stage):
    """Labels states that other actors made."""

    def __init__(self, context: RunContext, origin: int) -> None:
        super().__init__(context, acts=False)
        self.sieve = self._sieve("labels", Origin(origin))

    def __call__(self, batch: Columns) -> Columns:
        """The same rows with labels."""
        states = StateBatch.from_columns(batch)
        if states.label.numel():  # kept with it
            return batch
        stream = f"labels/{Origin(int(states.origin[0])).label}"
        with self._admitted(stream, int(states.phase[0]), None, sieve=self.sieve):
            return self._done(self.sieve.sift(self._label(states)))
