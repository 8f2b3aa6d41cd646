"""How long each part of a run takes on one device: a block of every source, its labels, an update, a publication.

Three ways to know, all of which run the run's own code, so that guidance, substeps, stages, critics, adapters and
checkpointing are counted as they are:

| basis | networks | time is |
| --- | --- | --- |
| counted | stand-ins that know their FLOP per row | FLOP over what an accelerator reaches, added up in virtual time |
| declared | simulated ones (`ddil_ray.simulation`) | what they would sleep, added up in virtual time |
| measured | the run's own, on this process's device | the clock's, after a pass to warm up |
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ddil_ray.capacity.accelerators import Accelerator
from ddil_ray.capacity.counting import count_forward, count_update, cycle_of, mean_of_cycle
from ddil_ray.config import RunConfig
from ddil_ray.models.model import DiffusionModel
from ddil_ray.simulation.device import virtual_time
from ddil_ray.simulation.network import PassTimes, SimulatedNetwork
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import StateRequest
from ddil_ray.trained import trained_state
from ddil_ray.training.inline import state_maker
from ddil_ray.training.learner import Learner
from ddil_ray.training.placement import trained
from ddil_ray.training.producer import Expert
from ddil_ray.training.recipe import ROLE_OF_ORIGIN, Ingredients, Recipe
from ddil_ray.training.wire import WIRE_DTYPES, flatten_weights

__all__ = ["COPY_BYTES_PER_S", "PROGRESS", "Costs", "PhaseCosts", "counted", "declared", "measured"]

COPY_BYTES_PER_S = 5e9
"""At which weights are taken to leave the trainer's device for a publication, where that is not measured."""
PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in a phase blocks are timed: what mixed rollouts cost may move with it."""
_DRAWN = 16
"""Mixed blocks gone through in virtual time at each of these, since who takes which of their steps is drawn."""

Timer = Callable[[Callable[[], object]], float]
"""Seconds of the device that a call takes."""


@dataclass(frozen=True)
class PhaseCosts:
    """Seconds of one actor in one phase, on the device of its role."""

    state_s: Mapping[Origin, np.ndarray]
    """A block of each source without its labels, at each of `PROGRESS`."""
    label_s: Mapping[Origin, float]
    """The labels of such a block."""


@dataclass(frozen=True)
class Costs:
    """Of a whole run."""

    basis: str
    phases: tuple[PhaseCosts, ...]
    update_s: float
    """An update of one trainer worker, on its share of the batch."""
    publication_s: float
    """To copy what is trained off the device."""
    row_bytes: int
    """Of a labelled state, on its way to the trainer."""
    weight_bytes: int
    """Of a publication."""


@virtual_time()  # nothing sleeps here, whether it is timed or not
def declared(recipe: Recipe, made: Ingredients) -> Costs:
    """Of a run with a simulated teacher, by the time that its networks would sleep."""
    student = recipe.student_of(made.teacher)
    stages = _Stages(recipe, _small(made), replace(student, sample_shape=_dot(student)), "cpu")
    update_s = stages.update_s(_virtually)
    return _Costs.alike(stages, _virtually, _DRAWN).of(made, "declared", update_s=update_s, publication_s=0.0)


def measured(recipe: Recipe, made: Ingredients) -> Costs:
    """Of the run's own networks by the clock, on a GPU if this process has one; each part is done a few times."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = recipe.student_of(made.teacher)
    stages, timer = _Stages(recipe, made, student, device), partial(_by_the_clock, device)
    update_s = stages.update_s(timer)
    publication_s = timer(lambda: flatten_weights(stages.student.network))
    return _Costs.alike(stages, timer, 1).of(made, "measured", update_s=update_s, publication_s=publication_s)


@virtual_time()
def counted(recipe: Recipe, made: Ingredients, accelerators: Mapping[str, Accelerator]) -> Costs:
    """Of the run's own networks by their floating-point operations; no tensor of theirs is computed.

    Stand-ins, which know the seconds of a row, roll out and label in virtual time; the update is run without memory.

    Args:
        recipe: the run.
        made: its ingredients.
        accelerators: what each role runs on, by config group.
    """
    config, student = recipe.config, recipe.student_of(made.teacher)
    work, flop = count_update(_largest(recipe), made), count_forward(recipe, made)
    update_s = accelerators["trainer"].seconds(
        training_flop=work.training, inference_flop=work.inference, precision=config.trainer.precision
    )

    def stages(*, on: str, at: str) -> _Stages:
        """On the device of a role, at the work of one."""
        of_teacher, of_student = (
            accelerators[on].seconds(training_flop=0.0, inference_flop=each, precision=precision)
            for each, precision in zip(flop, _precisions(config, at), strict=True)
        )
        stood_in = replace(_small(made), teacher=_stand_in(made.teacher, of_teacher))
        return _Stages(Recipe(_plainly_placed(config)), stood_in, _stand_in(student, of_student), "cpu")

    pooled, roles = config.labels.placement == "pool", {o: ROLE_OF_ORIGIN[o] for o in recipe.priors.origins}
    states = {o: stages(on=role, at=role) for o, role in roles.items()}
    labels = {o: stages(on="labels" if pooled else role, at="labels") for o, role in roles.items()}
    costs = _Costs(states, labels, _virtually, _DRAWN).of(made, "counted", update_s=update_s, publication_s=0.0)
    weight_bytes = _bytes(student, recipe)
    return replace(costs, weight_bytes=weight_bytes, publication_s=weight_bytes / COPY_BYTES_PER_S)


def _precisions(config: RunConfig, role: str) -> tuple[str, str]:
    """What teacher and student run in at the work of `role`, see `placement`: a teacher's own dtype comes first."""
    precision = getattr(getattr(config, role), "precision", None) or config.trainer.precision
    return precision if config.teacher.dtype == "fp32" else config.teacher.dtype, precision


def _largest(recipe: Recipe) -> Recipe:
    """The run with as many workers as may be."""
    trainer = recipe.config.trainer
    trainer = trainer.model_copy(update={"num_workers": trainer.workers[1]})
    return Recipe(recipe.config.model_copy(update={"trainer": trainer}))


def _stand_in(model: DiffusionModel, seconds: float) -> DiffusionModel:
    network = SimulatedNetwork(PassTimes(seconds, 0.0, 0.0), weights=1)
    return replace(model.with_network(network), sample_shape=_dot(model))


def _small(made: Ingredients) -> Ingredients:
    """Samples of one position: what takes virtual time depends on rows alone."""
    images = made.data.images[(slice(None), slice(None), *[slice(1)] * (made.data.images.ndim - 2))]
    teacher = replace(made.teacher, sample_shape=_dot(made.teacher))
    return replace(made, teacher=teacher, data=replace(made.data, images=images))


def _dot(model: DiffusionModel) -> tuple[int, ...]:
    return (model.sample_shape[0], *[1] * (len(model.sample_shape) - 1))


def _plainly_placed(config: RunConfig) -> RunConfig:
    """`config` as stand-ins can be placed, which have neither blocks nor convolutions."""
    plain = {"gradient_checkpointing": False, "channels_last": False, "compile": False, "precision": "fp32"}
    return config.model_copy(
        update={
            "trainer": config.trainer.model_copy(update=plain),
            "teacher": config.teacher.model_copy(update={"dtype": "fp32"}),
        }
    )


class _Stages:
    """What the processes of a run do, in this one."""

    def __init__(self, recipe: Recipe, made: Ingredients, student: DiffusionModel, device: str) -> None:
        self.recipe, self.made, self.student, self.device = recipe, made, student, device
        self.maker = state_maker(recipe, made, student, device)

    @property
    def expert(self) -> Expert:
        """The teacher of the phase."""
        assert self.maker.expert is not None
        return self.maker.expert

    def enter(self, phase: int) -> None:
        """Go on to `phase`, with whatever weights."""
        self.expert.begin(phase, promoted=phase > 0 and self.expert.student is not None)

    def states(self, origin: Origin, *, rows: int, phase: int = 0, index: int = 0, progress: float = 0.0) -> StateBatch:
        """A block without labels."""
        return self.maker.make(StateRequest(origin, phase, index, rows, self.recipe.config.seed, progress))

    def label(self, states: StateBatch) -> StateBatch:
        """The block with them, asked for as actors do."""
        size = self.recipe.config.labels.batch_size
        parts = [states[slice(i, i + size)] for i in range(0, len(states), size)]
        return StateBatch.cat([self.expert.label(self.maker.objective, part, self.device) for part in parts])

    def learner(self) -> Learner:
        """That of a trainer worker."""
        recipe, made, objective = self.recipe, self.made, self.made.objective
        student = trained(self.student.copy(), recipe.config, self.device)
        recipe.equip(objective, self.expert.teacher, made.data.images, made.data.labels)
        return Learner(student, objective, recipe.optimizer_settings())

    def update_s(self, timer: Timer) -> float:
        """Mean seconds of an update over a cycle of the objective."""
        trainer, learner = self.recipe.config.trainer, self.learner()
        rows = trainer.batch_size // trainer.workers[1]
        batch = self.label(self.states(self.recipe.priors.origins[0], rows=rows))
        generator = torch.Generator().manual_seed(0)
        return mean_of_cycle(lambda: timer(lambda: learner.update(batch, generator)), cycle_of(self.recipe))


@dataclass(frozen=True)
class _Costs:
    """Times what actors do."""

    states: Mapping[Origin, _Stages]
    """Where blocks of each source are made."""
    labels: Mapping[Origin, _Stages]
    """Where they are labelled."""
    timer: Timer
    drawn: int
    """Mixed blocks to time at each of `PROGRESS`."""

    @classmethod
    def alike(cls, stages: _Stages, timer: Timer, drawn: int) -> _Costs:
        """Where all roles have the same device."""
        everywhere = dict.fromkeys(stages.recipe.priors.origins, stages)
        return cls(everywhere, everywhere, timer, drawn)

    def of(self, made: Ingredients, basis: str, *, update_s: float, publication_s: float) -> Costs:
        """All costs, with those that are known; `made` has the samples of full size."""
        origin, stages = next(iter(self.states.items()))
        phases = tuple(self._phase(index) for index in range(len(stages.made.objective.phases)))
        stages.enter(0)
        columns = stages.label(stages.states(origin, rows=2)).to_columns()
        larger = math.prod(made.teacher.sample_shape) // math.prod(stages.made.teacher.sample_shape)
        row_bytes = sum(column.nbytes * (larger if column.ndim > 2 else 1) for column in columns.values()) // 2
        return Costs(basis, phases, update_s, publication_s, row_bytes, _bytes(stages.student, stages.recipe))

    def _phase(self, phase: int) -> PhaseCosts:
        state_s, label_s = {}, {}
        for origin, stages in self.states.items():
            stages.enter(phase)
            self.labels[origin].enter(phase)
            rows = stages.recipe.rows_per_block(origin)
            state_s[origin] = self._states(origin, phase, rows)
            block = stages.states(origin, rows=rows, phase=phase)
            label_s[origin] = self.timer(partial(self.labels[origin].label, block))
        return PhaseCosts(state_s, label_s)

    def _states(self, origin: Origin, phase: int, rows: int) -> np.ndarray:
        indices, stages = itertools.count(), self.states[origin]

        def mean(progress: float, blocks: int) -> float:
            return statistics.fmean(
                self.timer(
                    lambda: stages.states(origin, rows=rows, phase=phase, index=next(indices), progress=progress)
                )
                for _ in range(blocks)
            )

        if origin is not Origin.MIXED:
            return np.full(len(PROGRESS), mean(0.0, 1))
        chance = stages.recipe.mixing.teacher_probability
        if chance.start == chance.end:
            return np.full(len(PROGRESS), mean(0.0, self.drawn * len(PROGRESS)))
        return np.array([mean(progress, self.drawn) for progress in PROGRESS])


def _virtually(call: Callable[[], object]) -> float:
    with virtual_time() as clock:
        call()
    return clock.seconds


def _by_the_clock(device: str, call: Callable[[], object], *, times: int = 3) -> float:
    """Median of `times`, after one that is not counted."""
    seconds = []
    for _ in range(times + 1):
        _finish(device)
        started = time.perf_counter()
        call()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _bytes(model: DiffusionModel, recipe: Recipe) -> int:
    """Of what is trained of `model`, as it travels."""
    wire = WIRE_DTYPES[recipe.config.sync.dtype].itemsize
    tensors = trained_state(model.network).values()
    return sum(t.numel() * (wire if t.dtype == torch.float32 else t.element_size()) for t in tensors)
