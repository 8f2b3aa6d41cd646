"""Distillation in one process, without Ray: the same states, labels, loop and plan, made on demand.

For tests, notebooks, benchmarks of the method, and as the baseline that the runtime's overhead is measured against.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ddil_ray.data import ImageData
from ddil_ray.models.model import DiffusionModel
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import StateRequest
from ddil_ray.training.learner import PRECISIONS, Learner, round_models
from ddil_ray.training.loop import TrainingLoop
from ddil_ray.training.producer import Expert, StateMaker
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.weights import flatten_weights

__all__ = ["InlineResult", "distill_inline"]


@dataclass
class InlineResult:
    """What an inline run leaves."""

    rounds: dict[int, DiffusionModel]
    """The averaged student of every phase, by its number of steps."""
    records: list[dict[str, float]]
    """Metrics, one record per `tracking.log_every` steps."""
    seconds: dict[str, float]
    """Time by what it was spent on: `rollout` (making states), `label` (asking the teacher), `train` (the rest)."""


@dataclass
class _InlineHooks:
    """Copies weights into the rollout student at every publication."""

    maker: StateMaker
    expert: Expert
    student_becomes_teacher: bool
    records: list[dict[str, float]] = field(default_factory=list)

    def phase_started(self, step: int, learner: Learner) -> None:
        weights = flatten_weights(learner.student.network)
        first = learner.phase.index == 0
        self.expert.enter(learner.phase.index, weights if self.student_becomes_teacher and not first else None)
        self.maker.load_student(step, weights)

    def publish(self, step: int, learner: Learner) -> None:
        self.maker.load_student(step, flatten_weights(learner.student.network))

    def log(self, record: dict[str, float]) -> None:
        self.records.append(record)

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Nothing is kept."""

    def should_stop(self, step: int) -> bool:
        return False


def distill_inline(
    recipe: Recipe,
    *,
    teacher: DiffusionModel | None = None,
    data: ImageData | None = None,
    device: torch.device | str = "cpu",
) -> InlineResult:
    """Run `recipe` in this process.

    Args:
        recipe: the run.
        teacher: in place of the config's.
        data: in place of the config's.
        device: of all networks while they are trained; the students come back on the CPU.
    """
    made = recipe.ingredients(teacher=teacher, data=data)
    teacher, data, objective = made.teacher, made.data, made.objective
    if torch.device(device).type != "cpu":
        teacher = teacher.copy()
        teacher.network.to(device)
    student = recipe.student_of(teacher)
    autocast = PRECISIONS[recipe.config.trainer.precision]
    expert = Expert(teacher, student.copy(), made.threshold, autocast)
    maker = StateMaker(
        objective,
        teacher,
        recipe.conditions(data),
        images=data.images,
        student=student.copy(),
        expert=expert,
        teacher_probability=recipe.config.states.mixed_teacher_probability,
        autocast=autocast,
        device=device,
    )
    for frozen in (expert.student, maker.student, teacher):
        assert frozen is not None
        frozen.network.eval().requires_grad_(False)
    hooks = _InlineHooks(maker, expert, objective.student_becomes_teacher)
    learner = Learner(student, objective, recipe.optimizer_settings())
    seconds = {"rollout": 0.0, "label": 0.0}
    blocks = {o: _blocks(recipe, o, made.plans, maker, expert, seconds) for o in recipe.priors.origins}
    loop = TrainingLoop(
        learner=learner,
        plans=made.plans,
        feeds={o: it.__next__ for o, it in blocks.items()},
        hooks=hooks,
        settings=recipe.loop_settings(max_staleness=made.max_staleness),
    )
    started = time.perf_counter()
    loop.run()
    seconds["train"] = time.perf_counter() - started - sum(seconds.values())
    student.network.cpu()
    return InlineResult(round_models(student, learner.rounds), hooks.records, seconds)


def _blocks(
    recipe: Recipe, origin: Origin, plans: list[Any], maker: StateMaker, expert: Expert, seconds: dict[str, float]
) -> Iterator[StateBatch]:
    """The labelled blocks of `origin` in the order that the loop takes them; adds to `seconds` what each part took."""
    rows = recipe.rows_per_block(origin)
    for phase, plan in enumerate(plans):
        for index in range(plan.blocks(origin, rows)):
            request = StateRequest(origin, phase, index, rows, recipe.config.seed)
            started = time.perf_counter()
            states = maker.make(request)
            made = time.perf_counter()
            labelled = expert.label(maker.objective, states, maker.device)
            seconds["rollout"] += made - started
            seconds["label"] += time.perf_counter() - made
            yield labelled
