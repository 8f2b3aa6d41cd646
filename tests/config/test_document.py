"""Pins the page of settings to the code."""

from __future__ import annotations

from pathlib import Path

from ddil_ray.config.document import document


def test_the_page_of_settings_is_what_the_code_says():
    """If this fails: `python -m ddil_ray.config.document > docs/config.md`."""
    assert (Path(__file__).parents[2] / "docs" / "config.md").read_text() == document()
