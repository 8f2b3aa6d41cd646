"""Rows "disk full", for all but checkpoints: a small disk of its own, or a limit on files."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import run as run_command
from own_cluster import with_a_cluster_of_its_own
from rich.console import Console
from runs import small_run, when

from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.folder import RunFolder
from ddil_ray.runtime.run import distill
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.storage import no_room
from ddil_ray.tracking import Journal, View, read_journal


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of a size."""
    mounted = []

    def mount(size):
        place = tmp_path / "disk"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("only root may mount a disk")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def _fill(place):
    """Leave no byte; the file that takes all room."""
    path = place / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def _records(first, last):
    return [{"step": n, "loss": 1.0 / (n + 1), "padding": float(n) * 1e10} for n in range(first, last)]


def test_records_wait_while_the_disk_is_full_and_are_written_once(small_disk):
    place, said = small_disk("128k"), []
    journal = Journal(place / "metrics.jsonl", said.append)
    journal.append(_records(0, 5))
    filler = _fill(place)
    for n in range(5, 200):
        journal.append(_records(n, n + 1))
    assert journal.waiting > 0
    assert re.fullmatch(
        rf"{place}/metrics\.jsonl could not be written \(.*No space left on device; 0 of 0 MiB are free there\)\. The "
        r"run goes on; its records wait in memory\. Make room\.",
        said[0],
    )
    filler.unlink()
    journal.append(_records(200, 201))
    assert said[1:] == [f"{place}/metrics.jsonl is written again, and has all records."]
    assert read_journal(place / "metrics.jsonl") == _records(0, 201)


def test_what_was_written_in_part_before_a_limit_is_written_again_whole(tmp_path):
    """The kernel writes as much as a limit on the size of files lets it, and refuses the rest."""
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(_records(0, 3))
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
        journal.append(_records(3, 8))
        assert (tmp_path / "metrics.jsonl").stat().st_size == size + 100
        journal.append(_records(8, 9))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert journal.waiting == 6
    journal.append([])
    assert read_journal(tmp_path / "metrics.jsonl") == _records(0, 9)


def test_a_journal_that_cannot_be_opened_loses_nothing_that_is_in_it(tmp_path):
    said = []
    journal = Journal(tmp_path / "metrics.jsonl", said.append)
    journal.append(_records(0, 3))
    (tmp_path / "metrics.jsonl").rename(tmp_path / "aside")
    (tmp_path / "metrics.jsonl").mkdir()
    journal.append(_records(3, 4))
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "aside").rename(tmp_path / "metrics.jsonl")
    journal.append(_records(4, 5))
    assert read_journal(tmp_path / "metrics.jsonl") == _records(0, 5)
    assert len(said) == 2


def test_a_full_disk_is_noticed_before_anything_starts(small_disk):
    place = small_disk("128k")
    filler = _fill(place)
    with pytest.raises(ConfigError, match=r"`output` must be a folder .* No space left on device"):
        RunFolder(str(place), "a")
    filler.unlink()
    assert not list(place.glob("*/.writable*"))
    RunFolder(str(place), "a")


def test_a_full_disk_is_known_by_every_librarys_words(small_disk):
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    place = small_disk("64k")
    _fill(place)
    pixels = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
    writes = {
        "safetensors": lambda: save_file({"w": torch.randn(10_000)}, place / "w.safetensors"),
        "picture": lambda: pixels.save(place / "grid.png"),
        "text": lambda: (place / "report.html").write_text("a" * 10_000),
    }
    for name, write in writes.items():
        with pytest.raises(Exception, match=r".") as failed:
            write()
        assert no_room(failed.value), name
    assert not no_room(ValueError("of another kind"))


def test_results_that_find_no_room_say_where_and_how_much_there_is(small_disk):
    place = small_disk("256k")
    folder = RunFolder(str(place), "a")
    with pytest.raises(RunFailedError) as failed, folder.filling("write them again"):
        (folder.local / "report.html").write_text("a" * 2**20)
    assert str(failed.value) == (
        f"`output` must have room for the results, but {place}/a could not be written: [Errno 28] No space left on "
        "device (0 of 0 MiB are free there). Make room, then write them again."
    )
    assert failed.value.exit_code == 1
    with pytest.raises(KeyError), folder.filling("write them again"):
        raise KeyError


def test_a_storage_that_fails_after_the_run_has_begun_is_one_message(tmp_path):
    folder = RunFolder(str(tmp_path), "a")
    with pytest.raises(RunFailedError) as failed, folder.reaching("Go on."):
        folder.fs.cat_file(f"{folder.root}/gone")
    assert str(failed.value).startswith(f"`output` must be reachable, but {tmp_path}/a failed: [Errno 2] No such file")
    assert str(failed.value).endswith("What was saved is there. Go on.")
    with pytest.raises(ConfigError, match="format"), folder.reaching("Go on."):
        raise ConfigError("format")


def test_a_command_whose_disk_is_full_says_so_in_one_line_with_exit_code_one(small_disk, capsys):
    place = small_disk("256k")
    overrides = ("trainer.steps=2", f"output={place}", "name=a")
    code, _, err = run_command(capsys, "train-teacher", "digits-teacher", *overrides)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"Error: `output` must have room for the results, but {place}/a could not")
    assert err.endswith(f"Make room, then delete {place}/a and train again.\n")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_training_goes_on_while_the_disk_is_full_and_no_record_is_lost(small_disk):
    place, out = small_disk("64m"), io.StringIO()
    config = small_run(output=str(place), trainer={"steps": 300, "batch_size": 16}, checkpoint={"every": 5000})
    journal = place / "small" / "metrics.jsonl"

    def full_for_a_while():
        filler = _fill(place)
        _until(lambda: "metrics.jsonl could not be written" in out.getvalue())
        time.sleep(1)
        filler.unlink()

    done = when(lambda: journal.exists() and len(read_journal(journal)) > 3, full_for_a_while)
    distill(config, view=View(Console(file=out, width=400)))
    assert done.result()
    assert out.getvalue().count("could not be written") == 1
    assert "metrics.jsonl is written again, and has all records." in out.getvalue()
    steps = [int(r["step"]) for r in read_journal(journal) if "loss" in r]
    assert steps == list(range(2, 301, 2))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_object_store_that_is_full_goes_on_to_the_disk_and_training_goes_on(tmp_path, run_dir):
    (tmp_path / "spilled").mkdir()
    with_a_cluster_of_its_own("full_store.py", run_dir, tmp_path / "spilled", "fills the store")
    found = json.loads(Path(run_dir, "found.json").read_text())
    assert "full" not in found
    assert found["kept"] == 160  # MiB, twice the store
    assert found["spilled"] > 40 * 2**20
    assert found["last"] == 300


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_object_store_that_is_full_with_its_disk_ends_the_run_with_one_message(small_disk, run_dir):
    with_a_cluster_of_its_own("full_store.py", run_dir, small_disk("24m"), "fills both")
    found = json.loads(Path(run_dir, "found.json").read_text())
    assert found["full"] == "OutOfDiskError"
    assert found["message"].startswith("Ray's object store must have room, but it is full, and so is the disk")
    saved = CheckpointStore(f"{run_dir}/small/checkpoints").newest(print)
    assert saved is not None
    assert saved.step >= 20


def _until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
