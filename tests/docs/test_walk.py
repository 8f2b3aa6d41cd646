"""Walks through the pages that a CPU can do as a reader would, by copying what stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks

LEFT = {
    "quickstart.md": ["runs/digits-pd/report.html", "samples.png", "evaluation/metrics.json"],
    "tutorials/own-data.md": [
        "teacher.png",
        "student.png",
        "comparison/report.html",
        "shapes-4-steps/model_index.json",
    ],
    "tutorials/ablations.md": ["ablations/priors/report.html", "ablations/share/report.csv", "comparison/report.html"],
}
"""Page of docs/ -> what its reader has at the end."""
NOT_HERE = ("make demo", "python3 -m venv", "pip install", "mlflow ui")
"""Beginnings of lines that are left out: demonstrations and installing have tests of their own, a server never ends."""


def walk(page):
    """All that a page has its reader do, as one script."""
    for block in blocks(page):
        if block.name is not None:
            yield f"cat > {block.name} <<'END OF FILE'\n{block.text}END OF FILE\n"
        elif block.language == "python":
            yield f"python - <<'END OF FILE'\n{block.text}END OF FILE\n"
        elif block.language == "bash":
            yield from (line for line in block.text.splitlines(keepends=True) if not line.startswith(NOT_HERE))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("page", LEFT)
def test_a_reader_gets_what_a_page_promises(page, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    script = "".join(walk(ROOT / "docs" / page))
    walked = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert walked.returncode == 0, walked.stderr[-5000:]
    for made in LEFT[page]:
        assert (tmp_path / made).stat().st_size > 0
