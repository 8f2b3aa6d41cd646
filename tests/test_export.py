"""Pins exported students: through plain diffusers they give the samples that this library gives."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler

from ddil_ray.diffusion.solver import sample
from ddil_ray.evaluation import exported_sampler, student_samplers
from ddil_ray.export import consistency_scheduler, ddim_scheduler, save_model_folder
from ddil_ray.models import load_model
from ddil_ray.models.unet import new_unet, unet_model
from ddil_ray.objectives import DistributionMatching, LatentConsistency, ProgressiveDistillation

LABELS = [0, 3, 9, 9]


def _student(zero_snr=True):
    torch.manual_seed(0)
    unet = new_unet(sample_shape=(1, 8, 8), num_classes=10, block_out_channels=(8, 16))
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr)
    model = unet_model(unet, dict(scheduler.config))
    model.network.eval().requires_grad_(False)
    return model


def _objective(method, model, steps):
    if method == "pd":
        return ProgressiveDistillation(model.schedule, teacher_steps=2 * steps, student_steps=(steps,))
    return {"lcm": LatentConsistency, "dmd2": DistributionMatching}[method](model.schedule)


def _save(folder, method, model):
    objective = _objective(method, model, 4)
    grid = objective.lcm_scheduler
    scheduler = consistency_scheduler(model, **grid) if grid else ddim_scheduler(model)
    save_model_folder(folder, model, scheduler=scheduler, name="s", description="d", steps=4, facts={"a": "b"})


@pytest.mark.parametrize(
    ("method", "steps"), [(m, n) for m in ("pd", "lcm", "dmd2") for n in (1, 2, 4, 8) if (m, n) != ("dmd2", 8)]
)
@pytest.mark.parametrize("zero_snr", [True, False])
def test_diffusers_samples_what_we_sample(tmp_path, method, steps, zero_snr):
    model = _student(zero_snr)
    _save(tmp_path, method, model)
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        batch_size=4, class_labels=list(LABELS), num_inference_steps=steps, output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    objective = _objective(method, model, steps)
    cond = torch.tensor(LABELS)
    for sampler in (
        student_samplers(objective, {steps: model}, [steps], w=0.0)[steps],
        exported_sampler(load_model(str(tmp_path)), steps),
    ):
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(4, 1, 8, 8, generator=generator)
        ours = sample(
            sampler.denoiser, noise, times=sampler.times, cond=cond, w=torch.zeros(4), schedule=sampler.schedule,
            transition=sampler.transition, generator=generator,
        ).clamp(-1, 1)  # fmt: skip
        torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=2e-3)


def test_a_student_samples_where_ddil_ray_cannot_be_imported(tmp_path):
    _save(tmp_path / "student", "lcm", _student())
    script = f"""
import sys
sys.modules["ddil_ray"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / "student")!r})
images = pipeline(batch_size=2, num_inference_steps=2, class_labels=[1, 2], generator=torch.manual_seed(0)).images
assert len(images) == 2 and images[0].size == (8, 8)
try:
    import ddil_ray
except ImportError:
    print("alone")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("alone"), done.stderr


def test_the_model_card_tells_how_to_load_it(tmp_path):
    _save(tmp_path, "lcm", _student())
    card = (tmp_path / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "num_inference_steps=4" in card
    assert "- a: b" in card
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == "LCMScheduler"
