"""Pins the flow-matching families to their own pipelines."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxPipeline
from prompted import bound, noise_of, ours, theirs
from tiny import LATENT, save_pipeline

from ddil_ray.config import RunConfig
from ddil_ray.errors import ConfigError
from ddil_ray.models import load_model
from ddil_ray.models.flux import pack, unpack
from ddil_ray.training.recipe import Recipe

WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}
SIGMAS = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("negative", [None, "blurred"])
def test_stable_diffusion_3_steps_as_its_pipeline(tmp_path, negative, scale):
    folder = save_pipeline("sd3", tmp_path)
    model = bound(folder, negative=negative)
    noise = noise_of(model)
    call = {"guidance_scale": scale, "negative_prompt": [negative or ""] * 3}
    expected = theirs(folder, noise, sigmas=SIGMAS, **call)
    torch.testing.assert_close(ours(model, noise, steps=4, guidance_scale=scale), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_stable_diffusion_3_without_t5_and_with_a_dynamic_shift_steps_as_its_pipeline(tmp_path, kind):
    scheduler = {"use_dynamic_shifting": True, "time_shift_type": kind, "base_shift": 0.7, "max_shift": 1.4}
    folder = save_pipeline("sd3", tmp_path, t5=False, **scheduler)
    model = bound(folder)
    noise = noise_of(model)
    expected = theirs(folder, noise, sigmas=SIGMAS, guidance_scale=3.0, parts=WITHOUT_T5)
    torch.testing.assert_close(ours(model, noise, steps=4, guidance_scale=3.0), expected, rtol=0, atol=2e-4)


def flux_call(noise):
    height, width = noise.shape[-2:]
    return {"height": 2 * height, "width": 2 * width, "num_inference_steps": 4}


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_flux_dev_steps_as_its_pipeline(tmp_path, scale):
    folder = save_pipeline("flux", tmp_path)
    model = bound(folder)
    assert model.null_cond is None
    assert model.reads_guidance
    noise = noise_of(model)
    expected = theirs(folder, pack(noise), guidance_scale=scale, **flux_call(noise))
    torch.testing.assert_close(
        ours(model, noise, steps=4, guidance_scale=scale), unpack(expected, LATENT, LATENT), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize(("scale", "negative"), [(1.0, None), (3.0, None), (3.0, "blurred")])
def test_flux_schnell_steps_as_its_pipeline(tmp_path, scale, negative):
    folder = save_pipeline("flux_schnell", tmp_path)
    model = bound(folder, negative=negative)
    assert not model.reads_guidance
    noise = noise_of(model)
    call = {"true_cfg_scale": scale, "negative_prompt": [negative or ""] * 3}
    expected = theirs(folder, pack(noise), **call, **flux_call(noise))
    torch.testing.assert_close(
        ours(model, noise, steps=4, guidance_scale=scale), unpack(expected, LATENT, LATENT), rtol=0, atol=2e-4
    )


def test_flux_dev_of_another_size_steps_as_its_pipeline(tmp_path):
    folder = save_pipeline("flux", tmp_path)
    square = bound(folder)
    model = square.resized((16, 40))
    assert model.sample_shape == (16, 16, 40)
    assert model.schedule.shift > square.schedule.shift
    noise = noise_of(model)
    expected = theirs(folder, pack(noise), guidance_scale=3.5, **flux_call(noise))
    torch.testing.assert_close(
        ours(model, noise, steps=4, guidance_scale=3.5), unpack(expected, 16, 40), rtol=0, atol=2e-4
    )


def test_tokens_of_latents_are_those_of_the_pipeline():
    latents = torch.randn(2, 16, 6, 10)
    tokens = FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 6, 10), FluxPipeline._unpack_latents(tokens, 12, 20, 2))


def test_flux_dev_has_the_published_shift_at_a_megapixel(tmp_path):
    model = load_model(str(save_pipeline("flux", tmp_path))).resized((128, 128))
    assert model.schedule.shift == pytest.approx(math.exp(1.15))


def test_sizes_that_a_transformer_cannot_make_are_refused(tmp_path):
    model = load_model(str(save_pipeline("sd3", tmp_path)))
    assert model.resized((8, 16)).sample_shape == (16, 8, 16)
    with pytest.raises(ConfigError, match=r"`teacher.sample_size` must be at most 16 x 16.*\[8, 18\]"):
        model.resized((8, 18))
    with pytest.raises(ConfigError, match=r"`teacher.sample_size` must be a multiple .* 2 x 2 .*\[7, 8\]"):
        model.resized((7, 8))


def test_a_config_may_choose_the_size_of_samples(tmp_path):
    folder = save_pipeline("flux", tmp_path)
    config = {"name": "n", "data": {"source": "given"}, "objective": {"type": "lcm"}}
    teacher = {"model": str(folder), "sample_size": [4, 16]}
    assert Recipe(RunConfig.model_validate({**config, "teacher": teacher})).load_teacher().sample_shape == (16, 4, 16)
    teacher["model"] = "ddil_ray.testing:tiny_model"
    with pytest.raises(ConfigError, match=r"`teacher.sample_size` must be left out .*\[4, 16\]"):
        Recipe(RunConfig.model_validate({**config, "teacher": teacher})).load_teacher()


def test_a_transformer_that_reads_more_than_latents_is_refused(tmp_path):
    folder = save_pipeline("flux", tmp_path)
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.transformer = type(pipeline.transformer).from_config({**pipeline.transformer.config, "out_channels": 32})
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"reads 64 and predicts 32"):
        load_model(str(tmp_path / "other"))


def test_a_scheduler_of_another_kind_is_refused(tmp_path):
    folder = save_pipeline("sd3", tmp_path)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"))
    with pytest.raises(ConfigError, match=r"scheduler of flow matching, but has DDIMScheduler"):
        load_model(str(folder))


def test_a_discriminator_reads_image_tokens(tmp_path):
    for family, tokens in {"sd3": 16, "flux": 16}.items():
        model = bound(save_pipeline(family, tmp_path / family))
        seen = []
        model.network.get_submodule(model.bottleneck).register_forward_hook(
            lambda *call, seen=seen: seen.append(call[2])
        )
        ours(model, noise_of(model), steps=4, guidance_scale=1.0)
        assert seen[0].shape[:2] == (3, tokens)
