"""Pins what benchmarks of speed report with: goals, processes that end, tables of a document."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def measuring(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measuring

    return measuring


def test_a_goal_is_met_on_its_side_of_the_bound(measuring):
    most, least = measuring.Goal("ratio", 1.0, 1.05), measuring.Goal("share", 1.0, 1.05, at_least=True)
    assert (most.met, least.met) == (True, False)


def test_processes_that_have_ended_keep_what_they_spent(measuring):
    before = measuring.cpu_seconds()
    work = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", work], stdout=subprocess.PIPE)
    process.stdout.readline()
    spent = measuring.cpu_seconds() - before
    process.kill()
    process.wait()
    assert spent >= 0.45  # the clock of processes ticks every 10 ms
    assert measuring.cpu_seconds() - before >= spent


def test_arms_take_turns_and_warming_up_is_not_counted(measuring):
    order = []
    arms = {name: lambda name=name: (order.append(name), time.sleep(0.001)) for name in ("a", "b")}
    seconds = measuring.interleaved(arms, repeats=2, warm=1)
    assert order == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_tables_go_between_their_marks_and_nothing_else_changes(tmp_path):
    table = {"name": "sync", "columns": ["size", "ratio"], "rows": [["1 GB", "1.9"]]}
    goal = {"name": "ratio", "measured": 1.9, "bound": 2.0, "at_least": False, "met": True}
    (tmp_path / "sync.json").write_text(json.dumps({"tables": [table], "goals": [goal]}))
    document = tmp_path / "performance.md"
    document.write_text(
        "Before.\n<!-- table: sync -->\nold\n<!-- end -->\nBetween.\n<!-- table: goals -->\n<!-- end -->\n"
    )
    command = [sys.executable, str(BENCHMARKS / "tables.py"), str(document), "--results", str(tmp_path)]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
    text = document.read_text()
    assert text.startswith(
        "Before.\n<!-- table: sync -->\n| size | ratio |\n| --- | --- |\n| 1 GB | 1.9 |\n<!-- end -->"
    )
    assert "\nBetween.\n" in text
    assert "| ratio | 1.9 | <= 2 | yes |" in text
    assert "old" not in text
