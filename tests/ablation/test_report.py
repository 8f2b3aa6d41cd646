"""Pins that the page says what report.json says, and that report.json says what the outcomes say."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
from scipy import stats
from studies import EVEN, made_up_study

from ddil_ray.ablation.page import shown
from ddil_ray.ablation.report import write_report
from ddil_ray.ablation.summary import paired, summarise

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.])")
SKEWED = (0.4, 0.2, 0.2, 0.2)


class Tables(HTMLParser):
    """Text of the data cells of a page, by the source that their table names."""

    def __init__(self, page):
        super().__init__()
        self.cells, self._source, self._inside = {}, "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self._source = dict(attrs)["data-source"]
        self._inside = tag == "td" or (self._inside and tag == "small")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag == "small"

    def handle_data(self, data):
        if self._inside:
            self.cells.setdefault(self._source, []).append(data)


def _numbers(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return {number for part in content for number in _numbers(part)}
    return {shown(content)} if isinstance(content, (int, float)) and not isinstance(content, bool) else set()


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_number_in_a_table_is_one_of_report_json_under_the_key_it_names(tmp_path, seeds):
    write_report(tmp_path, made_up_study(seeds, quarters=SKEWED))
    report = json.loads((tmp_path / "report.json").read_text())
    tables = Tables((tmp_path / "report.html").read_text()).cells
    assert set(tables) == {"report.json: comparisons", "report.json: laws", "report.json: cost"}
    for source, cells in tables.items():
        known = _numbers(report[source.removeprefix("report.json: ")])
        written = [number for cell in cells for number in NUMBER.findall(cell)]
        assert len(written) >= 4
        assert not set(written) - known, source


def test_every_chart_names_where_its_numbers_are(tmp_path):
    report = write_report(tmp_path, made_up_study())
    page = (tmp_path / "report.html").read_text()
    captions = re.findall(
        r"<figure><figcaption>[^<]*(?:<span class=\"source\">([^<]*)</span>)?[^<]*</figcaption><svg", page
    )
    assert len(captions) == page.count("<svg") > 10
    assert {c.removeprefix("report.json: ") for c in captions} == {"quality", "shift", "times", "cost"}
    assert all(report[c.removeprefix("report.json: ")] for c in captions)


def test_comparisons_are_paired_by_seed_and_leave_out_seeds_without_a_partner():
    study = made_up_study(4)
    without = [o for o in study.outcomes if not (o.arm == "forward only" and o.seed == 2)]
    report = summarise(study)
    found = [r for r in report["comparisons"] if r["arm"] == "half student" and r["score"] == "frechet_data"]
    assert [r["seeds"] for r in found] == [4] * 8
    report = summarise(dataclasses.replace(study, outcomes=without))
    row = next(
        r for r in report["comparisons"]
        if (r["arm"], r["score"], r["steps"], r["group"]) == ("half student", "frechet_data", 4, {"objective": "pd"})
    )  # fmt: skip
    assert row["seeds"] == row["better"] == 3
    first, second = paired(
        [r for r in report["runs"] if r["group"] == {"objective": "pd"}],
        "forward only", "half student", score="frechet_data", steps=4,
    )  # fmt: skip
    oracle = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert (row["difference"]["low"], row["difference"]["high"]) == pytest.approx((oracle.low, oracle.high))


def test_arms_trained_on_other_times_raise_a_visible_warning_and_equal_ones_do_not(tmp_path):
    for quarters, expected in ((SKEWED, 2), (EVEN, 0)):
        report = write_report(tmp_path, made_up_study(quarters=quarters))
        warned = [law["arm"] for law in report["laws"] if law["differs"]]
        assert warned == ["half student"] * expected
        page = (tmp_path / "report.html").read_text()
        assert page.count("half student and forward only were trained on different times t") == expected


def test_failed_runs_are_on_the_page_with_their_error(tmp_path):
    report = write_report(tmp_path, made_up_study())
    assert report["failures"][0]["seed"] == 7
    page = (tmp_path / "report.html").read_text()
    assert "pd: with teacher, seed 7 failed twice and is left out: RunFailedError: the loss is not finite" in page


def test_the_csv_has_a_row_per_run_steps_and_score(tmp_path):
    write_report(tmp_path, made_up_study(2))
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 * 4 * 6
    (row,) = [r for r in rows if list(r.values())[:5] == ["lcm", "half student", "1", "8", "paired_error"]]
    assert float(row["value"]) == pytest.approx(0.6 * 0.02 / 8)


def test_shift_is_the_last_measurement_of_every_phase():
    report = summarise(made_up_study())
    rows = [r for r in report["shift"] if r["arm"] == "half student" and r["group"] == {"objective": "pd"}]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert [r["frechet"]["mean"] for r in rows] == pytest.approx([0.6, 1.2, 1.8, 2.4])
    assert all(r["energy"]["low"] < r["energy"]["mean"] < r["energy"]["high"] for r in rows)


def test_shift_of_weights_that_were_never_synced_is_left_out():
    """Their only measurement is of the weights that training began with."""
    study = made_up_study()
    outcomes = [
        dataclasses.replace(o, records=[r | {"step": 0} if "loss" not in r else r for r in o.records])
        if o.arm == "half student" else o
        for o in study.outcomes
    ]  # fmt: skip
    report = summarise(dataclasses.replace(study, outcomes=outcomes))
    assert {r["arm"] for r in report["shift"]} == {"forward only", "with teacher"}


def test_one_seed_gives_no_interval_and_the_page_says_so(tmp_path):
    report = write_report(tmp_path, made_up_study(1))
    assert all(row["difference"]["low"] is None for row in report["comparisons"])
    assert "One seed: no interval can be given" in (tmp_path / "report.html").read_text()
