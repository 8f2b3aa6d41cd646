"""Pins every family to its own diffusers pipeline: the same embeddings, the same steps, the same latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import PIPELINES, save_pipeline

from ddil_ray.diffusion.denoiser import w_from_guidance_scale
from ddil_ray.diffusion.solver import sample
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.models import load_model, student_of
from ddil_ray.prompts import HeldEmbeddings, Prompts

WORDS = ["a red bird", "two boats", "rain"]


def bound(folder, prompts=WORDS, negative=None):
    """The model of a pipeline folder, with its own embeddings of `prompts`."""
    model = load_model(str(folder))
    encoder = model.family.text_encoder(model.folder)
    if encoder is not None:
        model.bind(Prompts(HeldEmbeddings(encoder(prompts)), encoder.negative(negative)).bank())
    return model


def ours(model, noise, *, steps, guidance_scale, guidance_rescale=0.0):
    w = torch.full((len(noise),), w_from_guidance_scale(guidance_scale))
    model.guidance_rescale = guidance_rescale
    denoiser = model.expert(guided=guidance_scale > 1)
    return sample(
        denoiser, noise, times=uniform_grid(steps), cond=torch.arange(len(noise)), w=w, schedule=model.schedule
    )


def noise_of(model):
    return torch.randn(len(WORDS), *model.sample_shape, generator=torch.Generator().manual_seed(3))


def theirs(folder, noise, **call):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=WORDS, latents=noise, output_type="latent", **call).images


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


@pytest.mark.parametrize("family", PIPELINES)
def test_a_new_student_is_its_teacher(tmp_path, family):
    """Oracle 18."""
    teacher = bound(save_pipeline(family, tmp_path))
    student = student_of(teacher)
    student.network.eval()
    x, t, cond = noise_of(teacher), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.arange(3)
    w = torch.tensor([0.0, 2.0, 7.0])
    assert torch.equal(student.denoiser()(x, t, cond, w), teacher.denoiser()(x, t, cond, w))


@pytest.mark.parametrize("family", ["stable_diffusion"])
def test_a_new_student_that_is_told_guidance_does_not_heed_it_yet(tmp_path, family):
    teacher = bound(save_pipeline(family, tmp_path))
    student = student_of(teacher, guidance_embedding=True)
    student.network.eval()
    x, t, cond = noise_of(teacher), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64), torch.arange(3)
    for w in (torch.zeros(3), torch.tensor([1.0, 7.0, 14.0])):
        told = student.denoiser()(x, t, cond, w)
        torch.testing.assert_close(told, teacher.denoiser()(x, t, cond, torch.zeros(3)), rtol=0, atol=1e-6)
