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
    tick = 0.02  # the clock of processes ticks every 10 ms
    assert spent >= 0.5 - 2 * tick
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


def _watched(monkeypatch, leads, *, cpu_s_per_step=2.0, cpu_s_per_block=4.0):
    """A view of a run that records `leads` (blocks ahead after every 5 steps); a step takes a block of each stream."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from marked_runs import Mark, MarkedView

    view = MarkedView()
    for n, lead in enumerate(leads, start=1):
        step = 5 * n
        record = {"step": step, "loss": 1.0, "actors/blocks_ahead/forward": lead, "actors/blocks_ahead/student": lead}
        spent = cpu_s_per_step * step + cpu_s_per_block * 2 * (step + lead)
        view.marks.append(Mark(record, float(step), spent))
    return view


def test_a_stretch_counts_what_actors_made_for_its_updates_and_no_more(monkeypatch):
    """At first they get ahead, at the end they rest: either counts too little of their work, or too much."""
    leads = [1, 3, 5, 5, 4, 5, 5, 5, 5, 4, 3, 1, 0]
    stretch = _watched(monkeypatch, leads).stretch(after=15, until=55, least=20)
    assert (stretch.steps, stretch.blocks_apart) == (30, 0)
    assert stretch.cpu_s / stretch.steps == 2.0 + 2 * 4.0
    assert stretch.seconds == 30


def test_a_run_whose_actors_never_are_as_far_ahead_again_is_refused(monkeypatch):
    view = _watched(monkeypatch, [5, 4, 3, 2, 1, 0])
    with pytest.raises(RuntimeError, match="equally far ahead"):
        view.stretch(after=0, until=30, least=10)
    assert view.stretch(after=0, until=30, least=5).blocks_apart == 1


def test_what_had_been_spent_belongs_to_the_last_record_of_a_poll(monkeypatch):
    view = _watched(monkeypatch, [5] * 8)
    marks = view.marks
    for early, late in ((0, 1), (6, 7)):  # arrive together, the second being the newest
        marks[early] = type(marks[early])(marks[early].record, marks[late].seconds - 0.01, marks[late].cpu_s)
    stretch = view.stretch(after=0, until=35, least=5)
    assert (stretch.steps, stretch.cpu_s) == (20, 20 * 10.0)  # from 10 to 30


def test_publications_are_measured_where_shared_memory_holds_four_of_them(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sync

    enough, little = (sync.store_bytes(sync.SIZES_MB, free) for free in (10**11, 2 * 10**9))
    assert enough >= 4 * 10**9
    assert little <= 2 * 10**9
    assert sync.sizes_that_fit(sync.SIZES_MB, enough) == [10, 100, 1000]
    assert capsys.readouterr().out == ""
    assert sync.sizes_that_fit(sync.SIZES_MB, little) == [10, 100]
    assert "1000 MB left out" in capsys.readouterr().out
