"""Pins that pictures of prompts can be looked at in any window, and that prompts are escaped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from browser import browser_command, look

from ddil_ray.report import Table, write_page
from ddil_ray.results import prompt_parts, save_prompted

MODELS = ["teacher-reference", "teacher-4-steps", "forward-only-4-steps", "ddil-4-steps"]
PROMPTS = [
    "a cat",
    "family: man, woman, girl, boy; and a caption that is much longer than a card is wide",
    "<b>bold</b>",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    for model in MODELS:
        save_prompted(torch.rand(3, 3, 32, 32) * 2 - 1, PROMPTS, folder / "samples", model)
    table = Table("Scores", ["model", *"abcdefghij"], [["a", *["0.12345"] * 10]])
    sections = [*prompt_parts(folder / "samples", "Same prompts", MODELS), ("Scores", [table])]
    write_page(folder / "report.html", title="By prompt", summary=["Nothing."], sections=sections)
    return folder / "report.html"


def test_every_prompt_has_a_card_with_a_picture_of_each_model(page):
    text = page.read_text()
    assert text.count('class="card"') == 3
    assert text.count("data:image/png;base64,") == 12
    assert "<b>bold" not in text


def test_folders_without_prompts_have_no_gallery(tmp_path):
    save_prompted(torch.zeros(2, 3, 8, 8), [], tmp_path, "student-1-steps")
    assert prompt_parts(tmp_path) == []
    assert not (tmp_path / "prompts.json").exists()


@pytest.mark.skipif(browser_command() is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_cards_fit_their_window(page, tmp_path, width, dark):
    folder = Path(os.environ.get("DDIL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    seen = look(page, width=width, dark=dark, picture=folder / f"gallery-{width}-{'dark' if dark else 'light'}.png")
    assert seen.problems == []
    assert seen.facts["page"] <= seen.facts["window"] == width
    assert len(seen.facts["pictures"]) == 12
    assert all(natural == 64 and shown[0] > 60 for natural, *shown in seen.facts["pictures"])
