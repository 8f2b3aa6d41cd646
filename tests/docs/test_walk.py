"""Walks through the tutorial that a CPU can do as a reader would, by copying what stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_reader_distils_images_of_their_own(tmp_path):
    page = blocks(ROOT / "docs" / "tutorials" / "own-data.md")
    for block in page:
        if block.name is not None:
            (tmp_path / block.name).write_text(block.text)
    commands = "".join(block.text for block in page if block.language == "bash")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    walked = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert walked.returncode == 0, walked.stderr[-5000:]
    for made in ("teacher.png", "student.png", "comparison/report.html", "shapes-4-steps/model_index.json"):
        assert (tmp_path / made).stat().st_size > 0
