"""Pins that the text-to-image demo runs from nothing to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from ddil_ray.cli import main

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_a_text_to_image_teacher_is_made_and_distilled(capsys, run_dir):
    arguments = ["demo-t2i", "--output", run_dir, "--scale", "0.01", "--prompt", "blue cat", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert set(found["scores"]) == {"teacher", "forward-only", "ddil"}
    assert all(set(by_steps) == {"4"} for by_steps in found["scores"].values())
    page = Path(found["folder"], "report.html").read_text()
    assert "blue cat" in page
    assert page.count('class="card"') == 25
    pipeline = DiffusionPipeline.from_pretrained(Path(found["folder"], "ddil", "student"))
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": torch.manual_seed(0), "output_type": "np"}
    assert pipeline("blue cat", **call).images.shape == (1, 32, 32, 3)
