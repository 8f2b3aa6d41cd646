"""Pins every family to its own diffusers pipeline: the same embeddings, the same steps, the same latents."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from prompted import bound, noise_of, ours, theirs
from tiny import PIPELINES, save_pipeline

from ddil_ray.errors import ConfigError
from ddil_ray.export import ddim_scheduler
from ddil_ray.models import load_model, student_of


@pytest.mark.parametrize("negative", [None, "blurred"])
@pytest.mark.parametrize("scheduler", [{}, {"prediction_type": "v_prediction"}])
def test_stable_diffusion_steps_as_its_pipeline(tmp_path, scheduler, negative):
    folder = save_pipeline("stable_diffusion", tmp_path, **scheduler)
    model = bound(folder, negative=negative)
    noise = noise_of(model)
    expected = theirs(folder, noise, num_inference_steps=4, guidance_scale=4.0, negative_prompt=[negative or ""] * 3)
    torch.testing.assert_close(ours(model, noise, steps=4, guidance_scale=4.0), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_is_rescaled_as_its_pipeline_does(tmp_path, prediction_type):
    folder = save_pipeline("stable_diffusion", tmp_path, prediction_type=prediction_type)
    model, call = bound(folder), {"guidance_scale": 6.0, "guidance_rescale": 0.7}
    noise = noise_of(model)
    expected = theirs(folder, noise, num_inference_steps=4, **call)
    torch.testing.assert_close(ours(model, noise, steps=4, **call), expected, rtol=0, atol=2e-4)
    assert float((ours(model, noise, steps=4, guidance_scale=6.0) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("negative", [None, "blurred"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [("sdxl", {}), ("sdxl", {"zeros": False}), ("ssd1b", {"prediction_type": "v_prediction"})],
)
def test_sdxl_steps_as_its_pipeline(tmp_path, family, settings, negative):
    """On latents that are no square, of which the network is told the sizes."""
    folder = save_pipeline(family, tmp_path, **settings)
    model = bound(folder, negative=negative)
    noise = torch.randn(3, 4, 8, 12)
    size = {"height": 16, "width": 24}
    expected = theirs(folder, noise, num_inference_steps=4, guidance_scale=4.0, negative_prompt=negative, **size)
    torch.testing.assert_close(ours(model, noise, steps=4, guidance_scale=4.0), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_steps_as_its_pipeline(tmp_path, guidance_scale):
    """Whose pipeline draws the noise itself, and gives images alone."""
    folder = save_pipeline("dit", tmp_path)
    model = load_model(str(folder))
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        class_labels=[0, 1, 2], num_inference_steps=4, guidance_scale=guidance_scale, output_type="pt",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    latents = ours(model, noise_of(model), steps=4, guidance_scale=guidance_scale)
    images = (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", PIPELINES)
def test_a_new_student_is_its_teacher(tmp_path, family):
    """Oracle 18."""
    teacher = bound(save_pipeline(family, tmp_path))
    student = student_of(teacher)
    student.network.eval()
    x, t, cond = noise_of(teacher), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.arange(3)
    w = torch.tensor([0.0, 2.0, 7.0])
    assert torch.equal(student.denoiser()(x, t, cond, w), teacher.denoiser()(x, t, cond, w))


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl", "ssd1b"])
def test_a_new_student_that_is_told_guidance_does_not_heed_it_yet(tmp_path, family):
    teacher = bound(save_pipeline(family, tmp_path))
    student = student_of(teacher, guidance_embedding=True)
    student.network.eval()
    x, t, cond = noise_of(teacher), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.arange(3)
    for w in (torch.zeros(3), torch.tensor([1.0, 7.0, 14.0])):
        told = student.denoiser()(x, t, cond, w)
        torch.testing.assert_close(told, teacher.denoiser()(x, t, cond, torch.zeros(3)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_a_folder_whose_network_is_told_guidance_is_loaded_so(tmp_path, family):
    """As published LCM checkpoints are."""
    student = student_of(bound(save_pipeline(family, tmp_path)), guidance_embedding=True)
    torch.nn.init.normal_(student.network.denoiser.time_embedding.cond_proj.weight)
    student.family.pipeline(student, ddim_scheduler(student), w=0).save_pretrained(tmp_path / "student")
    student.network.eval()
    loaded = bound(tmp_path / "student")
    assert loaded.reads_guidance
    x, t, cond = noise_of(student), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.arange(3)
    w = torch.tensor([1.0, 7.0, 14.0])
    assert torch.equal(loaded.denoiser()(x, t, cond, w), student.denoiser()(x, t, cond, w))
    noise = noise_of(loaded)
    expected = theirs(tmp_path / "student", noise, num_inference_steps=4, guidance_scale=4.0)
    torch.testing.assert_close(ours(loaded, noise, steps=4, guidance_scale=4.0), expected, rtol=0, atol=2e-4)


def test_a_dit_student_in_training_sees_the_labels_it_is_given(tmp_path):
    """diffusers would replace one in ten by the null class."""
    model = load_model(str(save_pipeline("dit", tmp_path)))
    x, t, cond = torch.randn(64, *model.sample_shape), torch.full((64,), 0.5).double(), torch.arange(64)
    with torch.no_grad():
        asked = model.denoiser()(x, t, cond, torch.zeros(64))
        model.network.train()
        assert torch.equal(model.denoiser()(x, t, cond, torch.zeros(64)), asked)


def _rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_old_dit_is_loaded_and_its_student_keeps_the_names_of_classes(tmp_path):
    """DiT's own checkpoints are of the class that it had in diffusers before."""
    folder = save_pipeline("dit", tmp_path)
    new = load_model(str(folder))
    _rewrite(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    _rewrite(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    model = load_model(str(folder))
    x, t, cond = noise_of(model), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.arange(3)
    assert torch.equal(model.denoiser()(x, t, cond, torch.zeros(3)), new.denoiser()(x, t, cond, torch.zeros(3)))
    model.family.pipeline(model, ddim_scheduler(model), w=0).save_pretrained(tmp_path / "student")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipeline, DiTPipeline)
    assert pipeline.get_label_ids(["class 7", "number 12"]) == [7, 12]


def test_pipelines_of_no_known_kind_are_refused(tmp_path):
    refiner = save_pipeline("sdxl", tmp_path / "refiner")
    (refiner / "text_encoder").rename(tmp_path / "away")
    painter = save_pipeline("stable_diffusion", tmp_path / "painter", unet={"in_channels": 9})
    ten_classes = save_pipeline("dit", tmp_path / "ten", classes=10)
    pixart = save_pipeline("dit", tmp_path / "pixart")
    _rewrite(pixart / "transformer" / "config.json", norm_type="ada_norm_single")
    for folder, expected in (
        (refiner, r"an SDXL pipeline with both text encoders, but .* has no text_encoder, as a refiner"),
        (painter, r"reads 9 and predicts 4"),
        (ten_classes, r"`num_embeds_ada_norm` of a DiT transformer must be 1000, .* but is 10 in"),
        (pixart, r"`norm_type` of a DiTTransformer2DModel must be 'ada_norm_zero', .* but is 'ada_norm_single'"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_model(str(folder))
