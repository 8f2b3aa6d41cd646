"""Pins that logs are lines of JSON with run and role, where Ray is told to write them so."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from ddil_ray.runtime.cluster import LOCAL_ENV, WORKER_ENV
from ddil_ray.runtime.logs import name_logs
from ddil_ray.tracking import View

HERE = Path(__file__).parents[1]


@pytest.fixture
def root(monkeypatch):
    """The handlers of the root logger, of which there is one."""
    handlers = [logging.StreamHandler(io.StringIO())]
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    return handlers


def test_a_process_of_another_run_has_its_names_alone(root):
    for run, role in (("first", "driver"), ("second", "trainer")):
        name_logs(run, role)
    assert len(root[0].filters) == 1
    record = logging.makeLogRecord({"msg": "hello"})
    assert root[0].filter(record)
    assert (record.run, record.role) == ("second", "trainer")


def test_what_the_terminal_would_show_is_logged_where_ray_logs_and_no_secret_is(root, monkeypatch, caplog):
    shown = io.StringIO()
    view = View(Console(file=shown))
    caplog.set_level(logging.INFO)
    view.say("plain")
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    view.say("to s3://key:word@bucket")  # pragma: allowlist secret
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    view.say("before Ray")
    assert shown.getvalue() == "plain\nbefore Ray\n"
    assert root[0].stream.getvalue() == "to s3://***@bucket\n"


@pytest.mark.ray
@pytest.mark.slow
def test_every_role_of_a_run_writes_lines_of_json_that_name_it(run_dir):
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = {"PYTHONPATH": path, "RAY_LOGGING_CONFIG_ENCODING": "JSON"}
    environment = {**os.environ, **WORKER_ENV, **LOCAL_ENV, **asked}
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as temporary:
        command = [sys.executable, str(HERE / "logged.py"), run_dir, temporary]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        files = [path for path in Path(temporary).rglob("*") if path.suffix in (".err", ".log") and path.is_file()]
        logs = [path.read_text(errors="replace") for path in files]
    ours = [line for line in _lines([done.stderr, *logs]) if line.get("run") == "small"]
    assert {line["role"] for line in ours} == {"driver", "trainer", "forward_states", "student_rollouts", "shift"}
    for line in ours:
        assert line.keys() >= {"asctime", "levelname", "message", "node_id", "job_id", "worker_id"}
        assert ("actor_id" in line) == (line["role"] != "driver")


def _lines(texts):
    """Those that Ray's formatter wrote."""
    for line in "\n".join(texts).splitlines():
        if line.startswith('{"asctime"'):
            yield json.loads(line)
