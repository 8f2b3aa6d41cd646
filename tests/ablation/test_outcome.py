"""Pins that a kept outcome is the same when it is read, and is not taken for that of other settings."""

from __future__ import annotations

import dataclasses

import pytest
from runs import small_run
from studies import made_up_outcome

from ddil_ray.ablation.grid import GridRun
from ddil_ray.ablation.outcome import read_outcome, write_outcome


@pytest.fixture
def run():
    config = small_run(trainer={"batch_size": 64})
    return GridRun({"objective": "pd", "states": "half student"}, "states", config, config)


def test_an_outcome_is_read_as_it_was_written(run, tmp_path):
    outcome = made_up_outcome({"objective": "pd"}, "half student", 0)
    kept = write_outcome(tmp_path, run, outcome)
    assert kept == dataclasses.replace(outcome, where="runs/pd--half-student/seed-0")
    assert read_outcome(tmp_path, run) == kept


def test_nothing_is_read_of_other_settings_or_of_a_run_that_was_cut_short(run, tmp_path):
    assert read_outcome(tmp_path, run) is None
    write_outcome(tmp_path, run, made_up_outcome({"objective": "pd"}, "half student", 0))
    other = small_run(trainer={"batch_size": 64, "lr": 2e-3})
    assert read_outcome(tmp_path, dataclasses.replace(run, config=other)) is None
    assert read_outcome(tmp_path, dataclasses.replace(run, reference=other)) is None
    (run.folder(tmp_path) / "metrics.json").rename(run.folder(tmp_path) / "metrics.json.part")
    assert read_outcome(tmp_path, run) is None
