"""Row "MLflow down / slow": nothing waits for the tracker, everything reaches it once when it is back."""

from __future__ import annotations

import io
import json
import logging
import shutil
import socket
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from faulty_proxy import Faulty
from mlflow.tracking import MlflowClient
from mlflow_server import MlflowServer
from rich.console import Console
from runs import small_run

from ddil_ray.errors import ConfigError
from ddil_ray.folder import RunFolder
from ddil_ray.runtime.run import _close, distill
from ddil_ray.runtime.run import _tracker as _tracker_of
from ddil_ray.tracking import TRACKERS, BackgroundTracker, Journal, RunInfo, View, read_journal
from ddil_ray.tracking.tracker import NullTracker

RUN = RunInfo("a-run", params={"seed": "0"}, tags={"git_commit": "abc"}, rounds=["round 4 steps", "round 2 steps"])


def _tracker(uri, timeout_s=5.0):
    return TRACKERS["mlflow" if uri else "none"](uri=uri, experiment="tests", timeout_s=timeout_s)


def _background(folder, uri, timeout_s=5.0, run=RUN):
    return BackgroundTracker(
        _tracker(uri, timeout_s),
        run,
        journal=folder / "metrics.jsonl",
        state=folder / "tracking.json",
        timeout_s=timeout_s,
        kept="s3://bucket/a-run",
    )


def _record(n):
    return {"step": n, "total_steps": 60, "phase": n // 30, "loss": 1.0 / (n + 1)}


def _runs(uri):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name("tests").experiment_id])


def _assert_everything_once(uri, steps):
    """One run and one for each round, and each step's loss once, at the time when it was made."""
    client, runs = MlflowClient(uri), {run.info.run_name: run.info.run_id for run in _runs(uri)}
    assert set(runs) == {"a-run", "a-run round 4 steps", "a-run round 2 steps"}
    assert len(_runs(uri)) == 3
    histories = {name: client.get_metric_history(run, "loss") for name, run in runs.items()}
    assert [m.step for m in histories["a-run"]] == list(range(steps))
    assert [m.step for m in histories["a-run round 2 steps"]] == list(range(30, steps))
    return histories["a-run"]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """An sqlite file with MLflow's tables, which take long to make."""
    path = tmp_path_factory.mktemp("empty") / "m.db"
    _tracker(f"sqlite:///{path}").check(reach=True)
    assert path.exists()
    return path


@pytest.fixture
def uri(empty_database, tmp_path):
    """Of a database without runs."""
    shutil.copy(empty_database, tmp_path / "m.db")
    return f"sqlite:///{tmp_path}/m.db"


@pytest.fixture(scope="module")
def database(empty_database, tmp_path_factory):
    """A server."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_database, folder / "m.db")
    server = MlflowServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(database):
    """A server that runs, without experiments of other tests."""
    if not database.runs:
        database.start()
    client = MlflowClient(database.uri)
    old = client.get_experiment_by_name("tests")
    if old is not None:
        client.rename_experiment(old.experiment_id, f"old {time.time()}")
    return database


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_is_down_at_the_start_and_dies_later_gets_everything_once(server, tmp_path, recovery, caplog):
    server.kill()
    background = _background(tmp_path, server.uri)
    background.start()
    journal, waited = Journal(tmp_path / "metrics.jsonl"), 0.0

    def train(first, last):
        nonlocal waited
        for n in range(first, last):
            began = time.monotonic()
            journal.append([_record(n)])
            waited = max(waited, time.monotonic() - began)
            time.sleep(0.02)

    train(0, 20)
    server.start()
    back = time.time()
    _until(lambda: background._state["sent"] == (tmp_path / "metrics.jsonl").stat().st_size, 70)
    recovery("after MLflow is back until it has everything", time.time() - back)
    assert caplog.text.count("Tracking failed and will be tried again: ") == 1
    train(20, 40)
    server.kill()
    train(40, 60)
    time.sleep(3)
    server.start()
    (tmp_path / "report.html").write_text("<p>")
    assert background.finish("finished", [tmp_path / "report.html"]) is None
    assert waited < 0.5
    losses = _assert_everything_once(server.uri, 60)
    times = [metric.timestamp / 1000 for metric in losses]
    assert times == sorted(times)
    assert times[19] < back < times[20]  # of what was made, not of what was sent
    main = next(run for run in _runs(server.uri) if run.info.run_name == "a-run")
    assert (main.info.status, main.data.params) == ("FINISHED", RUN.params)
    assert [a.path for a in MlflowClient(server.uri).list_artifacts(main.info.run_id)] == ["report.html"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_server_did_without_answering_is_not_done_twice(server, tmp_path):
    """Lost are the answers to a first run, to its parameters, to its first metrics, and to its end."""
    proxy, asked = Faulty(("127.0.0.1", server.port)), Counter()
    losses = {("create", 1), ("log-batch", 1), ("log-batch", 3), ("update", 1)}

    def lost(method, path):
        call = path.rpartition("/")[2]
        asked[call] += 1
        return "lost" if (call, asked[call]) in losses else None

    proxy.fault = lost
    background, journal = _background(tmp_path, proxy.url), Journal(tmp_path / "metrics.jsonl")
    background.start()
    for n in range(60):
        journal.append([_record(n)])
    _until(lambda: background._state["sent"] > 0, 120)
    assert background.finish("finished") is None
    assert proxy.seen["lost"] == len(losses)
    _assert_everything_once(server.uri, 60)
    proxy.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_died_between_sending_and_remembering_sends_nothing_twice(server, tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append([_record(n) for n in range(60)])
    for _ in range(2):
        background = _background(tmp_path, server.uri)
        background._state["sent"] = 0
        background.start()
        assert background.finish("stopped") is None
    _assert_everything_once(server.uri, 60)


def test_a_tracker_that_hangs_holds_up_the_end_for_a_bounded_time(tmp_path):
    """It answers nobody from the start."""
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        dead.listen(1)
        background = _background(tmp_path, f"http://127.0.0.1:{dead.getsockname()[1]}", timeout_s=2.0)
        background.start()
        Journal(tmp_path / "metrics.jsonl").append([_record(0)])
        began = time.monotonic()
        unsent = background.finish("finished")
        assert time.monotonic() - began < 30
    assert unsent == "1 records did not reach the tracker; all is in s3://bucket/a-run, and `--resume` sends it."


class _FailsOnce(NullTracker):
    """Closing takes long, and fails the first time."""

    closed = 0

    def close(self, status, files):
        time.sleep(1.5)
        self.closed += 1
        if self.closed == 1:
            raise OSError("no answer")


def test_a_tracker_that_fails_late_is_asked_again(tmp_path):
    """For its time and as long as what failed took, from when that failed."""
    tracker = _FailsOnce()
    paths = {"journal": tmp_path / "metrics.jsonl", "state": tmp_path / "tracking.json"}
    background = BackgroundTracker(tracker, RUN, **paths, timeout_s=3.0)
    background.start()
    assert background.finish("finished") is None
    assert tracker.closed == 2


def test_what_a_dead_tracker_missed_is_sent_by_the_next_process(tmp_path, uri):
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        gone = _background(tmp_path, f"http://127.0.0.1:{dead.getsockname()[1]}", timeout_s=1.0)
        gone.start()
        Journal(tmp_path / "metrics.jsonl").append([_record(n) for n in range(60)])
        assert gone.finish("stopped").startswith("60 records did not reach")
    again = _background(tmp_path, uri)
    again.start()
    assert again.finish("finished") is None
    _assert_everything_once(uri, 60)


@pytest.mark.parametrize("torn", ["", '{"run_id": "abc", "se', "[1]", '{"sent": "x"}', "\0\0\0\0"])
def test_a_torn_memory_of_the_tracker_costs_nothing_but_a_second_run(tmp_path, uri, torn, caplog):
    (tmp_path / "tracking.json").write_text(torn)
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append([_record(n) for n in range(60)])
    background = _background(tmp_path, uri)
    background.start()
    assert background.finish("finished") is None
    _assert_everything_once(uri, 60)
    assert "the tracker gets the whole run again, as a new one" in caplog.text


def test_records_of_a_journal_that_is_older_than_its_tracker_are_sent(tmp_path, uri):
    """From a storage the journal may come as it was at a checkpoint, and the tracker's memory a little newer."""
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append([_record(n) for n in range(30)])
    background = _background(tmp_path, uri)
    background.start()
    assert background.finish("stopped") is None
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines[:20]))
    background, journal = _background(tmp_path, uri), Journal(tmp_path / "metrics.jsonl")
    background.start()
    journal.append([_record(n) for n in range(30, 60)])
    assert background.finish("finished") is None
    _assert_everything_once(uri, 60)


def _track(folder, uri, records, run=RUN):
    """One process of the run, which makes the records of these numbers."""
    background = _background(folder, uri, run=run)
    background.start()
    Journal(folder / "metrics.jsonl").append([_record(n) for n in records])
    assert background.finish("stopped") is None


def _forget_the_place(folder):
    """As of a version that did not know it."""
    state = json.loads((folder / "tracking.json").read_text())
    del state["place"]
    (folder / "tracking.json").write_text(json.dumps(state))


@pytest.fixture
def other_uri(empty_database, tmp_path):
    """Of another database without runs."""
    shutil.copy(empty_database, tmp_path / "other.db")
    return f"sqlite:///{tmp_path}/other.db"


@pytest.mark.parametrize("told", [True, False])
def test_another_database_gets_the_whole_run_and_the_first_one_again_what_it_lacks(
    tmp_path, uri, other_uri, told, caplog, recovery
):
    """Parameters, which MLflow never changes, may have changed by then."""
    _track(tmp_path, uri, range(20))
    if not told:
        _forget_the_place(tmp_path)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        _track(tmp_path, other_uri, range(20, 40))
    recovery("until another database has 40 records of a run with two rounds", time.monotonic() - began)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("ddil_ray")]
    assert line.endswith("from the first record on.")
    assert f"MLflow at {other_uri}" in line
    _assert_everything_once(other_uri, 40)
    _track(tmp_path, uri, range(40, 60), run=RunInfo(RUN.name, {"seed": "1"}, RUN.tags, RUN.rounds))
    _assert_everything_once(uri, 60)


@pytest.mark.parametrize("told", [True, False])
def test_a_tracker_gets_what_was_made_while_there_was_none(tmp_path, uri, told):
    _track(tmp_path, None, range(40))
    if not told:
        _forget_the_place(tmp_path)
    _track(tmp_path, uri, range(40, 60))
    _assert_everything_once(uri, 60)


@pytest.mark.parametrize("name", ["a-run", "a-run round 2 steps"])
@pytest.mark.parametrize("when", ["between two processes", "meanwhile"])
def test_a_run_that_was_deleted_in_mlflow_is_made_again(tmp_path, uri, name, when, caplog):
    def delete():
        (run,) = [run.info.run_id for run in _runs(uri) if run.info.run_name == name]
        MlflowClient(uri).delete_run(run)

    _track(tmp_path, uri, range(40))
    if when == "between two processes":
        delete()
    background = _background(tmp_path, uri)
    background.start()
    if when == "meanwhile":
        _until(lambda: background._opened)
        delete()
    Journal(tmp_path / "metrics.jsonl").append([_record(n) for n in range(40, 60)])
    assert background.finish("finished") is None
    _assert_everything_once(uri, 60)
    runs = {run.info.run_name: run for run in _runs(uri)}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert caplog.text.count(f"or a round of it, is gone from MLflow at {uri}") == 1
    assert runs["a-run round 2 steps"].data.tags["mlflow.parentRunId"] == runs["a-run"].info.run_id


def test_a_place_is_told_without_secrets_and_the_same_whoever_asks():
    secret = "postgresql://me:hunter2@db:5432/mlflow"  # pragma: allowlist secret
    assert _tracker(secret).place() == _tracker("postgresql://db:5432/mlflow").place()


def test_a_process_that_lost_its_run_sends_closes_and_remembers_nothing_more(tmp_path, uri):
    """Both processes have one MLflow run and, on a disk, one folder."""
    tracking = {"tracker": "mlflow", "uri": uri, "experiment": "tests"}
    folder = RunFolder(str(tmp_path), "a-run")
    loser = _tracker_of(
        small_run(output=str(tmp_path), name="a-run", tracking=tracking),
        SimpleNamespace(objective=SimpleNamespace(phases=())),
        folder,
        commit="abc",
    )
    loser.start()
    _until(lambda: "run_id" in (folder.local / "tracking.json").read_text())
    folder.others = True
    (folder.local / "tracking.json").write_text("the winner's")
    Journal(folder.local / "metrics.jsonl").append([_record(0)])
    view = View(Console(file=io.StringIO()))
    assert _close(loser, folder, "stopped", view) is None
    assert view.console.file.getvalue() == ""
    assert not loser._thread.is_alive()
    assert (folder.local / "tracking.json").read_text() == "the winner's"
    (run,) = _runs(uri)
    assert run.info.status == "RUNNING"
    assert MlflowClient(uri).get_metric_history(run.info.run_id, "loss") == []


def test_a_journal_whose_disk_is_gone_stops_nobody_and_has_everything_once_it_is_back(tmp_path):
    said, disk = [], tmp_path / "disk"
    disk.mkdir()
    journal = Journal(disk / "metrics.jsonl", said.append)
    journal.append([_record(0)])
    disk.rename(tmp_path / "away")
    journal.append([_record(1)])
    assert "its disk does not answer" in said[0]
    (tmp_path / "away").rename(disk)
    journal.append([_record(2)])
    assert read_journal(disk / "metrics.jsonl") == [_record(n) for n in range(3)]


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_required_tracker_that_does_not_answer_ends_the_run_before_it_starts(run_dir, kind):
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        if kind == "never answers":
            dead.listen(1)
        uri = f"http://127.0.0.1:{dead.getsockname()[1]}"
        tracking = {"tracker": "mlflow", "uri": uri, "required": True, "timeout_s": 1}
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"`tracking.uri` must be reached .* MLflow at http://127.* failed"):
            distill(small_run(output=run_dir, tracking=tracking))
        assert time.monotonic() - began < 30


def test_an_address_that_is_none_ends_the_run_before_it_starts(run_dir):
    uri = "localhost:5000"
    with pytest.raises(ConfigError, match=r"`tracking.uri` must be an address that MLflow knows.* but is '" + uri):
        distill(small_run(output=run_dir, tracking={"tracker": "mlflow", "uri": uri}))


@pytest.mark.usefixtures("empty_database")
def test_a_required_database_is_made_at_the_start():
    with pytest.raises(ConfigError, match=r"`tracking.uri` must be .*/dev/null/m\.db"):
        _tracker("sqlite:////dev/null/m.db").check(reach=True)


def test_the_times_of_records_are_for_trackers_alone(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append([_record(0)])
    assert '"time": ' in (tmp_path / "metrics.jsonl").read_text()
    assert read_journal(tmp_path / "metrics.jsonl") == [_record(0)]


def _until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_copy_of_a_run_under_another_name_is_tracked_as_a_run_of_its_own(tmp_path, uri, caplog):
    """As docs/run-folder.md says to copy one, to go on from an older checkpoint."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    _track(first, uri, range(40))
    shutil.copytree(first, second)
    background = _background(second, uri, run=replace(RUN, name="second"))
    background.start()
    Journal(second / "metrics.jsonl").append([_record(40)])
    assert background.finish("finished") is None
    client, runs = MlflowClient(uri), {run.info.run_name: run.info.run_id for run in _runs(uri)}
    assert {"a-run", "second"} <= set(runs)
    steps = {name: [m.step for m in client.get_metric_history(runs[name], "loss")] for name in ("a-run", "second")}
    assert steps == {"a-run": list(range(40)), "second": list(range(41))}
    assert "This run was called a-run, and is tracked anew as second" in caplog.text
