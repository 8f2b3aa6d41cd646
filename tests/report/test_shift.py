"""Pins what the page shows of covariate shift."""

from __future__ import annotations

import pytest

from ddil_ray.report import Figure, Table, shift_parts


def _record(step, phase, steps, energy=0.5):
    figures = {
        "shift/energy": energy,
        "shift/floor": 0.1,
        "shift/frechet": 2.0,
        "shift/error_visited": 0.03,
        "shift/error_forward": 0.02,
        "rollout/spread": 0.9,
        "rollout/clip_share": 0.0,
    }
    by_step = {f"{name}/step_{k}": value for name, value in figures.items() for k in range(1, steps + 1)}
    return {"step": step, "phase": phase, **by_step, "rollout/nonfinite": 0}


RECORDS = [
    _record(0, 0, 2),
    {"step": 5, "phase": 0, "loss": 1.0},
    _record(10, 0, 2, energy=0.4),
    _record(10, 0, 2, energy=0.25),  # done again after a crash
    _record(20, 1, 1),
]


def test_every_figure_has_a_curve_per_step_and_phases_are_apart():
    figures = [p for p in shift_parts(RECORDS) if isinstance(p, Figure)]
    assert len(figures) == 5
    energy = figures[0].content
    assert "<svg" in energy
    assert "stroke-dasharray" in energy
    assert "stroke-dasharray" not in figures[1].content
    assert all(f"step {k}" in energy for k in (1, 2))


def test_the_table_has_the_last_measurement_of_every_phase():
    (table,) = (p for p in shift_parts(RECORDS) if isinstance(p, Table))
    assert [row[:4] for row in table.rows] == [
        ["1", "10", "1", "0.25"], ["1", "10", "2", "0.25"], ["2", "20", "1", "0.5"]
    ]  # fmt: skip
    assert table.rows[0][4:] == ["0.1", "2", "0.03", "0.02", "0.9", "0", "0"]
    assert {len(row) for row in table.rows} == {len(table.header)}


@pytest.mark.parametrize("records", [[], [{"step": 5, "phase": 0, "loss": 1.0}, {"step": 8, "checkpoint/step": 8}]])
def test_a_run_without_measurements_has_no_such_part(records):
    assert shift_parts(records) == []


def test_what_a_student_that_overflowed_left_is_shown():
    curve, table = shift_parts([{"step": 0, "phase": 0, "rollout/clip_share/step_1": 0.5, "rollout/nonfinite": 64}])
    assert isinstance(curve, Figure)
    assert table.rows == [["1", "0", "1", *["nan"] * 6, "0.5", "64"]]
