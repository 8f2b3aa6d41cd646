"""Pins how Ray's pools are brought to a size, and what happens where a Ray lacks what that needs; without a cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import AutoscalingActorConfig
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators.actor_pool_map_operator import _ActorPool

from ddil_ray.runtime import pools
from ddil_ray.runtime.pools import PoolSizes


class _Actor:
    """In place of a handle: alive for ever."""

    def _get_local_state(self) -> int:
        from ray.core.generated.gcs_pb2 import ActorTableData

        return ActorTableData.ALIVE


class _Hub:
    """In place of the hub: wants what it was made with, and notes what it is told."""

    def __init__(self, wanted: dict[str, int]) -> None:
        self.wanted, self.counts, self.reasons = wanted, [], []
        self.pool_sizes = SimpleNamespace(remote=lambda counts: self.counts.append(counts) or self.wanted)
        self.cannot_resize = SimpleNamespace(remote=self.reasons.append)


def _pool(actors: int) -> _ActorPool:
    """Ray's own pool, of actors that start at once."""
    usage = ExecutionResources(cpu=1)
    config = AutoscalingActorConfig(actors, actors, actors, 2, 1, usage)
    made = iter(range(1000))
    pool = _ActorPool(lambda labels, name: (_Actor(), f"ready {next(made)}", usage), config)
    _start(pool, actors)
    return pool


def _start(pool: _ActorPool, actors: int) -> None:
    for _ in range(actors):
        actor, ready, usage = pool._create_actor()
        pool._add_pending_actor(actor, ready, usage)
        pool.pending_to_running(ready)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    stand_in = SimpleNamespace(
        wait=lambda refs, timeout: (refs, []), get=lambda ref: ref, exceptions=ray.exceptions, __version__="0"
    )
    monkeypatch.setattr(pools, "ray", stand_in)
    monkeypatch.setattr("ray.get", lambda ref: "node")
    monkeypatch.setattr(pools, "_EVERY_S", 0.0)


def _callback(hub: _Hub, *found) -> tuple[PoolSizes, SimpleNamespace]:
    executor = SimpleNamespace(
        _data_context=SimpleNamespace(get_config=lambda key: (hub, list(hub.wanted))),
        _topology=[SimpleNamespace(get_autoscaling_actor_pools=lambda pool=pool: [pool]) for pool in found],
    )
    callback = PoolSizes()
    callback.before_execution_starts(executor)
    return callback, executor


def _steps(callback, executor, pool, times=3):
    for _ in range(times):
        pool.refresh_actor_state()  # what the executor does before it calls back
        callback.on_execution_step(executor)


def test_a_pool_that_should_grow_is_left_to_ray_with_a_new_least():
    pool, hub = _pool(1), _Hub({"student": 3})
    _steps(*_callback(hub, pool), pool)
    assert (pool.min_size(), pool.max_size(), pool.current_size()) == (3, 3, 1)
    assert hub.counts[0] == {"student": 1}


def test_the_newest_actors_get_no_block_and_go_when_theirs_are_done():
    pool, hub = _pool(4), _Hub({"student": 2})
    actors = list(pool._running_actors)
    for actor in (*actors, *actors):
        pool.on_task_submitted(actor)  # each is at one block and has another
    callback, executor = _callback(hub, pool)
    _steps(callback, executor, pool)
    assert pool.current_size() == 4
    pool.on_task_completed(actors[3])
    assert pool.select_actors() is None  # it has room, and is not asked
    pool.on_task_completed(actors[0])
    assert pool.select_actors() is actors[0]
    _steps(callback, executor, pool)
    pool.on_task_completed(actors[3])
    _steps(callback, executor, pool)
    assert list(pool._running_actors) == actors[:3]
    pool.on_task_completed(actors[2])
    pool.on_task_completed(actors[2])
    _steps(callback, executor, pool)
    assert list(pool._running_actors) == actors[:2]
    assert pool.num_tasks_in_flight() == 3


def test_actors_that_do_nothing_or_start_still_go_at_once():
    pool, hub = _pool(3), _Hub({"student": 1})
    pool._add_pending_actor(*pool._create_actor())
    _steps(*_callback(hub, pool), pool)
    assert pool.current_size() == 1


def test_an_actor_that_was_withheld_works_again_when_the_wish_changes():
    pool, hub = _pool(2), _Hub({"student": 1})
    actors = list(pool._running_actors)
    for actor in actors:
        pool.on_task_submitted(actor)
    callback, executor = _callback(hub, pool)
    _steps(callback, executor, pool)
    assert pool.select_actors() is actors[0]
    hub.wanted["student"] = 2
    _steps(callback, executor, pool)
    pool.on_task_submitted(actors[0])
    assert pool.select_actors() is actors[1]


def test_pools_keep_their_sizes_where_ray_lacks_what_is_needed_and_the_hub_is_told_once():
    class Other:
        def num_running_actors(self):
            return 1

    hub = _Hub({"student": 2})
    callback, executor = _callback(hub, Other())
    for _ in range(5):
        callback.on_execution_step(executor)
    (reason,) = hub.reasons
    assert "so the actors of a running job keep their numbers" in reason
    callback, executor = _callback(hub)  # an executor without pools
    callback.on_execution_step(executor)
    assert len(hub.reasons) == 2


def test_a_hub_that_is_started_again_is_asked_again(monkeypatch):
    pool, hub = _pool(1), _Hub({"student": 3})
    callback, executor = _callback(hub, pool)

    def dead(ref):
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(pools.ray, "get", dead)
    _steps(callback, executor, pool)
    assert pool.max_size() == 1
    monkeypatch.setattr(pools.ray, "get", lambda ref: ref)
    _steps(callback, executor, pool)
    assert pool.max_size() == 3
    assert hub.reasons == []
