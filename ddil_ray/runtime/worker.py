"""What runs on every Ray Train worker: the training loop, fed by the streams, reporting to the hub."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train.torch import prepare_model

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime.context import RunContext
from ddil_ray.runtime.stages import best_device, bind_prompts, shared_tensor
from ddil_ray.runtime.storage import RANK_FILE, SHARED_FILE, CheckpointStore
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.training.learner import Learner
from ddil_ray.training.loop import TrainingLoop
from ddil_ray.training.placement import teaching, trained
from ddil_ray.training.weights import flatten_weights, load_trained_state

__all__ = ["load_rank_state", "train_worker"]


def train_worker(settings: dict[str, Any]) -> None:
    """Entry of a Ray Train worker; `settings` holds `context` (RunContext) and `store` (CheckpointStore)."""
    context: RunContext = settings["context"]
    recipe, worker = context.recipe, ray.train.get_context()
    shards = {o: ray.train.get_dataset_shard(o.label) for o in recipe.priors.origins}
    readers = {o: _Reader(o, shard, recipe.rows_per_block(o)) for o, shard in shards.items()}
    for reader in readers.values():
        reader.start()  # the streams' actors start while this process loads its models
    torch.manual_seed(recipe.config.seed)
    teacher = recipe.load_teacher()
    bind_prompts(teacher, context)
    student = trained(recipe.student_of(teacher), recipe.config, best_device())
    images, labels = (shared_tensor(part) for part in (context.images, context.labels))
    objective = recipe.objective(student, images)
    if objective.asks_in_trainer:
        teacher = teaching(teacher, recipe.config, best_device())
    recipe.equip(objective, teacher, images, labels)
    del teacher, images, labels  # where labels come with the states, the trainer holds neither teacher nor data
    learner = Learner(student, objective, recipe.optimizer_settings(), parallel=_data_parallel)
    rank = worker.get_world_rank()
    hooks = _RayHooks(context.hub, rank, objective.student_becomes_teacher)
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
        ray.get(context.hub.begin.remote(loop.step))
    loop.run()


def _data_parallel(network: torch.nn.Module) -> torch.nn.Module:
    """DDP over all workers; the bare network where there is one."""
    if ray.train.get_context().get_world_size() == 1:
        return network
    wrapped: torch.nn.Module = prepare_model(
        network, move_to_device=False, parallel_strategy_kwargs={"broadcast_buffers": False}
    )
    return wrapped


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


class _Reader:
    """Takes blocks of one stream off Ray Data in a thread of its own, up to two ahead of the trainer.

    A stream is entered at once when training starts, so that all of them start together, and never entered again.
    """

    def __init__(self, origin: Origin, shard: Any, rows: int) -> None:
        self.origin, self._shard, self._rows = origin, shard, rows
        self._queue: queue.Queue[StateBatch | BaseException | None] = queue.Queue(maxsize=1)

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name=f"read-{self.origin.label}", daemon=True).start()

    def _read(self) -> None:
        try:
            for block in self._blocks():
                self._queue.put(block)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _blocks(self) -> Iterator[StateBatch]:
        # Prefetching would hold a batch back until the next one is there, which may need this one to be trained on.
        batches = self._shard.iter_batches(
            batch_size=self._rows, batch_format="numpy", prefetch_batches=0, drop_last=True
        )
        for columns in batches:
            yield StateBatch.from_columns({k: np.asarray(v) for k, v in columns.items()})

    def next(self) -> StateBatch:
        """The next block.

        Raises:
            RunFailedError: the stream failed, or ended before training did.
        """
        block = self._queue.get()
        if isinstance(block, BaseException):
            raise RunFailedError(f"The stream of {self.origin.label} states failed: {block}") from block
        if block is None:
            raise RunFailedError(f"The stream of {self.origin.label} states ended before training did.")
        return block


@dataclass
class _RayHooks:
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
