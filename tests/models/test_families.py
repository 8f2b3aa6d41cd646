"""Pins every family to its own diffusers pipeline: the same embeddings, the same steps, the same latents."""

from __future__ import annotations

import pytest
import torch
from prompted import bound, noise_of, ours, theirs
from tiny import PIPELINES, save_pipeline

from ddil_ray.models import student_of


@pytest.mark.parametrize("negative", [None, "blurred"])
@pytest.mark.parametrize("scheduler", [{}, {"prediction_type": "v_prediction"}])
def test_stable_diffusion_steps_as_its_pipeline(tmp_path, scheduler, negative):
    folder = save_pipeline("stable_diffusion", tmp_path, **scheduler)
    model = bound(folder, negative=negative)
    noise = noise_of(model)
    expected = theirs(folder, noise, num_inference_steps=4, guidance_scale=4.0, negative_prompt=[negative or ""] * 3)
    torch.testing.assert_close(ours(model, noise, steps=4, guidance_scale=4.0), expected, rtol=0, atol=2e-4)


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
