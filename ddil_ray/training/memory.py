"""What every role of a run holds at its peak, told before anything starts.

The run's own code is run on tensors without memory (`tally`): an update of the learner in its steady state, the first
network passes of rollouts, labels and samples, whose peak later passes repeat. So the estimate follows whatever the
code does. Not counted: what libraries allocate inside an operation, convolutions apart; the CUDA context and its
allocator's gaps; feature networks of evaluation. `trainer.compile` is left out, as it tends to need less, and so is
`trainer.channels_last`, which was measured to need 3 to 8 % more. Where `trainer.parallel` cuts networks up, a worker's
part of them is counted, and not the block that is whole while it is called.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode

from ddil_ray.config import RunConfig
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.evaluation.samplers import Sampler
from ddil_ray.models.latents import LatentCodec
from ddil_ray.models.model import DiffusionModel
from ddil_ray.prompts import Embeddings, Prompts
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import Conditions, StateRequest
from ddil_ray.trained import trained_state
from ddil_ray.training.learner import Learner
from ddil_ray.training.optimizer import NetworkOptimizer, reserve_moments
from ddil_ray.training.placement import actor_networks, teaching, trained
from ddil_ray.training.producer import USES_STUDENT, USES_TEACHER, Expert, StateMaker
from ddil_ray.training.recipe import ROLE_OF_ORIGIN, Ingredients, Recipe
from ddil_ray.training.role_memory import RoleMemory
from ddil_ray.training.shift import ShiftMeter
from ddil_ray.training.tally import TensorTally
from ddil_ray.training.wire import WIRE_DTYPES, travelling_bytes

__all__ = ["ImaginedRole", "RoleMemory", "estimate", "imagined_learner", "shared_bytes"]

_PASSES = 2
"""Network passes after which a peak repeats itself: one that fills what is kept, and one beside it."""
_VERSIONS = 4
"""Of published weights that live at once: the newest, the next as they are written, those that slow actors still have
and those that the monitor is to measure."""
_ROW_NUMBERS = 50
"""Bytes of what a state carries beside x_t and its label."""


def estimate(recipe: Recipe, made: Ingredients, *, on_gpu: Collection[str] = ()) -> dict[str, RoleMemory]:
    """The memory of one actor of every role that the run starts, by the role's name in the plan.

    Args:
        recipe: the run.
        made: its ingredients, which stay as they are.
        on_gpu: names of the roles that have a GPU.
    """
    roles: dict[str, _Role] = {"trainer": _trainer}
    for origin in recipe.priors.origins:
        name = "student_rollouts (mixed)" if origin is Origin.MIXED else ROLE_OF_ORIGIN[origin]
        roles[name] = partial(_states, origin)
        if recipe.config.labels.placement == "pool":
            roles[f"labels ({origin.label})"] = partial(_labels, origin)
    if recipe.config.shift.enabled:
        roles["shift"] = _shift
    if recipe.config.evaluation.enabled:
        roles["evaluation"] = _evaluation
    with torch.random.fork_rng(devices=[]):
        return {name: role(ImaginedRole(recipe, made, gpu=name in on_gpu)) for name, role in roles.items()}


def shared_bytes(recipe: Recipe, made: Ingredients) -> dict[str, int]:
    """What the object store of a node that runs all actors holds for them at most: data, published weights, blocks."""
    config, wire = recipe.config, WIRE_DTYPES[recipe.config.sync.dtype]
    with torch.random.fork_rng(devices=[]):
        student = list(trained_state(recipe.student_of(made.teacher).network).values())
    weights = _VERSIONS * travelling_bytes(student, float32_as=wire)
    if made.objective.student_becomes_teacher:  # of the round that begins, and of the one that ends
        weights += 2 * travelling_bytes(student)
    ready = config.trainer.workers[1] * (config.replay.ahead + 1)  # and one that each worker takes
    rows = sum(recipe.rows_per_block(o) * (recipe.most_actors(o) + ready) for o in recipe.priors.origins)
    row = 2 * 4 * math.prod(made.teacher.sample_shape) + _ROW_NUMBERS
    return {
        "data": _bytes(made.data.images) + _bytes(made.data.labels),
        "published weights": weights,
        "blocks": rows * row,
    }


class ImaginedRole:
    """What a role is made of without memory, and what counts it."""

    def __init__(self, recipe: Recipe, made: Ingredients, *, gpu: bool) -> None:
        trainer = recipe.config.trainer.model_copy(update={"compile": False, "channels_last": False})
        self.config: RunConfig = recipe.config.model_copy(update={"trainer": trainer})
        self.recipe, self.made, self.gpu = Recipe(self.config), made, gpu
        self.tally = TensorTally()
        most = max(self.config.trainer.batch_size, self.config.shift.num_samples, 1)
        self.images, self.labels = (part[:most].clone() for part in (made.data.images, made.data.labels))

    def networks(self) -> tuple[DiffusionModel, DiffusionModel]:
        """The teacher as loaded, and a new student of it."""
        models = self.made.teacher, self.recipe.student_of(self.made.teacher)
        with FakeCopyMode(self.tally.fake):  # in one go, since a student may share the teacher's weights
            networks = copy.deepcopy(tuple(model.network for model in models))
        bank: Any = _EmptyBank(self.made.prompts) if self.made.prompts is not None else None
        teacher, student = (model.with_network(network) for model, network in zip(models, networks, strict=True))
        teacher.bind(bank)
        student.bind(bank)
        if self.gpu:
            for part in (*teacher.network.modules(), *student.network.modules()):
                if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
                    part.register_forward_pre_hook(_in_float32)
        return teacher, student

    @contextmanager
    def counting(self, *models: DiffusionModel | None) -> Iterator[None]:
        """Count what is done here, which ends when one of `models` is asked more often than a peak needs."""
        hooks = [m.network.register_forward_pre_hook(_Limit()) for m in models if m is not None]
        try:
            with self.tally:
                yield
        except _EnoughError:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def name(self, part: str, model: DiffusionModel | nn.Module | None) -> None:
        """Count the tensors of `model` as `part`."""
        network = model.network if isinstance(model, DiffusionModel) else model
        if network is not None:
            self.tally.name(part, _tensors(network))

    def states(self, rows: int, *, labelled: bool) -> StateBatch:
        """States of the given source."""
        with self.tally:
            x_t = torch.zeros(rows, *self.made.teacher.sample_shape)
            generator = torch.Generator().manual_seed(0)
            cond, w = Conditions(self.labels, self.recipe.guidance).draw(rows, generator)
            numbers = torch.zeros(rows, dtype=torch.int64)
            batch = StateBatch(
                x_t=x_t,
                t=torch.rand(rows, generator=generator, dtype=torch.float64),
                cond=cond,
                w=w,
                origin=numbers.to(torch.int8),
                version=numbers - 1,
                phase=numbers,
                label=torch.zeros_like(x_t) if labelled else torch.zeros(rows, 0),
            )
            self.tally.name("states", vars(batch).values())
        return batch

    def expert(self, *, acts: bool, asked: bool = True) -> tuple[Expert, DiffusionModel | None]:
        """The networks of an actor, as it holds them."""
        networks = list(self.networks())
        with self.tally.building():
            expert, student = actor_networks(
                networks.pop(0),
                networks.pop(),
                config=self.config,
                objective=self.made.objective,
                threshold=self.made.threshold,
                device="cpu",
                acts=acts,
                asked=asked,
            )
        self.name("teacher", expert.teacher)
        self.name("next teacher", expert.student)
        self.name("student", student)
        self.tally.restart()
        return expert, student

    def memory(self, host: dict[str, int] | None = None, *, offloaded: Collection[str] = ()) -> RoleMemory:
        """What was counted; parts that are `offloaded` are on the host."""
        parts = {name: size for name, size in self.tally.peak.items() if size}
        beside = {name: parts.pop(name) for name in offloaded if name in parts} if self.gpu else {}
        prompts = {"prompts": _cached_bytes(self.made.prompts)} if self.made.prompts is not None else {}
        return RoleMemory(parts, {**(host or {}), **beside, **prompts}, self.gpu)


def imagined_learner(stage: ImaginedRole) -> tuple[Learner, StateBatch]:
    """The learner of a trainer worker, and a batch of its states."""
    recipe, trainer, objective = stage.recipe, stage.config.trainer, copy.copy(stage.made.objective)
    teacher, student = stage.networks()
    with stage.tally.building():
        trained(student, stage.config, "cpu")
        if objective.asks_in_trainer:
            teacher = teaching(teacher, stage.config, "cpu")
    recipe.equip(objective, teacher, stage.images, stage.labels)  # may calibrate a threshold, on real samples
    with stage.tally.building():
        learner = Learner(student, objective, recipe.optimizer_settings())
    stage.name("teacher", teacher if objective.asks_in_trainer else None)
    stage.name("student", student)
    stage.name("critic", objective.critic)
    del teacher
    for kept in vars(objective).values():
        stage.name("target", kept if isinstance(kept, nn.Module) else None)
    stage.tally.name_rest("average")
    rows = trainer.batch_size // trainer.workers[0]
    return learner, stage.states(rows, labelled=not objective.asks_in_trainer)


def _trainer(stage: ImaginedRole) -> RoleMemory:
    trainer = stage.config.trainer
    learner, batch = imagined_learner(stage)
    for optimizer in learner.optimizers.values():
        _settle(optimizer, stage)
    with stage.counting():
        stage.tally.restart()
        learner.update(batch, torch.Generator().manual_seed(0))
    offloaded = ("average",) if getattr(trainer, "ema_offload", False) else ()
    memory = stage.memory({"replay": _replay_bytes(stage, len(batch), batch)}, offloaded=offloaded)
    cut = trainer.parallel == "fsdp"
    if cut:
        memory = memory.cut(trainer.workers[0])
    # The last publication is kept in the CPU's memory, and the next is copied while the trainer goes on: where the
    # weights lie, which is there too where they are cut up and gathered.
    on_device, wire = stage.gpu and not cut, WIRE_DTYPES[stage.config.sync.dtype]
    published = travelling_bytes(trained_state(learner.student.network).values(), float32_as=wire)
    return replace(
        memory,
        parts={**memory.parts, **({"publication": published} if on_device else {})},
        host={**memory.host, "publications": (1 if on_device else 2) * published},
    )


def _settle(optimizer: NetworkOptimizer, stage: ImaginedRole) -> None:
    """Bring an optimizer to where it has been used before, and let gradients be told apart."""
    with stage.tally.building():
        reserve_moments(optimizer)
    stage.tally.name(
        "optimizer", (t for s in optimizer.adam.state.values() for t in s.values() if isinstance(t, Tensor))
    )
    for parameter in optimizer.parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: stage.tally.name("gradients", [p.grad]))
    if stage.gpu:  # as torch chooses there
        for group in optimizer.adam.param_groups:
            group["foreach"] = True


def _states(origin: Origin, stage: ImaginedRole) -> RoleMemory:
    kept = origin is Origin.TEACHER and stage.config.teacher_rollouts.keep_rows is not None
    fused = stage.config.labels.placement == "fused" or kept
    expert, student = stage.expert(acts=origin in USES_STUDENT, asked=fused or origin in USES_TEACHER)
    rows = stage.recipe.rows_per_block(origin)
    maker = StateMaker(
        stage.made.objective,
        stage.made.teacher,
        Conditions(stage.labels, stage.recipe.guidance),
        images=stage.images,
        student=student,
        expert=expert,
        mixing=stage.recipe.mixing,
        autocast=stage.recipe.rollout_autocast,
    )
    for phase in range(len(stage.made.objective.phases)):
        expert.begin(phase, promoted=phase > 0 and expert.student is not None)
        with stage.counting(student, expert.teacher, expert.student):
            maker.make(StateRequest(origin, phase, 0, rows, seed=0))
    if fused:
        _label(stage, expert, rows)
    return stage.memory()


def _labels(origin: Origin, stage: ImaginedRole) -> RoleMemory:
    expert, _ = stage.expert(acts=False)
    _label(stage, expert, stage.recipe.rows_per_block(origin))
    return stage.memory()


def _label(stage: ImaginedRole, expert: Expert, rows: int) -> None:
    """The first part of a block, which is the largest, by the teacher that is guided."""
    expert.begin(0, promoted=False)
    states = stage.states(rows, labelled=False)
    with stage.counting(expert.teacher):
        expert.label(stage.made.objective, states[slice(0, stage.config.labels.batch_size)], "cpu")


def _shift(stage: ImaginedRole) -> RoleMemory:
    expert, student = stage.expert(acts=True)
    assert student is not None
    conditions = Conditions(stage.labels, stage.recipe.guidance)
    with stage.counting(expert.teacher):
        meter = ShiftMeter(stage.recipe, stage.made.objective, student, images=stage.images, conditions=conditions)
        meter.probe.start(stage.made.objective.phases[0], expert.asked_in(meter.autocast))
    return stage.memory()


def _evaluation(stage: ImaginedRole) -> RoleMemory:
    objective, settings = stage.made.objective, stage.config.evaluation
    measured = [p for p in objective.phases if p.student_steps in settings.steps] if objective.fixed_steps else [None]
    teacher, student = stage.networks()
    with stage.tally.building():
        students = [student.copy() for _ in measured]
    del student
    stage.name("teacher", teacher)
    for student in students:
        stage.name("student", student)
    codec = None
    if stage.made.teacher.codec is not None:
        with FakeCopyMode(stage.tally.fake):
            codec = LatentCodec(copy.deepcopy(stage.made.teacher.codec.vae))
        stage.name("autoencoder", codec.vae)
    sampler = Sampler(
        teacher.expert(guided=True, threshold=stage.made.threshold),
        teacher.schedule,
        uniform_grid(_PASSES),
        "ddim",
        stage.recipe.student_guidance,
        codec=codec,
    )
    rows = min(settings.batch_size, settings.num_samples)
    with stage.counting():
        stage.tally.restart()
        cond = stage.labels[torch.zeros(rows, dtype=torch.int64)]
        sampler(torch.zeros(rows, *teacher.sample_shape), cond, batch_size=rows)
    return stage.memory()


_Role = Callable[[ImaginedRole], RoleMemory]


class _EnoughError(Exception):
    """Raised from a network that was asked as often as its peak needs."""


class _Limit:
    """A hook that lets a network be asked `_PASSES` times."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, network: nn.Module, arguments: Any) -> None:
        self.passes += 1
        if self.passes > _PASSES:
            raise _EnoughError


def _in_float32(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook that lets autocast on the CPU keep of a norm what it keeps on a GPU.

    Source: torch's list of "CUDA Ops that can autocast to float32".
    """
    casts = torch.is_autocast_enabled("cpu") and all(p.dtype == torch.float32 for p in norm.parameters())
    return (arguments[0].float(), *arguments[1:]) if casts else arguments


@dataclass(frozen=True)
class _EmptyBank:
    """In place of a `PromptBank`: embeddings as large as its own."""

    prompts: Prompts

    def __call__(self, cond: Tensor, like: Tensor) -> Embeddings:
        """See `PromptBank`: distinct rows are stacked, then spread."""
        distinct, rows = min(len(cond), len(self.prompts.source)), torch.zeros_like(cond)
        shapes = {name: part.shape[1:] for name, part in self.prompts.negative.items()}
        stacked = {name: torch.zeros(distinct, *shape, dtype=like.dtype) for name, shape in shapes.items()}
        return {name: part[rows] for name, part in stacked.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> _EmptyBank:
        return self


def _cached_bytes(prompts: Prompts) -> int:
    row = sum(_bytes(part) for part in prompts.negative.values())
    return min(prompts.cache_bytes, len(prompts.source) * row)


def _replay_bytes(stage: ImaginedRole, rows: int, batch: StateBatch) -> int:
    """Of every source's buffer: rows drawn again, and a block."""
    replay, row = stage.config.replay, sum(_bytes(part) for part in vars(batch).values()) // rows
    blocks = [stage.recipe.rows_per_block(origin) for origin in stage.recipe.priors.origins]
    return sum(min(replay.capacity, replay.reuse * rows + block) * row for block in blocks)


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
