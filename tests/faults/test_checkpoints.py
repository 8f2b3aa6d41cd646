"""Rows of the fault matrix: disk full at checkpoint; half-written checkpoint; corrupted weights file; torn multi-object
checkpoint; version mismatch of checkpoints. All without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from runs import small_run

from ddil_ray.config.checkpoint import Checkpoint
from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.folder import write_json
from ddil_ray.runtime.retention import Retention, score_at
from ddil_ray.runtime.run import distill
from ddil_ray.runtime.saving import Saver
from ddil_ray.runtime.staging import Staging
from ddil_ray.runtime.storage import CheckpointStore, verify
from ddil_ray.training.checkpoint import LEARNER, read_checkpoint, read_rounds, read_shared, write_checkpoint
from ddil_ray.training.manifest import BrokenCheckpointError, _render
from ddil_ray.training.parallel import Alone


def state_of(step, size=8):
    """As a training loop's, in small."""
    weights = torch.arange(size, dtype=torch.float32) + step
    adam = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": weights / 3}}, "betas": (0.9, 0.999)}
    learner = {"student": {"w": weights}, "optimizers": {"student": adam}, "rounds": {4: {"w": weights.clone()}}}
    return {"step": step, "learner": learner, "rank": {"torch": torch.get_rng_state()[:16], "taken": {0: 3, 1: None}}}


def staged(folder, step, *, rank=0, ranks=1, size=8):
    folder.mkdir()
    write_checkpoint(folder, state_of(step, size), rank=rank, ranks=ranks)
    return folder


@pytest.fixture
def save(tmp_path):
    """Saves the checkpoint of a step in an attempt of the store at `url`, a share per rank."""

    def act(url, step, *, attempt=1, ranks=1, only=None, group=1):
        store = CheckpointStore(url)
        for rank in range(ranks) if only is None else [only]:
            mine = staged(tmp_path / f"staged-{attempt}-{step}-{rank}", step, rank=rank, ranks=ranks)
            store.put(f"attempt-{attempt}/checkpoint_{group:04d}-aa_{step:09d}", mine)
            shutil.rmtree(mine)
        return store

    return act


def steps_of(store):
    return sorted(int(Path(folder).name.split("_")[2]) for folder in store._checkpoints())


def newest_step(store):
    newest = store.newest(lambda text: None)
    return None if newest is None else newest.step


def equal(a, b):
    """Whether trees have the same keys of the same types, and the same tensors of the same layout."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def test_what_is_read_is_what_was_written(tmp_path):
    whole = torch.arange(6.0)
    state = state_of(3)
    state["learner"] |= {
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "nothing": torch.empty(0, 3),
        "innermost": torch.arange(48.0).reshape(2, 2, 3, 4).to(memory_format=torch.channels_last),
        "twice": [whole, whole, whole[2:], whole.reshape(2, 3).T],
        "numbers": {1: 0.1 + 0.2, 2.5: float("inf"), "three": True, None: -(2**60)},
    }
    write_checkpoint(tmp_path, state, rank=0, ranks=1)
    again = read_checkpoint(tmp_path, Alone(), rank=0, ranks=1)
    assert equal(again, state)
    assert equal(read_shared(tmp_path), {"step": state["step"], "learner": state["learner"]})
    assert equal(read_rounds(tmp_path / LEARNER), state["learner"]["rounds"])
    assert "rank" not in read_checkpoint(tmp_path, Alone(), rank=0, ranks=2)


def test_a_checkpoint_of_this_format_that_was_written_before_is_read():
    """`state_of(10)` as 0.1.0 wrote it: whoever changes what is written must raise `FORMAT`."""
    newest = CheckpointStore(str(Path(__file__).parent / "format-2")).newest(pytest.fail)
    again, state = read_checkpoint(Path(newest.path), Alone(), rank=0, ranks=1), state_of(10)
    assert again["rank"].pop("torch").shape == state["rank"].pop("torch").shape  # another version's generator
    assert equal(again, state)


def test_nothing_that_is_read_can_run_code(tmp_path, monkeypatch):
    """Neither by what reads it, nor where a file is a pickle that somebody put there with a manifest that fits."""
    folder = staged(tmp_path / "one", 1)

    def unpickle(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, unpickle)
    read_checkpoint(folder, Alone(), rank=0, ranks=1)
    (folder / LEARNER).write_bytes(pickle.dumps(print))
    with pytest.raises(Exception, match=r"(?i)header"):
        read_shared(folder)


def test_of_a_thousand_flipped_bits_not_one_is_loaded(tmp_path, save):
    """Anywhere in the newest checkpoint of two ranks, manifests too: each is found, and the one before is taken."""
    url = str(tmp_path / "run")
    save(url, 10)
    store = save(url, 20, ranks=2)
    folder = Path(store.newest(pytest.fail).path)
    whole = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    places = [(file, at) for file, content in whole.items() for at in range(len(content))]
    drawn = random.Random(0)
    for file, at in drawn.sample(places, 1000):
        flipped = bytearray(whole[file])
        flipped[at] ^= 1 << drawn.randrange(8)
        file.write_bytes(flipped)
        said = []
        assert store.newest(said.append).step == 10
        assert [str(folder) in text for text in said] == [True]
        file.write_bytes(whole[file])
    assert newest_step(store) == 20


def test_what_is_passed_over_is_named_with_the_reason(tmp_path, save):
    url = str(tmp_path)
    for step in (10, 20, 30, 40):
        store = save(url, step)
    folders = [Path(folder) for folder in store._checkpoints()]
    (folders[0] / "manifest-0-of-1.json").unlink()
    (folders[1] / LEARNER).write_bytes((folders[1] / LEARNER).read_bytes()[:-1])
    content = (folders[2] / "rank-0.safetensors").read_bytes()
    (folders[2] / "rank-0.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = []
    assert store.newest(said.append).step == 10
    reasons = ["no manifest, so its writing was cut off", "must have .* bytes, but has", "another sha256"]
    for folder, reason, text in zip(folders, reasons, said, strict=False):
        assert text.startswith(f"The checkpoint {folder} is passed over for the one before it: ")
        assert re.search(reason, text)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (
            _render({"format": 3, "step": 7, "new": []}),
            r"has format 3: it was written by a newer ddil-ray. Install that",
        ),
        (b'{"learner.pt": 1234, "rank-0.pt": 567}', r"has format 1: it was written by an older ddil-ray"),
    ],
)
def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(tmp_path, save, manifest, message):
    save(str(tmp_path), 10)
    store = save(str(tmp_path), 20)
    Path(store._checkpoints()[0], "manifest-0-of-1.json").write_bytes(manifest)
    with pytest.raises(ConfigError, match=message):
        store.newest(pytest.fail)


class Failing(LocalFileSystem):
    """A disk of which every operation fails from one on; files that are being written then are left half written."""

    protocol = "failing"
    cachable = False
    left: int | None = None
    """Operations until then; None: all work."""

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("failing://"))

    @classmethod
    def count(cls):
        if cls.left is not None:
            cls.left -= 1
            if cls.left < 0:
                raise OSError(28, "No space left on device")

    def put_file(self, lpath, rpath, **kwargs):
        try:
            self.count()
        except OSError:
            content = Path(lpath).read_bytes()
            if type(self).left == -1:
                Path(self._strip_protocol(rpath)).write_bytes(content[: len(content) // 2])
            raise
        shutil.copyfile(lpath, self._strip_protocol(rpath))


def _counted(name):
    inherited = getattr(LocalFileSystem, name)

    def act(self, *args, **kwargs):
        self.count()
        return inherited(self, *args, **kwargs)

    return act


for _name in ("makedirs", "rm_file", "rmdir", "rm", "cat_file"):
    setattr(Failing, _name, _counted(_name))
fsspec.register_implementation("failing", Failing, clobber=True)


def _failing_ever_later(act):
    """Call `act` with the disk failing from its first operation on, its second, ...; until it does not fail."""
    for operations in range(1000):
        Failing.left = operations
        try:
            act(operations)
        except OSError:
            Failing.left = None
            yield operations
        else:
            return
        finally:
            Failing.left = None
    raise AssertionError("it always fails")


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_operation_writing_stops_at_the_old_one_is_whole_and_taken(tmp_path, save, ranks):
    url, plain = f"failing://{tmp_path}/run", CheckpointStore(f"{tmp_path}/run")
    save(url, 10)
    mine = [staged(tmp_path / f"of-{rank}", 20, rank=rank, ranks=ranks) for rank in range(ranks)]

    def write(operations):
        for folder in mine:
            CheckpointStore(url).put(f"attempt-1/checkpoint_0002-{operations:03d}_{20:09d}", folder)

    found = [newest_step(plain) for _ in _failing_ever_later(write)]
    assert found == [10] * len(found)
    assert len(found) >= 3 * ranks
    assert newest_step(plain) == 20


def test_whatever_operation_removing_stops_at_the_newest_stays_whole(tmp_path, save):
    url, plain = f"failing://{tmp_path}/run", CheckpointStore(f"{tmp_path}/run")
    for step in (10, 20, 30, 40):
        save(url, step)
    for _ in _failing_ever_later(lambda n: CheckpointStore(url).prune(1)):
        assert newest_step(plain) == 40
    assert steps_of(plain) == [40]


def test_the_newest_are_kept_and_none_goes_before_the_next_is_whole(tmp_path, save):
    url = str(tmp_path)
    for attempt, step in ((1, 10), (1, 20), (2, 20), (2, 30)):
        store = save(url, step, attempt=attempt)
    save(url, 40, attempt=2, ranks=2, only=1)
    store.prune(2)
    assert steps_of(store) == [20, 30, 40]
    assert newest_step(store) == 30
    save(url, 40, attempt=2, ranks=2, only=0)
    store.prune(2)
    assert steps_of(store) == [30, 40]


def test_what_was_written_after_a_damaged_one_was_passed_over_is_newer_than_that(tmp_path, save):
    """Also where its step is lower: else it would be the one to go."""
    url = str(tmp_path)
    for step in (10, 20):
        store = save(url, step)
    damage(store._checkpoints()[0])
    assert newest_step(store) == 10
    group = store.new_group("attempt-1")
    assert re.fullmatch(r"attempt-1/checkpoint_0002-[0-9a-f]{6}", group)
    store.put(f"{group}_{15:09d}", staged(tmp_path / "mine", 15))
    assert store.newest(pytest.fail).step == 15
    store.prune(1)
    assert steps_of(store) == [15]


def damage(folder):
    """Change a bit of a checkpoint; returns what to call to mend it."""
    file = Path(folder, LEARNER)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return lambda: file.write_bytes(content)


@pytest.mark.parametrize(("keep", "scores"), [(2, {}), (1, {10: 3.0, 20: 2.0, 30: 1.0, 40: 4.0})])
def test_one_that_was_found_damaged_counts_for_none_that_are_kept(tmp_path, save, keep, scores):
    """Neither as one of the newest nor as the best; also where another process found it, as a trainer does."""
    url = str(tmp_path)
    for step in (10, 20, 30):
        store = save(url, step)
    damage(store._checkpoints()[0])
    assert newest_step(CheckpointStore(url)) == 20
    store.prune(keep, scores.get)
    assert steps_of(store)[-2:] == [20, 30]
    save(url, 40, group=2)
    store.prune(keep, scores.get)
    assert steps_of(store) == [20, 40]


def test_one_that_was_misread_is_not_lost_but_for_something_newer(tmp_path, save):
    """Storages may err: what was found damaged is read again, and stays until something newer is whole."""
    url = str(tmp_path)
    store = save(url, 10)
    mend = damage(store._checkpoints()[0])
    with pytest.raises(
        ConfigError, match=r"must find a checkpoint that is whole, but all in .* begin anew, remove that"
    ):
        newest_step(store)
    store.prune(1)
    mend()
    assert newest_step(store) == 10
    assert store.newest(pytest.fail).step == 10
    store.prune(1)
    assert steps_of(store) == [10]  # it counts again


def test_one_that_cannot_be_read_for_now_counts_as_before(tmp_path, save, monkeypatch):
    url = str(tmp_path)
    for step in (10, 20):
        store = save(url, step)

    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(LocalFileSystem, "open", fail)
        with pytest.raises(OSError, match="Input/output"):
            newest_step(store)
    save(url, 30, group=2)
    store.prune(2)
    assert steps_of(store) == [20, 30]


def test_what_was_never_finished_goes_once_something_newer_is_whole(tmp_path, save):
    url = str(tmp_path)
    save(url, 10, ranks=2, only=0)
    store = save(url, 20)
    save(url, 30, ranks=2, only=1)
    store.prune(5)
    assert steps_of(store) == [20, 30]


def test_the_best_is_kept_beside_the_newest(tmp_path, save):
    url, journal, said = str(tmp_path / "run"), tmp_path / "metrics.jsonl", []
    for step in (10, 20, 30, 40, 50):
        store = save(url, step)
    measured = {8: 3.0, 12: 1.0, 18: 2.0, 28: 1.5, 38: float("nan"), 44: 9.0}
    journal.write_text("".join(json.dumps({"step": n, "shift": value}) + "\n" for n, value in measured.items()))
    Retention(store, Checkpoint(keep=1, best="shift"), journal, said.append)()
    assert steps_of(store) == [30, 50]
    assert said == []
    prune = Retention(store, Checkpoint(keep=1, best="shft"), journal, said.append)
    prune()
    prune()
    assert steps_of(store) == [50]
    assert said == ["`checkpoint.best` must name a metric, but 'shft' is in no record yet. See metrics.jsonl."]


def test_of_a_step_done_twice_the_last_measurement_counts():
    records = [{"step": 10, "a": 1.0}, {"step": 20, "a": 2.0}, {"step": 10, "a": 3.0}, {"step": 15, "b": 0.0}]
    assert [score_at(records, "a", step) for step in (5, 10, 19, 20)] == [None, 3.0, 3.0, 2.0]


class Told:
    """A saver of one process, and what it told."""

    def __init__(self, url, **settings):
        self.notes, self.records, self.store = [], [], CheckpointStore(url)
        self.saver = Saver(
            self.store,
            lambda step: f"attempt-1/checkpoint_0001-aa_{step:09d}",
            **{"rank": 0, "ranks": 1, "max_failures": 2, **settings},
            tell=self.notes.append,
            saved=self.records.append,
        )


@pytest.fixture
def small_files():
    """Makes files of more than 64 KiB fail to be written, as on a full disk, while it is entered."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_what_a_killed_process_staged_is_removed_by_the_next_and_that_of_a_living_one_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    stage = "from ddil_ray.runtime.staging import Staging; s = Staging(); print(s.path, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    killed, living = (subprocess.Popen([sys.executable, "-c", stage], **pipes) for _ in range(2))
    left, used = (Path(process.stdout.readline().strip()) for process in (killed, living))
    killed.kill()
    killed.communicate()
    (used / "learner.safetensors").write_bytes(b"in use")
    Told(str(tmp_path / "run"))
    assert not left.exists()
    assert (used / "learner.safetensors").exists()
    living.communicate("")


def test_a_storage_that_is_slow_to_remove_holds_up_nobody(tmp_path, save, monkeypatch):
    url, slow, asked = str(tmp_path / "run"), threading.Event(), threading.Event()
    for step in (10, 20):
        store = save(url, step)
    prune = CheckpointStore.prune

    def late(*arguments):
        asked.set()
        slow.wait(20)
        prune(*arguments)

    monkeypatch.setattr(CheckpointStore, "prune", late)
    retention = Retention(store, Checkpoint(keep=1), tmp_path / "metrics.jsonl", print)
    retention.soon()
    assert asked.wait(20)
    retention.soon()  # while that one is at it
    assert steps_of(store) == [10, 20]
    slow.set()
    retention()
    assert steps_of(store) == [20]


def test_a_full_disk_leaves_out_a_checkpoint_and_training_goes_on(tmp_path, small_files):
    """Told once, with the place and what is free; the old one stays, and the next try is told, too."""
    with (before := Told(str(tmp_path))).saver:
        before.saver.save(10, state_of(10, 2**16))
    run = Told(str(tmp_path))
    with run.saver as saver:
        with small_files():
            saver.save(20, state_of(20, 2**16))
            saver.save(30, state_of(30, 2**16))
        saver.save(40, state_of(40, 2**16))
        saver.save(40, state_of(40, 2**16))
    assert re.search(r"A checkpoint is left out.*step 20.*written to /.*large.*\(\d+ MiB free\)", run.notes[0])
    assert run.notes[1:] == ["Checkpoints are saved again, from that of step 40 on."]
    assert [record["step"] for record in run.records] == [40]
    assert newest_step(run.store) == 40
    assert steps_of(run.store) == [10, 40]


def test_a_storage_that_stays_full_ends_the_run_after_so_many_in_a_row(tmp_path):
    with (before := Told(str(tmp_path))).saver:
        before.saver.save(1, state_of(1))
    run = Told(f"failing://{tmp_path}")

    def fill():
        Failing.left = 0
        try:
            with run.saver:
                for step in (10, 20, 30, 40):
                    run.saver.save(step, state_of(step))
        finally:
            Failing.left = None

    with pytest.raises(RunFailedError, match=r"3 in a row.*step 30.*No space left.*checkpoint.max_failures"):
        fill()
    assert len(run.notes) == 1
    assert newest_step(CheckpointStore(str(tmp_path))) == 1


def test_a_last_checkpoint_that_is_not_saved_fails_the_run(tmp_path, small_files):
    run = Told(str(tmp_path))

    def fill():
        with run.saver, small_files():
            run.saver.save(10, state_of(10, 2**16))

    with pytest.raises(RunFailedError, match=r"The last checkpoint must be saved, but is not. That of step 10"):
        fill()


def test_another_error_waits_for_what_is_being_saved_and_is_not_hidden(tmp_path):
    run = Told(str(tmp_path))

    def fail():
        with run.saver:
            run.saver.save(10, state_of(10))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert newest_step(run.store) == 10


def test_training_does_not_wait_for_the_storage_and_may_change_what_it_saves(tmp_path, monkeypatch):
    gate, state = threading.Event(), state_of(10)
    monkeypatch.setattr(Failing, "put_file", lambda self, a, b: (gate.wait(10), shutil.copyfile(a, b))[1])
    run = Told(f"failing://{tmp_path}")
    with run.saver:
        run.saver.save(10, state)
        state["learner"]["student"]["w"].zero_()
        assert newest_step(run.store) is None
        gate.set()
    saved = run.store.newest(pytest.fail)
    assert read_shared(Path(saved.path))["learner"]["student"]["w"].max() > 0
    (record,) = run.records
    assert record["checkpoint/waited_s"] < record["checkpoint/seconds"]
    assert record["checkpoint/bytes"] == sum(file.stat().st_size for file in Path(saved.path).iterdir())


def test_bytes_that_come_back_others_are_no_checkpoint(tmp_path, save):
    """A storage that loses what it takes: found on writing, so that what is older stays."""

    class Lossy(Failing):
        protocol = "lossy"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("lossy://"))

        def put_file(self, lpath, rpath, **kwargs):
            content = Path(lpath).read_bytes()
            Path(self._strip_protocol(rpath)).write_bytes(content[:-1] + b"x")

    fsspec.register_implementation("lossy", Lossy, clobber=True)
    with pytest.raises(OSError, match="does not read back as it was written"):
        save(f"lossy://{tmp_path}", 10)
    assert newest_step(CheckpointStore(str(tmp_path))) is None


def test_sizes_alone_do_not_find_a_flipped_bit_and_digests_do(tmp_path, save):
    store = save(str(tmp_path), 10)
    folder = store._checkpoints()[0]
    content = bytearray(Path(folder, LEARNER).read_bytes())
    content[-1] ^= 1
    Path(folder, LEARNER).write_bytes(content)
    assert verify(LocalFileSystem(), folder, digests=False).step == 10
    with pytest.raises(BrokenCheckpointError, match="another sha256"):
        verify(LocalFileSystem(), folder)


def test_a_checkpoint_that_stays_unreadable_is_named_and_holds_up_no_removal(tmp_path, save, monkeypatch):
    url, cat = str(tmp_path), LocalFileSystem.cat_file
    for step in (10, 20, 30, 40):
        store = save(url, step)
    bad = store._checkpoints()[1]

    def fail(self, path, *args, **kwargs):
        if bad in path:
            raise OSError(5, "Input/output error")
        return cat(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "cat_file", fail)
    with pytest.raises(OSError, match="Input/output"):
        store.prune(1)
    assert steps_of(store) == [30, 40]
    shutil.rmtree(store._checkpoints()[0])
    with pytest.raises(OSError, match=rf"the checkpoint {bad} cannot be read .*move it away to go on from"):
        newest_step(store)


def test_a_file_that_changes_on_its_way_from_a_bucket_is_not_read(save):
    store = save("memory://changes-on-its-way", 10)
    newest, fs = store.newest(pytest.fail), fsspec.filesystem("memory")
    with store.fetched(newest, LEARNER) as file:
        assert read_rounds(file)
    get = fs.get_file

    def flip(path, local):
        get(path, local)
        content = bytearray(Path(local).read_bytes())
        content[-1] ^= 1
        Path(local).write_bytes(content)

    fs.get_file = flip
    try:
        with pytest.raises(OSError, match="other bytes here than there"), store.fetched(newest, LEARNER):
            pass
    finally:
        del fs.get_file
        fs.rm("/changes-on-its-way", recursive=True)


def test_a_process_that_may_open_no_more_files_is_told_so_and_leaves_no_folder(tmp_path, monkeypatch):
    """It can make folders all the same, and must not go on to."""

    def fail(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(OSError, match="no folder can be locked"):
            Staging()
    assert list(tmp_path.iterdir()) == []


def test_results_are_old_or_new_and_never_a_part(tmp_path, small_files, monkeypatch):
    file = tmp_path / "metrics.json"
    write_json(file, {"scores": 1})
    with small_files(), pytest.raises(OSError, match="too large"):
        write_json(file, {"scores": "a" * 2**17})
    assert json.loads(file.read_text()) == {"scores": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    monkeypatch.chdir(tmp_path)
    written, put = [], LocalFileSystem.pipe_file
    monkeypatch.setattr(
        LocalFileSystem, "pipe_file", lambda fs, path, value: [written.append(path), put(fs, path, value)]
    )
    write_json(Path("metrics.json"), {"scores": 2})
    assert {str(Path(path).parent) for path in written} == {str(tmp_path)}
    assert json.loads(file.read_text()) == {"scores": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_without_its_checkpoints_is_never_begun_anew(tmp_path, resume):
    config = small_run(output=str(tmp_path))
    folder = tmp_path / config.name
    folder.mkdir()
    for name in ("metrics.json", "metrics.jsonl", "tracking.json"):
        (folder / name).write_text("{}\n")
    expected = "holds a run already" if not resume else "is finished and has none"
    with pytest.raises(ConfigError, match=expected):
        distill(config, resume=resume)
    assert (folder / "metrics.json").read_text() == "{}\n"
    assert (folder / "metrics.jsonl").exists()
