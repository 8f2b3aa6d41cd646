"""Pins that the report looks right in a real browser: wide and narrow, light and dark, with no network.

Screenshots go to the folder that DDIL_SCREENSHOTS names, else to pytest's own.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser import browser_command, look
from studies import made_up_study

from ddil_ray.ablation.report import write_report

pytestmark = pytest.mark.skipif(
    browser_command() is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, made_up_study(quarters=(0.4, 0.2, 0.2, 0.2)))
    return folder / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_fits_its_window_and_shows_its_charts(page, tmp_path, width, dark):
    folder = Path(os.environ.get("DDIL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"ablation-report-{width}-{'dark' if dark else 'light'}.png"
    seen = look(page, width=width, dark=dark, picture=picture)
    assert seen.problems == []
    assert seen.facts["page"] <= seen.facts["window"] == width
    assert len(seen.facts["charts"]) == 18
    assert all(w > 250 and h > 80 for w, h in seen.facts["charts"])
    assert all(natural > 0 and min(shown) > 50 for natural, *shown in seen.facts["pictures"])
    assert seen.facts["outside"] == []
    assert seen.facts["leastText"] >= 9
    paper, ink = (sum(map(int, _rgb(seen.facts[key]))) for key in ("paper", "ink"))
    assert (paper < 150 and ink > 600) if dark else (paper > 700 and ink < 200)
    assert seen.facts["chartInk"] == seen.facts["ink"]
    assert picture.stat().st_size > 10_000


def _rgb(colour):
    return colour.removeprefix("rgb(").removesuffix(")").split(",")
