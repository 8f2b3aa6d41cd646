"""Gives the actor pools of a running Ray Data stream the sizes that the hub wants; all that is private in Ray is here.

Ray has no call for it. What there is: a callback that the stream's executor calls at every step of its loop, in the
loop's own thread, and the configuration of its pools, by which Ray starts actors that lack. Those that are too many it
drops when they have nothing to do, which a state actor never has: its next blocks wait in it. So the newest are
withheld from new blocks until theirs are done, and dropped then: no block is lost, and none is made twice.

Written for Ray 2.60. A version that lacks what is used here is told of once, and its pools keep their sizes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.data import Dataset

__all__ = ["PoolSizes", "follow_hub"]

_KEY = "ddil_ray.pool_sizes"
_EVERY_S = 1.0

try:
    from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import ActorPoolScalingRequest
    from ray.data._internal.execution.execution_callback import ExecutionCallback
except ImportError:
    ExecutionCallback = None


def follow_hub(dataset: Dataset, hub: Any, pools: Sequence[str]) -> None:
    """Let the actor pools of `dataset`, in the order in which rows pass through them, have the sizes that `hub` wants.

    Args:
        dataset: a stream.
        hub: answers `pool_sizes`.
        pools: what the hub calls each.
    """
    if ExecutionCallback is None or not hasattr(dataset.context, "custom_execution_callback_classes"):
        hub.cannot_resize.remote(_cannot("has no execution callbacks"))
        return
    dataset.context.set_config(_KEY, (hub, list(pools)))
    dataset.context.custom_execution_callback_classes = [PoolSizes]


class PoolSizes(ExecutionCallback or object):  # type: ignore[misc]
    """Lives in the executor of one stream; its errors never end the stream."""

    def before_execution_starts(self, executor: Any) -> None:
        """Find the pools."""
        self._asked: Any = None
        self._due = 0.0
        self._wanted: dict[str, int] = {}
        self._pools: dict[str, Any] = {}
        self._hub, names = executor._data_context.get_config(_KEY)
        with self._guarded():
            found = [pool for op in executor._topology for pool in op.get_autoscaling_actor_pools()]
            self._pools = dict(zip(names, found, strict=True))

    def on_execution_step(self, executor: Any) -> None:
        """Bring every pool nearer to the size that is wanted."""
        if not self._pools:
            return
        with self._guarded():
            self._ask()
            for name, size in self._wanted.items():
                _resize(self._pools[name], size)

    def _ask(self) -> None:
        """Tell the hub of the actors that run, and take what it wanted when it was asked last; waits for nothing."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            answer, self._asked = self._asked, None
            try:
                self._wanted = ray.get(answer)
            except ray.exceptions.RayError:
                return  # a hub that starts again is asked again
        if self._asked is None and time.monotonic() >= self._due:
            counts = {name: pool.num_running_actors() for name, pool in self._pools.items()}
            self._asked, self._due = self._hub.pool_sizes.remote(counts), time.monotonic() + _EVERY_S

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn an error, which a change inside Ray would give, into pools that keep their size."""
        try:
            yield
        except Exception as error:
            self._pools = {}
            reason = _cannot(f"met {error!r}")
            logging.getLogger(__name__).warning(reason)
            self._hub.cannot_resize.remote(reason)


def _resize(pool: Any, size: int) -> None:
    """One step towards `size` actors."""
    if (pool.min_size(), pool.max_size()) != (size, size):  # what Ray's own autoscaler keeps to, at once when it grows
        pool._config = dataclasses.replace(pool._config, min_size=size, max_size=size, initial_size=size)
    if pool.current_size() <= size:
        return
    pool.scale(ActorPoolScalingRequest.downscale(delta=size - pool.current_size(), force=True, reason="resized"))
    surplus = pool.current_size() - size
    for actor in list(pool._running_actors)[len(pool._running_actors) - surplus :]:
        _withhold(pool, actor)


def _withhold(pool: Any, actor: Any) -> None:
    """Give `actor` no new block until Ray looks at its actors again, which it does before the next step."""
    location = pool._running_actors[actor].actor_location
    for heap in (pool._alive_actors_to_in_flight_tasks_heap, pool._alive_node_to_actor_heap.get(location, {})):
        if actor in heap:
            del heap[actor]


def _cannot(what: str) -> str:
    return f"Ray {ray.__version__} {what}, so the actors of a running job keep their numbers"
