"""Pins exported students: through plain diffusers they give the samples that this library gives."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from tiny import save_pipeline

from ddil_ray.card import base_of
from ddil_ray.diffusion.solver import sample
from ddil_ray.evaluation import exported_sampler, student_samplers
from ddil_ray.export import consistency_scheduler, ddim_scheduler, save_model_folder
from ddil_ray.models import load_model, student_of
from ddil_ray.models.unet import new_unet, unet_model
from ddil_ray.objectives import DistributionMatching, LatentConsistency, ProgressiveDistillation
from ddil_ray.prompts import HeldEmbeddings, Prompts

LABELS = [0, 3, 9, 9]
PROMPTS = ["a red bird", "two boats"]


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


def _save(folder, method, model, w=0.0):
    objective = _objective(method, model, 4)
    grid = objective.lcm_scheduler
    scheduler = consistency_scheduler(model, **grid) if grid else ddim_scheduler(model)
    save_model_folder(folder, model, scheduler=scheduler, name="s", description="d", steps=4, w=w, facts={"a": "b"})


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


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    """A tiny Stable Diffusion whose last DDIM step ends at the first timestep, as that of SD 1.5 does."""
    return save_pipeline("stable_diffusion", tmp_path_factory.mktemp("sd"), set_alpha_to_one=False)


def _prompt_student(folder, *, told):
    teacher = load_model(str(folder))
    encoder = teacher.family.text_encoder(teacher.folder)
    teacher.bind(Prompts(HeldEmbeddings(encoder(PROMPTS)), encoder.negative(None)).bank())
    student = student_of(teacher, guidance_embedding=told)
    if told:
        torch.nn.init.normal_(student.network.denoiser.time_embedding.cond_proj.weight)
    student.network.eval().requires_grad_(False)
    return student


@pytest.mark.parametrize(("method", "told"), [("pd", False), ("lcm", False), ("lcm", True), ("dmd2", False)])
def test_a_folder_of_prompts_samples_through_diffusers_what_we_sample(tmp_path, sd_folder, method, told):
    """By the call in the card alone: its steps, its guidance, no timesteps; and nothing warns."""
    student = _prompt_student(sd_folder, told=told)
    objective, w = _objective(method, student, 4), 2.0
    with _warnings() as warned:
        _save(tmp_path, method, student, w=w)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path)
        pipeline.set_progress_bar_config(disable=True)
        (arguments,) = re.findall(r"pipeline\((.*), generator", (tmp_path / "README.md").read_text())
        call = {**eval(f"dict({arguments})"), "prompt": PROMPTS}
        theirs = pipeline(**call, output_type="pt", generator=torch.Generator().manual_seed(5)).images
    assert warned == []
    assert call["guidance_scale"] == (w + 1 if told else 1)
    read = load_model(str(tmp_path))
    read.bind(student.network.bank)
    for sampler in (
        student_samplers(objective, {4: student}, [4], w=w)[4],
        exported_sampler(read, 4, w=w if told else 0.0),
    ):
        generator = torch.Generator().manual_seed(5)
        noise = torch.randn(len(PROMPTS), *student.sample_shape, generator=generator)
        ours = sampler(noise, torch.arange(len(PROMPTS)), seed=generator)
        torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=2e-3)


def test_the_card_of_a_teacher_leaves_guidance_to_who_samples_it(tmp_path, sd_folder):
    save_model_folder(tmp_path, load_model(str(sd_folder)), name="t", description="d", steps=32, teacher=True)
    card = (tmp_path / "README.md").read_text()
    assert "guidance_scale" not in card
    assert "num_inference_steps=32" in card


@contextlib.contextmanager
def _warnings():
    """What Python or diffusers warns of."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
            found += [str(w.message) for w in caught]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_students_of_teachers_with_other_schedulers_load_silently(tmp_path, sd_folder, scheduler):
    """Of hub teachers, which come with one of these."""
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.register_to_config(requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "teacher")
    student = load_model(str(tmp_path / "teacher"))
    for method in ("pd", "lcm"):
        with _warnings() as warned:
            _save(tmp_path / method, method, student)
            DiffusionPipeline.from_pretrained(tmp_path / method)
        assert warned == []
        assert json.loads((tmp_path / method / "model_index.json").read_text())["requires_safety_checker"] is False


def test_no_file_of_an_export_names_a_path_of_this_machine(tmp_path, sd_folder):
    student = _prompt_student(sd_folder, told=False)
    base = base_of(str(sd_folder), sd_folder)
    save_model_folder(tmp_path, student, name="s", description="d", steps=4, base=base)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".md"):
            assert str(sd_folder.parent) not in path.read_text()


def test_the_model_card_tells_how_to_load_it(tmp_path):
    _save(tmp_path, "lcm", _student())
    card = (tmp_path / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "num_inference_steps=4" in card
    assert "- a: b" in card
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == "LCMScheduler"
