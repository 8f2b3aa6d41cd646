"""Pins that the driver gets all that the hub has, however slow either is."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import ray

from ddil_ray.folder import RunFolder
from ddil_ray.runtime import watch as module
from ddil_ray.runtime.watch import Watch
from ddil_ray.tracking import View, read_journal

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class SlowHub:
    """Takes its time once; what it gives is gone from it."""

    def __init__(self):
        self.records = [{"step": 2, "sync/bytes": 1.0}]

    def drain(self):
        records, self.records = self.records, []
        if records:
            time.sleep(1.5)
        return records

    def failure(self):
        """None."""


def test_records_that_come_late_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.3)
    hub, folder = SlowHub.remote(), RunFolder(str(tmp_path), "a")
    ray.get(hub.failure.remote())
    quiet = SimpleNamespace(received=None, fresh=lambda: False, show=lambda records: None, watch=lambda: None)
    watch = Watch(hub, View(), quiet, folder, quiet, None, quiet, lambda: None)
    watch()
    assert read_journal(folder.local / "metrics.jsonl") == []
    deadline = time.monotonic() + 20
    while not (found := read_journal(folder.local / "metrics.jsonl")):
        assert time.monotonic() < deadline
        watch()
    assert [record["step"] for record in found] == [2]
    ray.kill(hub)


def test_records_of_a_run_that_another_has_by_now_are_not_written_into_its_journal(tmp_path):
    hub, folder, shown = SlowHub.remote(), RunFolder(str(tmp_path), "a"), []
    folder.others = True
    quiet = SimpleNamespace(received=None, fresh=lambda: False, show=shown.extend, watch=lambda: None)
    Watch(hub, View(), quiet, folder, quiet, None, quiet, lambda: None)()
    assert [record["step"] for record in shown] == [2]
    assert read_journal(folder.local / "metrics.jsonl") == []
    ray.kill(hub)


def test_copying_ends_with_the_file_at_which_another_has_the_run(tmp_path):
    folder = RunFolder(f"memory://{tmp_path.name}", "a")
    for name in ("a.json", "b.json"):
        (folder.local / name).write_text("{}")
    put, copied = folder.fs.put_file, []

    def put_and_lose(source, target):
        put(source, target)
        copied.append(target)
        folder.others = True

    folder.fs.put_file = put_and_lose
    try:
        folder.sync()
    finally:
        del folder.fs.put_file
    assert [path.rpartition("/")[2] for path in copied] == ["a.json"]
    assert not folder.fs.exists(f"{folder.root}/b.json")
