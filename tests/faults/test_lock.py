"""Row of the fault matrix: two runs of one name. All without Ray, the other run in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import psutil
import pytest

from ddil_ray.errors import ConfigError, RunFailedError
from ddil_ray.folder import RunFolder
from ddil_ray.runtime.lock import LOCK, RunLock
from ddil_ray.runtime.signals import ended_by_signals

HOLD = """
import sys, time
from ddil_ray.folder import RunFolder
from ddil_ray.runtime.lock import RunLock
with RunLock(RunFolder(sys.argv[1], "mine"), print, beat_s=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path), "mine")


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock; ends when its input does."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), "0.2"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def content(folder):
    return json.loads(folder.fs.cat_file(f"{folder.root}/{LOCK}"))


def write(folder, **changes):
    """A lock as another machine's run left it, or keeps it."""
    with RunLock(folder, pytest.fail):
        left = content(folder)
    left |= {"token": "other", "host": "far", "machine": "far/1"} | changes
    folder.fs.pipe_file(f"{folder.root}/{LOCK}", json.dumps(left).encode())


def test_a_second_run_of_a_name_is_told_who_has_it(folder, other):
    expected = rf"active on \S+ since 20.*process {other.pid}, last sign of life \d s ago.*another `name`.*{LOCK}"
    with pytest.raises(ConfigError, match=expected), RunLock(folder, pytest.fail):
        pass
    other.communicate("")
    assert not Path(folder.url, LOCK).exists()
    with RunLock(folder, pytest.fail):
        assert content(folder)["pid"] == os.getpid()


def test_a_store_that_creates_over_what_is_there_lets_no_second_run_in(tmp_path):
    folder = RunFolder(f"memory://{tmp_path.name}", "mine")
    put = folder.fs.pipe_file
    folder.fs.pipe_file = lambda path, value, mode="overwrite": put(path, value)  # as s3fs does where S3 is not AWS's
    try:
        with RunLock(folder, pytest.fail):
            held = content(folder)
            with (
                pytest.raises(ConfigError, match="is active"),
                RunLock(RunFolder(folder.url[:-5], "mine"), pytest.fail),
            ):
                pass
            assert content(folder) == held
    finally:
        del folder.fs.pipe_file


def test_a_run_may_wait_for_the_end_of_another_and_for_so_long_only(folder, other):
    said = []
    lock = RunLock(folder, said.append, beat_s=0.2)
    lock.wait(0.5)
    assert content(folder)["pid"] == other.pid
    ending = threading.Timer(0.5, other.communicate, [""])
    ending.start()
    lock.wait(60)
    ending.join()
    assert not Path(folder.url, LOCK).exists()
    assert len(said) == 2
    assert f"Waiting for the end of another process, for 60 s at most: {folder.url} is active" in said[1]
    lock.wait(60)
    assert len(said) == 2


def test_the_lock_of_a_killed_run_is_taken_over_at_once(folder, other):
    other.kill()
    other.wait()
    said, started = [], time.monotonic()
    with RunLock(folder, said.append, beat_s=60):
        assert time.monotonic() - started < 5
        assert content(folder)["pid"] == os.getpid()
    assert len(said) == 1
    assert f"process {other.pid}" in said[0]
    assert not Path(folder.url, LOCK).exists()


def test_a_silent_run_of_another_machine_is_dead_when_it_stays_silent(folder):
    write(folder, beat=time.time() - 100)
    said = []
    with RunLock(folder, said.append, beat_s=0.1):
        assert content(folder)["token"] != "other"
    assert "was active on far" in said[0]


@pytest.mark.parametrize("ago_s", [0, 100], ids=["by its time", "by its signs of life, whatever its clock says"])
def test_a_run_of_another_machine_is_alive(folder, ago_s):
    write(folder, beat=time.time() - ago_s)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.1):
            part = Path(folder.url, "part")
            part.write_text(json.dumps(content(folder) | {"beat": time.time() - ago_s}))
            part.replace(Path(folder.url, LOCK))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="active on far"), RunLock(folder, pytest.fail, beat_s=0.5):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_run_that_lost_its_lock_stops_and_says_to_whom(folder):
    """As one whose machine slept for long."""
    signals = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))

    def run():
        with RunLock(folder, pytest.fail, beat_s=0.05):
            taken = content(folder) | {"token": "other", "host": "far"}
            while not signals:
                Path(folder.url, LOCK).write_text(json.dumps(taken))
                time.sleep(0.01)

    try:
        with pytest.raises(RunFailedError, match=r"must be the only one of its name.*active on far"):
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert content(folder)["token"] == "other"


def test_a_run_that_lost_its_lock_copies_nothing_over_the_files_of_the_other(tmp_path):
    """The storage has what the other run wrote; this one still ends its writing as every run does."""
    url = f"memory://{tmp_path}"
    folder = RunFolder(url, "mine")
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def run():
        with RunLock(folder, pytest.fail, beat_s=0.05):
            folder.fs.pipe_file(f"{folder.root}/metrics.jsonl", b"of the other")
            while not folder.others:
                taken = content(folder) | {"token": "other", "host": "far"}
                folder.fs.pipe_file(f"{folder.root}/{LOCK}", json.dumps(taken).encode())
                time.sleep(0.01)
            (folder.local / "metrics.jsonl").write_text("of this one")
            assert folder.finish() is None

    try:
        with pytest.raises(RunFailedError):
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert folder.fs.cat_file(f"{folder.root}/metrics.jsonl") == b"of the other"


def test_a_run_that_loses_its_lock_outside_training_ends_as_by_an_error(folder):
    """There SIGTERM has no meaning of its own, and by default it would end the process without a word."""
    closed = []

    def run():
        with RunLock(folder, pytest.fail, beat_s=0.05), ended_by_signals():
            taken = content(folder) | {"token": "other", "host": "far"}
            try:
                while True:
                    Path(folder.url, LOCK).write_text(json.dumps(taken))
                    time.sleep(0.01)
            finally:
                closed.append(True)

    with pytest.raises(RunFailedError, match=r"must be the only one of its name"):
        run()
    assert closed


def test_of_many_that_start_at_once_one_has_it(tmp_path):
    gate, has, refused = threading.Barrier(8), [], []

    def run():
        lock = RunLock(RunFolder(str(tmp_path), "mine"), lambda text: None, beat_s=0.3)
        gate.wait(20)
        try:
            with lock:
                has.append(1)
                done.wait(5)
        except ConfigError as error:
            refused.append(str(error))
            if len(refused) == 7:
                done.set()

    done = threading.Event()
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(has), len(refused)) == (1, 7)


@pytest.mark.parametrize("text", ["", '{"token": "ab', "{}", "[]"])
def test_a_lock_that_was_cut_off_while_it_was_written_stops_nobody(folder, text):
    Path(folder.url, LOCK).write_text(text)
    with RunLock(folder, pytest.fail, beat_s=0.05):
        assert content(folder)["pid"] == os.getpid()


def test_an_object_store_has_locks_too(tmp_path):
    """A storage without folders and without renaming: what `RunLock` asks of it is create, put, get and remove."""
    folder = RunFolder("memory://bucket", "mine")
    with RunLock(folder, pytest.fail):
        with (
            pytest.raises(ConfigError, match="is active on"),
            RunLock(RunFolder("memory://bucket", "mine"), pytest.fail),
        ):
            pass
        assert folder.has(LOCK)
    assert not folder.has(LOCK)


def of_lock(of):
    """Requests of a method, of the lock alone."""
    return lambda method, path: method == of and LOCK in path


@pytest.fixture
def bucket(s3, monkeypatch):
    """The run folder on S3, where a failing request is made again by s3fs once, and soon."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"retries": {"total_max_attempts": 1}}})
    return RunFolder("s3://bucket/runs", "mine")


@pytest.mark.parametrize("lost", [1, 2], ids=["the first answer", "all answers"])
def test_a_lock_that_was_made_without_an_answer_is_ones_own(s3, bucket, lost):
    s3.script(*["lost"] * lost, only=of_lock("PUT"))
    with RunLock(bucket, pytest.fail, beat_s=60):
        assert s3.seen["lost"] == lost
        other = RunLock(bucket, pytest.fail)
        with pytest.raises(ConfigError, match=rf"is active on .*process {os.getpid()}"), other:
            pass
    assert not bucket.has(LOCK)


def test_a_store_that_does_not_name_the_condition_that_failed_has_locks_too(s3, bucket):
    s3.always("terse", only=of_lock("PUT"))
    with RunLock(bucket, pytest.fail):
        killed = content(bucket) | {"token": "other", "process_started": 0, "process_ticks": 0}
        with pytest.raises(ConfigError, match=r"is active on .*another `name`"), RunLock(bucket, pytest.fail):
            pass
    bucket.fs.pipe_file(f"{bucket.root}/{LOCK}", json.dumps(killed).encode())
    said = []
    with RunLock(bucket, said.append, beat_s=0.2):
        assert content(bucket)["token"] != "other"
    assert "Taking over from a run that died" in said[0]


def test_what_is_in_conflict_for_a_moment_is_tried_again(s3, bucket):
    s3.script("409", only=of_lock("PUT"))
    with RunLock(bucket, pytest.fail, beat_s=0.2):
        assert s3.seen["409"] == 1
        s3.always("409", only=of_lock("PUT"))
        with pytest.raises(ConfigError, match="is active on"), RunLock(bucket, pytest.fail):
            pass


def test_a_store_that_creates_nothing_exclusively_has_locks_too(s3, bucket):
    s3.script("501", "501", "501", only=of_lock("PUT"))
    with RunLock(bucket, pytest.fail, beat_s=0.2):
        s3.always("501", only=of_lock("PUT"))
        with pytest.raises(ConfigError, match="is active on"), RunLock(bucket, pytest.fail):
            pass


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_storage_that_fails_is_one_message(s3, bucket, method):
    s3.always("403", only=of_lock(method))
    message = r"`output` must be .*, but s3://bucket/runs/mine/lock.json failed: Access Denied\. Check .*start again\."
    with pytest.raises(ConfigError, match=message), RunLock(bucket, pytest.fail, beat_s=0.1):
        pass


def test_a_storage_that_fails_while_another_process_is_waited_for_is_one_message(s3, bucket):
    s3.always("403", only=of_lock("GET"))
    with pytest.raises(ConfigError, match=r"`output` must be .*lock.json failed: Access Denied"):
        RunLock(bucket, pytest.fail).wait(1)


def test_a_beat_of_the_future_is_watched_as_one_of_the_past(folder):
    """The owner's clock was two hours ahead, and its machine died."""
    write(folder, beat=time.time() + 7200)
    said = []
    with RunLock(folder, said.append, beat_s=0.1):
        assert content(folder)["token"] != "other"
    assert "was active on far" in said[0]


def test_a_process_lives_on_when_the_clock_is_set(folder, other, monkeypatch):
    """psutil tells when a process began by the clock, whose every step moves that."""
    begun = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: begun(process) + 3600)
    with pytest.raises(ConfigError, match="is active on"), RunLock(folder, pytest.fail, beat_s=60):
        pass


def test_a_lock_of_an_older_version_is_held_by_its_process_too(folder, other):
    held = {key: value for key, value in content(folder).items() if key != "process_ticks"}
    other.send_signal(signal.SIGSTOP)  # it beats no more
    Path(folder.url, LOCK).write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="is active on"), RunLock(folder, pytest.fail, beat_s=60):
        pass
    other.send_signal(signal.SIGCONT)


def test_the_field_of_the_folder_is_named(folder, other):
    with pytest.raises(ConfigError, match=r"^`output` must be that of no .* or choose another `output`"):
        RunLock(folder, pytest.fail, field="output").__enter__()
