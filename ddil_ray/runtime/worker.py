"""What runs on every Ray Train worker: the training loop, fed by the streams, reporting to the hub."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
import torch
from fsspec.implementations.local import LocalFileSystem

from ddil_ray.runtime.admission import Stream
from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.hooks import RayHooks
from ddil_ray.runtime.logs import name_logs
from ddil_ray.runtime.publisher import Publisher
from ddil_ray.runtime.reader import StreamReader
from ddil_ray.runtime.saving import Saver
from ddil_ray.runtime.stages import best_device, bind_prompts, shared_tensor, stream_plan
from ddil_ray.runtime.storage import CheckpointStore, Saved, verify
from ddil_ray.runtime.waits import BLOCK_TIMES, STEP_TIMES, trainer_watchdog
from ddil_ray.seeded import seed_of
from ddil_ray.states.batch import Origin
from ddil_ray.states.stretch import Stretch
from ddil_ray.training.checkpoint import read_checkpoint
from ddil_ray.training.learner import Learner
from ddil_ray.training.loop import TrainingLoop
from ddil_ray.training.parallel import Alone, strategy
from ddil_ray.training.placement import teaching, trained
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.wire import WIRE_DTYPES

__all__ = ["load_state", "train_worker"]


def train_worker(settings: dict[str, Any]) -> None:
    """Entry of a Ray Train worker; `settings` holds `context` (RunContext) and `store` (CheckpointStore)."""
    context: RunContext = settings["context"]
    recipe, worker = context.recipe, ray.train.get_context()
    rank, ranks = worker.get_world_rank(), worker.get_world_size()
    name_logs(recipe.config.name, "trainer")
    watchdog = trainer_watchdog(context, rank)
    watchdog.begin("loading its models and its checkpoint", times=STEP_TIMES)
    readers = _readers(context)
    for reader in readers.values():
        reader.start()  # the streams' actors start while this process loads its models
    learner = _learner(context)
    if rank:  # weights are equal, and dropout is each rank's own
        torch.manual_seed(seed_of(recipe.config.seed, rank))
    newest, group = _agreed(settings["store"], context, rank)
    state = None if newest is None else load_state(settings["store"], newest, learner.parallel, rank, ranks)
    phases = len(learner.objective.phases)
    stretch = _stretch(recipe, state, phases=phases, workers=ranks)
    bound = recipe.staleness_of(stretch, phases=phases, bound=context.max_staleness)
    saver = _saver(settings["store"], context, group, rank, ranks)
    hooks = RayHooks(context.hub, rank, ranks, learner.objective.student_becomes_teacher, saver, watchdog=watchdog)
    loop = TrainingLoop(
        learner=learner,
        plans=recipe.plans(phases, stretch),
        feeds={o: reader.next for o, reader in readers.items()},
        hooks=hooks,
        settings=recipe.loop_settings(max_staleness=bound, rank=rank),
        stretch=stretch,
    )
    if state is not None:
        loop.load_state_dict(state)
    if rank == 0:
        wire = WIRE_DTYPES[recipe.config.sync.dtype]
        hooks.publisher = Publisher(context.hub, loop.step, _streams(context, loop), float32_as=wire)
        if stretch.step > 0 and stretch.step == loop.step:
            left = state["held"] if state else 0
            changed = {"trainer/workers": ranks, "rows/left_behind": left, "staleness/bound": bound}
            context.hub.push.remote({"step": loop.step, **changed})
    logging.getLogger(__name__).info("Trains from step %d on, as rank %d of %d.", loop.step, rank, ranks)
    with saver:
        loop.run()
    if hooks.publisher is not None:
        hooks.publisher.end()
    watchdog.stop()


def _readers(context: RunContext) -> dict[Origin, StreamReader]:
    recipe = context.recipe

    def standing(origin: Origin) -> str:
        told: str = ray.get(context.hub.standing.remote(origin.label))
        return told

    patience_s = BLOCK_TIMES * recipe.config.faults.timeout_s
    return {
        o: StreamReader(
            o,
            ray.train.get_dataset_shard(o.label),
            recipe.rows_per_block(o),
            patience_s=patience_s,
            standing=standing,
        )
        for o in recipe.priors.origins
    }


def _agreed(store: CheckpointStore, context: RunContext, rank: int) -> tuple[Saved | None, str]:
    """What all ranks go on from, and how names of their checkpoints begin; rank 0 says."""
    found: tuple[Saved | None, str] | None = None
    if rank == 0:
        attempt = ray.train.get_context().get_experiment_name()
        found = _newest(store, context.hub.tell.remote), store.new_group(attempt)
    agreed: tuple[Saved | None, str] = ray.train.collective.broadcast_from_rank_zero(found)
    return agreed


def _newest(store: CheckpointStore, tell: Callable[[str], object]) -> Saved | None:
    """The checkpoint to go on from; `tell` hears what is of other versions here than where it was written."""
    newest = store.newest(tell)
    if newest is not None and (others := newest.other_versions()):
        tell(f"The checkpoint was written with {others}: what follows need not be the same to the last bit.")
    return newest


def _saver(store: CheckpointStore, context: RunContext, group: str, rank: int, ranks: int) -> Saver:
    """Saves this rank's share; rank 0's records stand for all."""
    return Saver(
        store,
        lambda step: f"{group}_{step:09d}",
        rank=rank,
        ranks=ranks,
        max_failures=context.recipe.config.checkpoint.max_failures,
        tell=context.hub.tell.remote,
        saved=context.hub.push.remote if rank == 0 else lambda record: None,
    )


def _learner(context: RunContext) -> Learner:
    """This process's student and method, kept as `trainer.parallel` says."""
    recipe, device = context.recipe, best_device()
    trainer = recipe.config.trainer
    torch.manual_seed(recipe.config.seed)
    teacher = recipe.load_teacher()
    bind_prompts(teacher, context)
    student = recipe.student_of(teacher)
    images, labels = (shared_tensor(part) for part in (context.images, context.labels))
    objective = recipe.objective(student, images)
    parallel = strategy(trainer.parallel, precision=trainer.precision, device=device)
    if objective.asks_in_trainer:  # cast before a student that shares its weights takes them to the device
        teacher = teaching(teacher, recipe.config, parallel.ready_on(device))
        teacher = teacher.with_network(parallel.freeze(teacher.network))
    student = trained(student, recipe.config, parallel.ready_on(device))
    recipe.equip(objective, teacher, images, labels)
    # Where labels come with the states, the trainer holds neither teacher nor data from here on.
    return Learner(student, objective, recipe.optimizer_settings(), parallel=parallel)


def _streams(context: RunContext, loop: TrainingLoop) -> dict[str, Stream]:
    """Plans and credits of all streams from where training goes on."""
    recipe, streams = context.recipe, {}
    for origin in recipe.priors.origins:
        plan = stream_plan(
            recipe,
            origin,
            phases=len(loop.plans),
            start_step=loop.step,
            max_staleness=loop.settings.max_staleness,
            stretch=loop.stretch,
        )
        ready = recipe.config.replay.ahead * loop.stretch.workers
        streams[origin.label] = Stream(plan, recipe.most_actors(origin), ready)
    return streams


def _stretch(recipe: Recipe, state: dict[str, Any] | None, *, phases: int, workers: int) -> Stretch:
    """Where streams go on with this number of workers."""
    if state is None:
        return Stretch(workers)
    before, phase = Stretch.from_state_dict(state["stretch"]), state["step"] // recipe.config.trainer.steps
    if phase == phases:  # nothing is left to be done
        return before
    rows = {origin: recipe.rows_per_block(origin) for origin in Origin}
    return before.followed_by(workers, recipe.plans(phases, before)[phase], step=state["step"], rows=rows)


def load_state(store: CheckpointStore, newest: Saved, parallel: Alone, rank: int, ranks: int) -> dict[str, Any]:
    """`TrainingLoop.state_dict` from a checkpoint, see `read_checkpoint`.

    Read from the store and not from `ray.train.get_checkpoint`: Ray Train does not know of checkpoints, as it would
    neither verify them nor fall back to an older one.
    """
    with ray.train.Checkpoint(newest.path, filesystem=store.filesystem()[0]).as_directory() as folder:
        if folder != newest.path:  # brought here: on the way, too, no byte may change
            verify(LocalFileSystem(), folder)
        return read_checkpoint(Path(folder), parallel, rank=rank, ranks=ranks)
