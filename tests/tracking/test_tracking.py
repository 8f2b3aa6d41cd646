"""Pins the journal and the trackers: a real MLflow on sqlite, and a server that is not there."""

from __future__ import annotations

import io
import json
import socket
import time

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from ddil_ray.tracking import TRACKERS, BackgroundTracker, Journal, RunInfo, View, read_journal

RUN = RunInfo(
    "a-run", params={"seed": "0", "x.y": "z"}, tags={"git_commit": "abc"}, rounds=["round 4 steps", "round 2 steps"]
)


def _background(tmp_path, uri, timeout_s=5.0):
    tracker = TRACKERS["mlflow"](uri=uri, experiment="tests", timeout_s=timeout_s)
    return BackgroundTracker(
        tracker, RUN, journal=tmp_path / "metrics.jsonl", state=tmp_path / "tracking.json", timeout_s=timeout_s
    )


def _records(first, last):
    return [{"step": n, "total_steps": 20, "phase": n // 10, "loss": 1.0 / (n + 1)} for n in range(first, last)]


def test_a_run_and_its_continuation_are_one_mlflow_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    journal = Journal(tmp_path / "metrics.jsonl")
    (tmp_path / "report.html").write_text("<p>")
    for first, last, status in ((0, 12, "stopped"), (12, 20, "finished")):
        background = _background(tmp_path, uri)
        background.start()
        journal.append(_records(first, last))
        journal.append([{"step": first, "phase": first // 10, "shift/energy/step_1": 0.5, "rollout/nonfinite": 0}])
        assert background.finish(status, [tmp_path / "report.html"]) is None
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"a-run", "a-run round 4 steps", "a-run round 2 steps"}
    main = runs["a-run"]
    assert main.data.params == RUN.params
    assert main.data.tags["git_commit"] == "abc"
    assert main.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(main.info.run_id, "loss")] == list(range(20))
    nested = runs["a-run round 2 steps"]
    assert nested.data.tags["mlflow.parentRunId"] == main.info.run_id
    assert [m.step for m in client.get_metric_history(nested.info.run_id, "loss")] == list(range(10, 20))
    shift = client.get_metric_history(nested.info.run_id, "shift/energy/step_1")
    assert [(m.step, m.value) for m in shift] == [(12, 0.5)]
    assert [a.path for a in client.list_artifacts(main.info.run_id)] == ["report.html"]


@pytest.mark.parametrize("kind", ["refuses", "never answers"])
def test_a_dead_server_delays_nothing_and_loses_nothing(tmp_path, kind):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "never answers":
            server.listen(1)
        background = _background(tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=2.0)
        background.start()
        journal, started = Journal(tmp_path / "metrics.jsonl"), time.monotonic()
        for n in range(100):
            journal.append(_records(n, n + 1))
        assert time.monotonic() - started < 1
        time.sleep(3.0)
        started = time.monotonic()
        unsent = background.finish("finished")
        assert time.monotonic() - started < 12
    assert unsent.startswith("100 records did not reach the tracker")
    assert len(read_journal(tmp_path / "metrics.jsonl")) == 100


def test_a_torn_last_line_costs_that_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    Journal(path).append(_records(0, 2))
    with path.open("a") as file:
        file.write('{"step": 2, "los')
    Journal(path).append(_records(3, 4))
    assert [r["step"] for r in read_journal(path)] == [0, 1, 3]


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    record = {
        **_records(9, 10)[0],
        "throughput/samples_per_s": 500.0,
        "trainer/stall_share": 0.25,
        "staleness/p50": 3.0,
        "staleness/max": 5.0,
        "replay/fill/student": 64,
        "rows/dropped/student": 2,
    }
    with View(Console(file=out, width=80)) as view:
        view.show({"step": 8, "checkpoint/step": 8})
        view.show(record)
    line = out.getvalue()
    for part in (
        "step 9/20",
        "loss 0.1",
        "500 samples/s",
        "stall 25%",
        "staleness 3/5",
        "dropped student 2",
        "checkpoint 8",
    ):
        assert part in line
    assert len(line.strip().splitlines()) == 1


def test_the_newest_covariate_shift_stands_beside_the_loss():
    """The step with the largest energy distance and its floor, errors on visited / forward states, mean over steps."""
    out = io.StringIO()
    shift = {
        "step": 4, "phase": 0, "rollout/nonfinite": 0,
        "shift/energy/step_1": 0.02, "shift/floor/step_1": 0.01, "shift/energy/step_2": 0.45,
        "shift/floor/step_2": 0.03, "shift/error_visited/step_1": 0.1, "shift/error_visited/step_2": 0.3,
        "shift/error_forward/step_1": 0.1, "shift/error_forward/step_2": 0.2,
    }  # fmt: skip
    record = {**_records(9, 10)[0], "throughput/samples_per_s": 500.0}
    for broken in (0, 7):
        with View(Console(file=out, width=80)) as view:
            view.show({"step": 0, "phase": 0, "rollout/nonfinite": 0})
            view.show({**shift, "rollout/nonfinite": broken})
            view.show(record)
    first, second = out.getvalue().strip().splitlines()
    assert "shift 0.45 (chance 0.03)  error 0.2/0.15" in first
    assert "infinite" not in first
    assert "7 NaN or infinite" in second


def test_the_live_view_shows_phase_step_and_loss():
    out = io.StringIO()
    with View(Console(file=out, width=160, force_terminal=True)) as view:
        view.show({**_records(9, 10)[0], "throughput/samples_per_s": 500.0})
        view._progress.refresh()
    assert "phase 1" in out.getvalue()
    assert "9/20" in out.getvalue()
    assert "loss 0.1" in out.getvalue()


def test_the_state_of_tracking_is_readable(tmp_path):
    background = _background(tmp_path, f"sqlite:///{tmp_path}/m.db")
    background.start()
    Journal(tmp_path / "metrics.jsonl").append(_records(0, 3))
    background.finish("finished")
    state = json.loads((tmp_path / "tracking.json").read_text())
    assert state["sent"] == (tmp_path / "metrics.jsonl").stat().st_size
