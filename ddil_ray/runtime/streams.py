"""One Ray Data stream per source: requests -> state actors -> (label actors) -> trainer ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset, ExecutionOptions
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train import DataConfig

from ddil_ray.runtime.context import RunContext, StageCall, actor_options
from ddil_ray.runtime.pools import follow_hub
from ddil_ray.runtime.rows import row_blocks

if TYPE_CHECKING:
    from ddil_ray.config import Role
    from ddil_ray.states.batch import Origin
    from ddil_ray.training.recipe import Recipe

__all__ = ["StreamSplit", "actor_pool", "stream_factory"]

R = TypeVar("R", bound="Role")

_GUARD = "ddil_ray.runtime.guard:Guard"
_WAITING = 2
"""Requests that Ray Data lets wait in an actor; its own default."""


def stream_factory(context: RunContext, recipe: Recipe, origin: Origin, *, phases: int) -> Callable[[], Dataset]:
    """What Ray Train calls at every start of the worker group to get the stream of `origin`.

    The stream has the requests of a whole run; after a restart its actors count from the step that the trainer resumed
    at, and the requests left over at the end are never reached. It is built in a process that need not import torch.
    """
    blocks, rows = _most_blocks(recipe, origin, phases=phases), recipe.rows_per_block(origin)
    stream, name = int(origin), origin.label
    states, labels = (_giving_way(_least(role)) for role in (recipe.role_of(origin), recipe.config.labels))
    labelled_apart = recipe.config.labels.placement == "pool"

    def build() -> Dataset:
        incarnation = ray.get(context.hub.incarnation.remote())
        dataset = row_blocks(pa.table({"place": range(blocks)})).map_batches(
            StageCall,
            fn_constructor_args=(
                _GUARD,
                "ddil_ray.runtime.stages:StateStage",
                name,
                incarnation,
                context,
                stream,
                incarnation,
            ),
            batch_size=1,
            **states,
        )
        pools = [name]
        if labelled_apart:
            pools.append(f"labels/{name}")
            dataset = dataset.map_batches(
                StageCall,
                fn_constructor_args=(
                    _GUARD,
                    "ddil_ray.runtime.stages:LabelStage",
                    f"labels/{name}",
                    incarnation,
                    context,
                    stream,
                ),
                batch_size=rows,
                **labels,
            )
        dataset.set_name(name)
        _configure(dataset)
        follow_hub(dataset, context.hub, pools)
        return dataset

    return build


def _most_blocks(recipe: Recipe, origin: Origin, *, phases: int) -> int:
    """Blocks of a whole run with any number of workers that it may have."""
    from ddil_ray.runtime.stages import stream_plan
    from ddil_ray.states.stretch import Stretch

    low, high = recipe.config.trainer.workers
    wholes = [Stretch(workers) for workers in range(low, high + 1)]
    plans = [stream_plan(recipe, origin, phases=phases, start_step=0, max_staleness=0, stretch=s) for s in wholes]
    return max(map(len, plans))


def _least(role: R) -> R:
    """`role` at its smallest. Ray sees actors that wait to be admitted as busy, and would start all at once."""
    return role.model_copy(update={"num_actors": role.bounds[0]})


def _giving_way(role: Role) -> dict[str, Any]:
    """A pool whose actors take in all requests that wait in them, and one that Ray repeats: none is behind another.

    They still make one block at a time, see `Stage`.
    """
    return actor_pool(
        role,
        max_tasks_in_flight_per_actor=_WAITING,
        max_concurrent_calls_per_actor=_WAITING + 1,
        enable_true_multi_threading=True,
    )


def actor_pool(role: Role, **strategy: Any) -> dict[str, Any]:
    """map_batches arguments that size a pool of actors; `strategy` is more of Ray's `ActorPoolStrategy`."""
    low, high = role.bounds
    size = {"size": low} if low == high else {"min_size": low, "max_size": high}
    return {
        "compute": ActorPoolStrategy(**size, **strategy),
        "batch_format": "numpy",
        "zero_copy_batch": True,
        **actor_options(role),
    }


def _configure(dataset: Dataset) -> None:
    context = dataset.context
    # A stream whose prior is small may rest for long; that is no fault.
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = 2**40  # a block is a request's rows: never cut, or ranks would get parts
    context.wait_for_min_actors_s = -1  # models may take as long to load as `faults.timeout_s` lets them
    context.enable_progress_bars = False
    context.print_on_execution_start = False


class StreamSplit(DataConfig):  # type: ignore[misc]
    """Gives block k of every stream to rank k mod W, at once.

    Ray's own splitting holds rows back to make ranks equal and prefers local blocks; with the bounded, ordered streams
    here either would leave a rank waiting for rows that another cannot take.
    """

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any = None,
        worker_node_ids: Any = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """See `ray.train.DataConfig.configure`."""
        _keep_helpers_here()
        splits: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            copied = dataset.copy(dataset)
            copied.context.execution_options = ExecutionOptions(preserve_order=True)
            if world_size == 1:  # nothing to split: the worker runs the stream, which saves a process per source
                splits[0][name] = copied.iterator()
                continue
            for rank, part in enumerate(copied.streaming_split(world_size, equal=False, locality_hints=None)):
                splits[rank][name] = part
        return splits


def _keep_helpers_here() -> None:
    """Start Ray Data's helpers of the whole cluster on this node, which is the driver's.

    Ray ties them to the node of whoever first runs a stream. That may be a trainer, and when its node is taken away
    they cannot start elsewhere: whatever stream starts before Ray has given them up breaks off.
    """
    for start in (
        get_or_create_actor_location_tracker,
        get_or_create_autoscaling_coordinator,
        get_or_create_stats_actor,
    ):
        start()
