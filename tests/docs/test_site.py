"""Pins the documentation site: it builds without a warning, and a reader's browser asks nobody else for anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; strict, so that a link to nowhere, a page without a place or a name without docs fails."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--config-file", "docs/site/mkdocs.yml", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there_and_found_by_search(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")} - {"404.html"}
    assert found == pages
    docs = ROOT / "docs"
    written = {str(page.relative_to(docs).with_suffix(".html")) for page in docs.rglob("*.md")}
    assert {name.replace("README.html", "index.html") for name in written} <= pages


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("runs", "ddil_ray.runtime.run.distill"),
        ("runs", "ddil_ray.errors.ConfigError"),
        ("objectives", "ddil_ray.objectives.objective.Objective.label"),
        ("states", "ddil_ray.states.source.StateRequest"),
        ("diffusion", "ddil_ray.diffusion.solver.ddim_step"),
        ("models", "ddil_ray.models.family.Family.load"),
        ("tracking", "ddil_ray.tracking.tracker.Tracker.open"),
    ],
)
def test_the_reference_is_made_from_docstrings(site, page, name):
    assert f'id="{name}"' in (site / "reference" / f"{page}.html").read_text()


def test_nothing_is_fetched_from_elsewhere(site):
    foreign = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//')
    assert [path.name for path in site.rglob("*.html") if foreign.search(path.read_text())] == []


def test_no_setting_is_lost_as_a_tag_or_a_column(site):
    """`<name>` and `|x|` in a table are text."""
    page = (site / "config.html").read_text()
    assert "&lt;output&gt;/&lt;name&gt;" in page
    assert "largest |x_0|" in page
