"""Pins which models can be students of a teacher, and why another cannot."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from runs import small_run
from tiny import save_pipeline
from worlds import WORDS, asked, tiny_teacher

from ddil_ray.diffusion.schedule import CosineVP, schedule_from_diffusers
from ddil_ray.diffusion.solver import sample
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.errors import ConfigError
from ddil_ray.export import student_scheduler
from ddil_ray.models import load_model
from ddil_ray.models.match import check_pipelines, check_student, load_measured, load_student
from ddil_ray.models.unet import new_unet
from ddil_ray.testing import tiny_model
from ddil_ray.training.recipe import Recipe


@pytest.fixture
def teacher(tmp_path):
    (tmp_path / "teacher").mkdir()
    return tiny_teacher("stable_diffusion", tmp_path / "teacher")


def saved(tmp_path, **scheduler):
    (tmp_path / "student").mkdir()
    return tiny_teacher("stable_diffusion", tmp_path / "student", **scheduler).folder


def edited(folder, component, **changes):
    path = folder / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def test_a_student_of_another_prediction_type_converts_by_its_own(tmp_path, teacher):
    """Where it starts it samples as its own pipeline does, on the teacher's prompts."""
    folder = saved(tmp_path, prediction_type="v_prediction")
    student = load_student(str(folder), teacher)
    assert (teacher.prediction.value, student.prediction.value) == ("epsilon", "v_prediction")
    assert student.network.bank is teacher.network.bank
    noise = torch.randn(3, *student.sample_shape, generator=torch.Generator().manual_seed(3))
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=WORDS, latents=noise, num_inference_steps=4, guidance_scale=1.0, output_type="latent"
    ).images
    ours = sample(
        student.denoiser(), noise, times=uniform_grid(4), cond=torch.arange(3), w=torch.zeros(3),
        schedule=student.schedule,
    )  # fmt: skip
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=2e-4)


def test_a_smaller_student_has_the_rest_of_its_pipeline_from_the_teacher(tmp_path, teacher):
    folder = saved(tmp_path)
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "mid_block_type": None}).save_pretrained(folder / "unet")
    student = load_student(str(folder), teacher)
    assert asked(student).shape == asked(teacher).shape
    sizes = [sum(p.numel() for p in m.network.parameters()) for m in (student, teacher)]
    assert sizes[0] < sizes[1]
    assert student.folder == teacher.folder
    assert student.bottleneck != teacher.bottleneck


def test_a_student_takes_the_size_that_its_teacher_is_asked_for(tmp_path):
    teacher = load_model(str(save_pipeline("sdxl", tmp_path / "teacher"))).resized((12, 8))
    student = load_student(str(save_pipeline("ssd1b", tmp_path / "student")), teacher)
    assert student.sample_shape == (4, 12, 8)


@pytest.mark.parametrize(
    ("component", "changes", "expected"),
    [
        ("vae", {"scaling_factor": 0.13025}, r"latents, scaling 0.5, shift 0.0, but has scaling 0.13025, shift 0.0"),
        ("vae", {"shift_factor": 0.1}, r"latents, .* but has scaling 0.5, shift 0.1"),
        ("text_encoder", {"hidden_size": 32}, r"text encoders \(by width\), text_encoder 16, but has text_encoder 32"),
    ],
)
def test_pipelines_of_another_world_are_refused(tmp_path, teacher, component, changes, expected):
    with pytest.raises(ConfigError, match=f"`student.model` must have the teacher's {expected}"):
        load_student(edited(saved(tmp_path), component, **changes), teacher)


def test_another_set_of_text_encoders_is_refused(tmp_path, teacher):
    folder = saved(tmp_path)
    (folder / "text_encoder_2").mkdir()
    (folder / "text_encoder_2" / "config.json").write_text(json.dumps({"d_model": 64}))
    with pytest.raises(ConfigError, match=r"text_encoder 16, but has text_encoder 16, text_encoder_2 64 instead"):
        load_student(str(folder), teacher)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [({"beta_end": 0.02}, "alpha"), ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "alpha")],
)
def test_another_schedule_is_refused(tmp_path, teacher, scheduler, expected):
    folder = saved(tmp_path)
    config = DDIMScheduler.load_config(folder / "scheduler")
    DDIMScheduler.from_config({**config, **scheduler}).save_pretrained(folder / "scheduler")
    with pytest.raises(ConfigError, match=rf"teacher's noise schedule, whose {expected} at t = .* instead"):
        load_student(str(folder), teacher)


def test_conventions_for_the_clean_end_are_no_difference(tmp_path, teacher):
    folder = saved(tmp_path)
    config = DDIMScheduler.load_config(folder / "scheduler")
    DDIMScheduler.from_config({**config, "set_alpha_to_one": False}).save_pretrained(folder / "scheduler")
    student = load_student(str(folder), teacher)
    assert student.schedule is teacher.schedule
    exported = schedule_from_diffusers(student_scheduler(student, torch.tensor([1.0, 0.5, 0.0]), None).config)
    assert torch.equal(exported.alpha(torch.zeros(1)), teacher.schedule.alpha(torch.zeros(1)))  # which it has learned


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sample_shape": (1, 8, 9)}, "sample shape"),
        ({"num_conditions": 12}, "number of classes, 11, but has 12 instead"),
        ({"num_conditions": None, "prompted": True}, "kind of conditions, classes, but has prompts instead"),
        ({"num_conditions": None}, "kind of conditions, classes, but has none instead"),
        ({"schedule": CosineVP()}, ""),
    ],
)
def test_models_of_factories_are_checked_as_far_as_they_tell(changes, expected):
    teacher = tiny_model()
    student = replace(teacher, **changes)
    if not expected:
        check_student(student, teacher)
        return
    with pytest.raises(ConfigError, match=f"`student.model` must have the teacher's {expected}"):
        check_student(student, teacher)


@pytest.mark.parametrize(
    ("component", "changes", "expected"),
    [
        ("vae", {"scaling_factor": 0.13025}, r"teacher's latents, scaling 0.5, shift 0.0, but has scaling 0.13025"),
        ("unet", {"in_channels": 8, "out_channels": 8}, r"teacher's number of channels, 4, but has 8 instead"),
        ("text_encoder", {"hidden_size": 32}, r"text encoders \(by width\), text_encoder 16, but has text_encoder 32"),
        ("scheduler", {"beta_end": 0.02}, r"teacher's noise schedule, whose alpha at t = "),
        ("scheduler", {"prediction_type": "score"}, r"`prediction_type` .* but is 'score' instead"),
        ("scheduler", {"beta_schedule": "odd"}, r"`beta_schedule` .* but is 'odd' instead"),
    ],
)
def test_config_files_that_do_not_match_are_refused_before_weights_are_there(tmp_path, component, changes, expected):
    """Row `teacher vs student`: neither pipeline has weights, so nothing could have been loaded."""
    folders = []
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        folders.append(save_pipeline("stable_diffusion", tmp_path / name))
    check_pipelines(*map(str, folders))
    for folder in folders:
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    path = folders[1] / component / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=expected):
        check_pipelines(str(folders[1]), str(folders[0]))


def test_a_run_compares_config_files_first(tmp_path):
    for name in ("teacher", "student"):
        (tmp_path / name).mkdir()
        folder = save_pipeline("stable_diffusion", tmp_path / name)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
    edited(tmp_path / "student" / "pipeline", "vae", scaling_factor=0.1)
    models = {"teacher": {"model": str(tmp_path / "teacher" / "pipeline")}}
    run = small_run(**models, student={"model": str(tmp_path / "student" / "pipeline")})
    with pytest.raises(ConfigError, match=r"`student.model` must have the teacher's latents"):
        Recipe(run).ingredients()


def test_a_denoiser_that_reads_other_latents_than_its_autoencoder_makes_is_refused(tmp_path):
    folder = save_pipeline("stable_diffusion", tmp_path)
    edited(folder, "vae", latent_channels=16)
    with pytest.raises(ConfigError, match=r"`teacher.model` .* unet reads .* latents of 16 channels, but .* reads 4"):
        load_model(str(folder))


@pytest.mark.parametrize("family", ["sdxl", "dit", "sd3", "flux"])
def test_pipelines_of_every_family_read_their_own_latents_and_match_themselves(tmp_path, family):
    folder = str(save_pipeline(family, tmp_path))
    assert load_model(folder).latent
    check_pipelines(folder, folder)


def test_pixels_are_no_latents(tmp_path, teacher):
    unet = new_unet(sample_shape=(4, 8, 8), num_classes=None, block_out_channels=(8, 16))
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pixels")
    with pytest.raises(ConfigError, match=r"teacher's latents, scaling 0.5, shift 0.0, but has pixels instead"):
        load_student(str(tmp_path / "pixels"), teacher)


def test_a_model_is_measured_against_a_teacher_of_its_own_world_only(tmp_path, teacher):
    unet = new_unet(sample_shape=(4, 8, 8), num_classes=None, block_out_channels=(8, 16))
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "pixels")
    with pytest.raises(ConfigError, match=r"MODEL must have the teacher's latents, .* but has pixels instead"):
        load_measured(str(tmp_path / "pixels"), teacher)
    with pytest.raises(ConfigError, match=r"MODEL must be a diffusers pipeline folder"):
        load_measured(str(tmp_path), teacher)
    folder = saved(
        tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )  # its own schedule is no fault
    assert load_measured(str(folder), teacher).network.bank is teacher.network.bank


def test_what_cannot_be_loaded_is_said_of_the_student(tmp_path):
    with pytest.raises(ConfigError, match=r"`student.model` must be a diffusers pipeline folder") as caught:
        load_student(str(tmp_path), tiny_model())
    assert "teacher.model" not in str(caught.value)


def test_epsilon_without_terminal_signal_is_refused_of_a_student_too(tmp_path, teacher):
    folder = saved(tmp_path)
    config = DDIMScheduler.load_config(folder / "scheduler")
    DDIMScheduler.from_config({**config, "rescale_betas_zero_snr": True}).save_pretrained(folder / "scheduler")
    with pytest.raises(ConfigError, match=r"`prediction_type`.*zero terminal SNR"):
        load_student(str(folder), load_model(str(teacher.folder)))
