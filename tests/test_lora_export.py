"""Pins exported adapters: fused they are a student like any other, alone diffusers puts them onto the base pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler, DiffusionPipeline
from tiny import PIPELINES
from worlds import WORDS, asked, moved, tiny_teacher

from ddil_ray.export import save_model_folder
from ddil_ray.models import Lora, load_model, student_of
from ddil_ray.models.unet import new_unet, unet_model
from ddil_ray.testing import tiny_model

LORA = Lora(rank=2, alpha=3)


def save(folder, student):
    save_model_folder(folder, student, name="s", description="d", steps=4)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("family", PIPELINES)
def test_adapters_load_onto_the_base_pipeline_with_their_alpha(tmp_path, family):
    teacher = tiny_teacher(family, tmp_path)
    student = moved(student_of(teacher, lora=LORA))
    card = save(tmp_path / "student", student)
    fused = load_model(str(tmp_path / "student"))
    fused.bind(getattr(teacher.network, "bank", None))
    torch.testing.assert_close(asked(fused), asked(student), rtol=1e-4, atol=1e-4)
    base = DiffusionPipeline.from_pretrained(teacher.folder)
    if not hasattr(base, "load_lora_weights"):
        assert "diffusers loads none" in card
        assert not (tmp_path / "student" / "lora").exists()
        return
    assert "load_lora_weights" in card
    base.load_lora_weights(tmp_path / "student" / "lora")
    loaded = teacher.copy()
    loaded.network.denoiser = getattr(base, teacher.family.component)
    torch.testing.assert_close(asked(loaded), asked(student), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(asked(loaded), asked(teacher), atol=1e-2)


def test_the_base_pipeline_with_adapters_samples_what_the_student_samples(tmp_path):
    teacher = tiny_teacher("stable_diffusion", tmp_path)
    save(tmp_path / "student", moved(student_of(teacher, lora=LORA)))
    student, base = (DiffusionPipeline.from_pretrained(f) for f in (tmp_path / "student", teacher.folder))
    base.scheduler = student.scheduler
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def images(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return torch.from_numpy(
            pipeline(prompt=WORDS, latents=noise, num_inference_steps=2, guidance_scale=1.0, output_type="np").images
        )

    without = images(base)
    base.load_lora_weights(tmp_path / "student" / "lora")
    torch.testing.assert_close(images(base), images(student), rtol=0, atol=1e-4)
    assert float((images(base) - without).abs().max()) > 1e-2


def test_families_without_adapters_in_diffusers_are_exported_fused_and_say_so(tmp_path):
    unet = new_unet(sample_shape=(1, 8, 8), num_classes=10, block_out_channels=(8, 16))
    student = moved(student_of(unet_model(unet, dict(DDIMScheduler().config)), lora=LORA))
    card = save(tmp_path, student)
    assert "fused into the network" in card
    assert "diffusers loads none" in card
    assert not (tmp_path / "lora").exists()
    torch.testing.assert_close(asked(load_model(str(tmp_path))), asked(student), rtol=1e-4, atol=1e-4)
    assert ConsistencyModelPipeline.from_pretrained(tmp_path).unet.config.num_class_embeds == 11


def test_adapters_on_a_factorys_network_are_exported_fused(tmp_path):
    student = moved(student_of(tiny_model(), lora=Lora(rank=2, target_modules=("inside", "outside"))))
    assert "fused into the network" in save(tmp_path, student)
    loaded = load_model("ddil_ray.testing:tiny_model", weights=str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(asked(loaded), asked(student), rtol=1e-4, atol=1e-4)
