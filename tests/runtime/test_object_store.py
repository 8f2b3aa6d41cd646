"""Pins how large a local Ray's object store is."""

from __future__ import annotations

from collections import namedtuple

import pytest
import ray
from runs import small_run

from ddil_ray.runtime import object_store
from ddil_ray.runtime.cluster import connected
from ddil_ray.runtime.object_store import LEAST_STORE, store_bytes
from ddil_ray.runtime.run import _store_bytes
from ddil_ray.tracking import View
from ddil_ray.training.recipe import Recipe

GIB = 2**30
LARGE = {"data": 2 * GIB, "published weights": 13 * GIB, "blocks": GIB}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets the memory and what is free of shared memory, None where there is none."""
    amount = namedtuple("amount", ["total", "free"])

    def having(memory, shared):
        monkeypatch.setattr(object_store.sys, "platform", "linux")
        monkeypatch.setattr(object_store, "_SHARED_MEMORY", tmp_path / "none" if shared is None else tmp_path)
        monkeypatch.setattr(object_store.psutil, "virtual_memory", lambda: amount(memory * GIB, 0))
        monkeypatch.setattr(object_store.shutil, "disk_usage", lambda path: amount(0, (shared or 0) * GIB))

    return having


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        (LARGE, 16 * GIB),
        ({"data": 1, "published weights": 1, "blocks": 1}, LEAST_STORE),
        ({"data": GIB, "published weights": GIB, "blocks": 10 * GIB}, 20 * GIB),
    ],
)
def test_a_run_gets_what_it_shares_and_twice_its_blocks(machine, shared, expected):
    machine(memory=128, shared=64)
    said = []
    assert store_bytes(shared, said.append) == expected
    assert said == []


@pytest.mark.parametrize(
    ("memory", "shared", "expected"),
    [(32, 64, 0.3 * 32 * GIB), (128, 10, 0.95 * 10 * GIB), (32, None, 0.3 * 32 * GIB), (128, 1 / 16, LEAST_STORE)],
)
def test_memory_that_is_too_small_bounds_it_and_the_user_is_told(machine, memory, shared, expected):
    machine(memory=memory, shared=shared)
    said = []
    assert store_bytes(LARGE, said.append) == int(expected)
    assert len(said) == 1
    assert "should have 16 GiB (data 2, published weights 13, blocks 1), but 30 % of the memory" in said[0]
    assert f"allow {expected / GIB:.2g}" in said[0]


def test_a_small_run_has_the_least():
    config = small_run()
    assert _store_bytes(config, Recipe(config).ingredients(), View()) == LEAST_STORE


@pytest.mark.parametrize(("store", "expected"), [(None, LEAST_STORE), (lambda: 3 * GIB, 3 * GIB)])
def test_a_local_ray_is_started_with_it(monkeypatch, store, expected):
    started = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connected(small_run(), store=store):
        assert started["object_store_memory"] == expected


def test_a_cluster_keeps_its_own(monkeypatch):
    started = {}
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with connected(small_run(), store=lambda: pytest.fail("asked")):
        assert "object_store_memory" not in started
