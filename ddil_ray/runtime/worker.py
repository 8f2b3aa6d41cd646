"""What runs on every Ray Train worker: the training loop, fed by the streams, reporting to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from ddil_ray.runtime.admission import Stream
from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.hooks import RayHooks
from ddil_ray.runtime.publisher import Publisher
from ddil_ray.runtime.reader import StreamReader
from ddil_ray.runtime.stages import best_device, bind_prompts, shared_tensor, stream_plan
from ddil_ray.runtime.storage import RANK_FILE, SHARED_FILE, CheckpointStore
from ddil_ray.training.learner import Learner
from ddil_ray.training.loop import TrainingLoop
from ddil_ray.training.parallel import strategy
from ddil_ray.training.placement import teaching, trained
from ddil_ray.training.wire import WIRE_DTYPES

__all__ = ["load_rank_state", "train_worker"]


def train_worker(settings: dict[str, Any]) -> None:
    """Entry of a Ray Train worker; `settings` holds `context` (RunContext) and `store` (CheckpointStore)."""
    context: RunContext = settings["context"]
    recipe, worker = context.recipe, ray.train.get_context()
    trainer = recipe.config.trainer
    shards = {o: ray.train.get_dataset_shard(o.label) for o in recipe.priors.origins}
    readers = {o: StreamReader(o, shard, recipe.rows_per_block(o)) for o, shard in shards.items()}
    for reader in readers.values():
        reader.start()  # the streams' actors start while this process loads its models
    torch.manual_seed(recipe.config.seed)
    teacher = recipe.load_teacher()
    bind_prompts(teacher, context)
    student = recipe.student_of(teacher)
    images, labels = (shared_tensor(part) for part in (context.images, context.labels))
    objective = recipe.objective(student, images)
    parallel = strategy(trainer.parallel, precision=trainer.precision, device=best_device())
    if objective.asks_in_trainer:  # cast before a student that shares its weights takes them to the device
        teacher = teaching(teacher, recipe.config, best_device())
        teacher = teacher.with_network(parallel.freeze(teacher.network))
    student = trained(student, recipe.config, best_device())
    recipe.equip(objective, teacher, images, labels)
    del teacher, images, labels  # where labels come with the states, the trainer holds neither teacher nor data
    learner = Learner(student, objective, recipe.optimizer_settings(), parallel=parallel)
    rank = worker.get_world_rank()
    hooks = RayHooks(context.hub, rank, objective.student_becomes_teacher)
    loop = TrainingLoop(
        learner=learner,
        plans=recipe.plans(len(objective.phases)),
        feeds={o: reader.next for o, reader in readers.items()},
        hooks=hooks,
        settings=recipe.loop_settings(max_staleness=context.max_staleness, rank=rank),
    )
    state = load_rank_state(settings["store"], ranks=worker.get_world_size(), rank=rank)
    if state is not None:
        loop.load_state_dict(state)
    if rank == 0:
        wire = WIRE_DTYPES[recipe.config.sync.dtype]
        hooks.publisher = Publisher(context.hub, loop.step, _streams(context, loop), float32_as=wire)
    loop.run()
    if hooks.publisher is not None:
        hooks.publisher.end()


def _streams(context: RunContext, loop: TrainingLoop) -> dict[str, Stream]:
    """Plans and credits of all streams from where training goes on."""
    recipe, streams = context.recipe, {}
    for origin in recipe.priors.origins:
        plan = stream_plan(
            recipe, origin, phases=len(loop.plans), start_step=loop.step, max_staleness=context.max_staleness
        )
        ready = recipe.config.replay.ahead * recipe.config.trainer.num_workers
        streams[origin.label] = Stream(plan, recipe.most_actors(origin), ready)
    return streams


def load_rank_state(store: CheckpointStore, *, ranks: int, rank: int) -> dict[str, Any] | None:
    """`TrainingLoop.state_dict` of `rank` from the newest whole checkpoint, None if there is none.

    Read from the store and not from `ray.train.get_checkpoint`, which does not know of a checkpoint whose worker died
    before the controller had asked for it.
    """
    newest = store.newest(ranks=ranks)
    if newest is None:
        return None
    with ray.train.Checkpoint(newest, filesystem=store.filesystem()[0]).as_directory() as folder:
        shared = torch.load(Path(folder) / SHARED_FILE, weights_only=True, map_location="cpu")
        mine = torch.load(Path(folder) / RANK_FILE.format(rank=rank), weights_only=False, map_location="cpu")
    return {**shared, "rank": mine}
