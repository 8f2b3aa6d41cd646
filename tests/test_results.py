"""Pins the tables that scores are shown in."""

from __future__ import annotations

import pytest

from ddil_ray.results import score_parts, score_table

ABOUT = {"num_samples": 50, "image_size": 32, "resized": True, "features": "2 features of mine", "k": 5}


def _scores(**more):
    return {"frechet_data": 1.0, "kid_data": -0.123456, "vendi": 3.0, **more}


def test_rows_go_by_steps_and_columns_are_those_that_were_measured():
    table = score_table({"student": {1: _scores(), 4: _scores()}, "teacher": {4: _scores(clip_score=25.0)}}, "Scores")
    assert table.header == ("model", "steps", "Frechet to data", "KID to data", "Vendi", "CLIP score")
    assert table.rows == [
        ["student", "1", "1", "-0.1235", "3", ""],
        ["student", "4", "1", "-0.1235", "3", ""],
        ["teacher", "4", "1", "-0.1235", "3", "25"],
    ]


def test_the_caption_says_what_was_measured_how(tmp_path):
    (_, (table,)), *_ = score_parts({"student": {1: _scores()}}, ABOUT, tmp_path)
    assert table.caption == "50 samples each, resized to 32 px; features: 2 features of mine; k = 5"


@pytest.mark.parametrize(("classes", "shown"), [(3, [0, 1, 2]), (30, [*range(29, 9, -1)])])
def test_classes_are_shown_with_their_prompts_the_worst_first_where_there_are_many(tmp_path, classes, shown):
    rows = [{"class": c, "prompt": f"a {c}", "count": 12345, "paired_error": c / 10} for c in range(classes)]
    parts = score_parts({"student": {1: _scores()}}, ABOUT, tmp_path, {"student": {1: rows, 2: []}})
    (heading, (table,)) = parts[-1]
    assert heading == "Scores by class, against the data of the class"
    assert table.header == ("class", "prompt", "samples", "paired error")
    assert [row[0] for row in table.rows] == [str(c) for c in shown]
    assert table.rows[0] == [str(shown[0]), f"a {shown[0]}", "12345", f"{shown[0] / 10:.4g}"]
