"""Distillation in one process, without Ray: the same states, labels, loop and plan, made on demand.

For tests, notebooks, benchmarks of the method, and as the baseline that the runtime's overhead is measured against.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ddil_ray.data import ImageData
from ddil_ray.models.model import DiffusionModel
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.prior import ConsumptionPlan
from ddil_ray.states.source import StateRequest
from ddil_ray.states.stretch import Stretch
from ddil_ray.training.cadence import Cadence
from ddil_ray.training.kept import kept_blocks
from ddil_ray.training.learner import Learner, round_models
from ddil_ray.training.loop import TrainingLoop, Wish
from ddil_ray.training.placement import actor_networks, frozen, trained
from ddil_ray.training.producer import Expert, StateMaker
from ddil_ray.training.recipe import Ingredients, Recipe
from ddil_ray.training.wire import WIRE_DTYPES, FlatWeights, flatten_weights

if TYPE_CHECKING:
    from ddil_ray.training.shift import ShiftMeter

__all__ = ["InlineResult", "distill_inline", "requests", "state_maker"]


@dataclass
class InlineResult:
    """What an inline run leaves."""

    rounds: dict[int, DiffusionModel]
    """The averaged student of every phase, by its number of steps."""
    records: list[dict[str, float]]
    """Metrics, one record per `tracking.log_every` steps and one per measurement of covariate shift."""
    seconds: dict[str, float]
    """Time by what it was spent on: `rollout` (making states), `label` (asking the teacher), `measure` (covariate
    shift), `train` (the rest)."""


@dataclass
class _InlineHooks:
    """Copies weights into the rollout student at every publication."""

    maker: StateMaker
    expert: Expert
    student_becomes_teacher: bool
    float32_as: torch.dtype = torch.float32
    """What float32 weights of the student are rounded to on their way."""
    records: list[dict[str, float]] = field(default_factory=list)
    monitor: _Monitor | None = None

    def phase_started(self, step: int, learner: Learner) -> None:
        teaches = self.student_becomes_teacher and learner.phase.index > 0
        self.expert.enter(learner.phase.index, flatten_weights(learner.student.network) if teaches else None)
        self.publish(step, learner)

    def publish(self, step: int, learner: Learner) -> None:
        weights = flatten_weights(learner.student.network, float32_as=self.float32_as)
        self.maker.load_student(step, weights)
        self._measure(step, weights)

    def _measure(self, step: int, weights: FlatWeights) -> None:
        if self.monitor is not None:
            self.monitor.published(step, weights, self.expert)

    def log(self, record: dict[str, float]) -> None:
        self.records.append(record)

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Nothing is kept."""

    def wish(self, step: int) -> Wish | None:
        return None


@dataclass
class _Monitor:
    """Measures covariate shift at publications, as the runtime's monitor does."""

    meter: ShiftMeter
    cadence: Cadence
    records: list[dict[str, float]]
    seconds: float = 0.0

    def published(self, step: int, weights: FlatWeights, expert: Expert) -> None:
        """Measure newly published weights, if they are due."""
        self._newest = (step, weights, expert)
        if self.cadence.due(expert.phase, step):
            self._measure()

    def ended(self) -> None:
        """Measure the last published weights, unless they have been."""
        step, _, expert = self._newest
        if (expert.phase, step) != (self.cadence.phase, self.cadence.version):
            self._measure()

    def _measure(self) -> None:
        started, (step, _, expert) = time.perf_counter(), self._newest
        self.cadence.took(expert.phase, step)
        self.records.append(self.meter.record(*self._newest))
        self.seconds += time.perf_counter() - started


def distill_inline(
    recipe: Recipe,
    *,
    teacher: DiffusionModel | None = None,
    data: ImageData | None = None,
    student: DiffusionModel | None = None,
    device: torch.device | str = "cpu",
) -> InlineResult:
    """Run `recipe` in this process, which is one worker: whole batches, whatever `trainer.num_workers` says.

    Args:
        recipe: the run.
        teacher: in place of the config's.
        data: in place of the config's.
        student: where training starts, in place of a copy of the teacher; of the same kind.
        device: of all networks while they are trained; teacher and student given stay where and as they are.
    """
    made = recipe.ingredients(teacher=teacher, data=data)
    teacher, data, objective = made.teacher, made.data, made.objective
    student = student or recipe.student_of(teacher)
    maker = state_maker(recipe, made, student, device)
    assert maker.expert is not None
    learning = trained(student.copy(), recipe.config, device)
    hooks = _InlineHooks(maker, maker.expert, objective.student_becomes_teacher, WIRE_DTYPES[recipe.config.sync.dtype])
    if recipe.config.shift.enabled:
        hooks.monitor = _monitor(recipe, made, frozen(student.copy(), recipe.config, device), hooks.records)
    recipe.equip(objective, maker.expert.teacher, data.images, data.labels)
    phases, alone = len(objective.phases), Stretch(1)
    plans, bound = recipe.plans(phases, alone), recipe.staleness_of(alone, phases=phases, bound=made.max_staleness)
    learner = Learner(learning, objective, recipe.optimizer_settings())
    seconds = {"rollout": 0.0, "label": 0.0, "measure": 0.0}
    blocks = {o: _blocks(recipe, o, plans, maker, seconds) for o in recipe.priors.origins}
    loop = TrainingLoop(
        learner=learner,
        plans=plans,
        feeds={o: it.__next__ for o, it in blocks.items()},
        hooks=hooks,
        settings=recipe.loop_settings(max_staleness=bound),
    )
    started = time.perf_counter()
    with _seeded(recipe.config.seed, device):
        loop.run()
    if hooks.monitor is not None:
        hooks.monitor.ended()
        seconds["measure"] = hooks.monitor.seconds
    seconds["train"] = time.perf_counter() - started - sum(seconds.values())
    return InlineResult(round_models(student, learner.rounds), hooks.records, seconds)


@contextmanager
def _seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Have torch's own random numbers, those of dropout, follow `seed` within, and be what they were after it."""
    index = torch.device(device).index
    with torch.random.fork_rng(devices=[index or 0] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def state_maker(recipe: Recipe, made: Ingredients, student: DiffusionModel, device: torch.device | str) -> StateMaker:
    """Makes the states of every source, and holds the expert that labels them."""
    config = recipe.config
    expert, acting = actor_networks(
        made.teacher.copy(),
        student.copy(),
        config=config,
        objective=made.objective,
        threshold=made.threshold,
        device=device,
        acts=True,
    )
    return StateMaker(
        made.objective,
        made.teacher,
        recipe.conditions(made.data),
        images=made.data.images,
        student=acting,
        expert=expert,
        mixing=recipe.mixing,
        autocast=recipe.rollout_autocast,
        device=device,
    )


def _monitor(recipe: Recipe, made: Ingredients, student: DiffusionModel, records: list[dict[str, float]]) -> _Monitor:
    from ddil_ray.training.shift import ShiftMeter  # seconds to import, which a run without it does not pay

    conditions = recipe.conditions(made.data)
    meter = ShiftMeter(recipe, made.objective, student, images=made.data.images, conditions=conditions)
    return _Monitor(meter, Cadence(recipe.config.shift.every), records)


def _blocks(
    recipe: Recipe, origin: Origin, plans: list[ConsumptionPlan], maker: StateMaker, seconds: dict[str, float]
) -> Iterator[StateBatch]:
    """The labelled blocks of `origin` in the order that the loop takes them; adds to `seconds` what each part took."""
    assert maker.expert is not None
    expert, kept = (
        maker.expert,
        kept_blocks(recipe, origin, maker.conditions.pool, folder=recipe.config.teacher_rollouts.keep_at),
    )

    def labelled(request: StateRequest) -> StateBatch:
        started = time.perf_counter()
        states = maker.make(request)
        made = time.perf_counter()
        block = expert.label(maker.objective, states, maker.device)
        seconds["rollout"] += made - started
        seconds["label"] += time.perf_counter() - made
        return block

    for request in requests(recipe, origin, plans):
        yield labelled(request) if kept is None else kept.block(request, expert, labelled)


def requests(recipe: Recipe, origin: Origin, plans: list[ConsumptionPlan]) -> Iterator[StateRequest]:
    """What `origin` is asked for in a run, in order; the same as a Ray run of one worker asks for."""
    rows = recipe.rows_per_block(origin)
    for phase, plan in enumerate(plans):
        for index, progress in enumerate(plan.progress(origin, rows).tolist()):
            yield StateRequest(origin, phase, index, rows, recipe.config.seed, progress)
