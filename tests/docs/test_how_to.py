"""Pins the how-to pages: what they say is done to a copy of the package, and then does what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks

HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))


def _changed(text, diff):
    """`text` after a hunk whose lines, but for those added, stand in it once and together."""
    lines = diff.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert text.count(before) == 1, before
    return text.replace(before, after)


def _follow(page, folder):
    """Do what `page` says to the package in `folder`; the files it made or changed."""
    touched = []
    for block in blocks(page):
        if block.name is None:
            continue
        file = folder / block.name
        if block.language == "diff":
            file.write_text(_changed(file.read_text(), block.text))
        else:
            assert not file.exists()
            file.write_text(block.text)
        touched.append(file)
    return touched


@pytest.fixture(params=HOW_TO, ids=lambda page: page.stem)
def followed(request, tmp_path):
    """(folder, files) of the package after a page."""
    shutil.copytree(ROOT / "ddil_ray", tmp_path / "ddil_ray", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path, _follow(request.param, tmp_path)


def test_what_a_page_says_works_and_reads_like_the_rest(followed):
    folder, files = followed
    assert folder / "try.py" in files
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])]),
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    tried = subprocess.run(
        [sys.executable, "try.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert tried.returncode == 0, tried.stderr
    assert tried.stdout.strip()
    ruff = [sys.executable, "-m", "ruff"]
    settings = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", *map(str, files)]
    for check in (["check", "--ignore", "INP,T20,S101,D100"], ["format", "--check"]):
        found = subprocess.run([*ruff, *check, *settings], cwd=folder, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def test_there_is_a_page_for_each_thing_to_add():
    assert [page.stem for page in HOW_TO] == ["family", "objective", "source", "tracker"]
