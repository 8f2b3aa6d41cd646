"""Pins that a text-to-image teacher can be made of captioned images alone, and that it heeds its prompt."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from preparing import encode
from transformers import CLIPTokenizer

from ddil_ray.config.prepare import PrepareData
from ddil_ray.config.text_teacher import Autoencoder, Text, TextTeacherConfig, load_teacher_config
from ddil_ray.errors import ConfigError, DataError
from ddil_ray.models.latents import LatentCodec
from ddil_ray.training.autoencoder import new_autoencoder, psnr, train_autoencoder
from ddil_ray.training.captions import captioned_images
from ddil_ray.training.text_teacher import new_tokenizer, train_text_teacher, without_words

COLOURS = {"a red square": (220, 20, 20), "a blue square": (20, 20, 220)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of pictures in two colours, of 20 x 16 pixels."""
    folder = tmp_path_factory.mktemp("squares")
    lines = []
    for i in range(16):
        caption = list(COLOURS)[i % 2]
        pixels = np.full((20, 16, 3), COLOURS[caption], dtype=np.uint8)
        pixels[i % 16] += 10
        (folder / f"{i}.png").write_bytes(encode(pixels))
        lines.append(f'{{"file_name": "{i}.png", "text": "{caption}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def config(source, **changes):
    """A teacher that learns the two colours whatever its seed is: of 12 seeds the worst reached 0.77 below."""
    tree = {
        "kind": "text-to-image", "name": "squares", "image_size": 8, "data": {"source": str(source)},
        "autoencoder": {
            "block_out_channels": [16, 16], "latent_channels": 2, "norm_num_groups": 4, "steps": 100, "batch_size": 8,
            "lr": 1e-2, "ema_decay": 0.8,
        },
        "text": {"length": 8, "width": 16, "layers": 1, "heads": 2},
        "model": {"block_out_channels": [8, 16], "attention_heads": 2, "norm_num_groups": 4},
        "trainer": {"steps": 150, "batch_size": 16, "lr": 1e-2, "ema_decay": 0.9},
    }  # fmt: skip
    for group, settings in changes.items():
        tree[group] = {**tree[group], **settings} if isinstance(settings, dict) else settings
    return TextTeacherConfig.model_validate(tree)


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """(the pipeline's folder, what was said, records)."""
    said, records, run = [], [], config(source)
    data = captioned_images(run.data, size=run.image_size)
    torch.manual_seed(0)
    pipeline = train_text_teacher(run, data, say=said.append, on_record=records.append)
    folder = tmp_path_factory.mktemp("trained") / "teacher"
    pipeline.save_pretrained(folder)
    return folder, said, records


def test_diffusers_draws_what_the_prompt_says(trained):
    pipeline = DiffusionPipeline.from_pretrained(trained[0])
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in COLOURS for _ in range(8)]
    call = {"num_inference_steps": 8, "guidance_scale": 2.0, "generator": torch.manual_seed(0), "output_type": "np"}
    images = pipeline(prompts, **call).images
    red, blue = (images[rows].mean((0, 1, 2)) for rows in (slice(0, 8), slice(8, 16)))
    assert red[0] - red[2] > 0.3
    assert blue[2] - blue[0] > 0.3


def test_one_is_told_how_good_the_autoencoder_is_and_how_training_goes(trained):
    _, said, records = trained
    assert "16 images" in said[0]
    assert "dB" in said[1]
    assert [r["step"] for r in records] == [50, 100, 50, 100, 150]
    assert records[-1]["loss"] < records[2]["loss"]


def test_latents_have_a_deviation_of_one_and_images_are_kept(source):
    images = captioned_images(PrepareData(source=str(source)), size=8).images
    settings = config(source).autoencoder
    vae = new_autoencoder(settings, size=8)
    before = psnr(LatentCodec(vae.eval()), images)
    codec = LatentCodec(train_autoencoder(vae, images, settings, seed=0, on_record=lambda record: None))
    assert codec.encode(images).std() == pytest.approx(1, abs=1e-4)
    assert psnr(codec, images) > before + 6


def test_psnr_is_that_of_the_mean_squared_error():
    class OneOff(LatentCodec):
        def __init__(self):
            pass

        def encode(self, images):
            return images

        def decode(self, latents):
            return latents + 0.2

    assert psnr(OneOff(), torch.zeros(200, 3, 4, 4)) == pytest.approx(20)  # 10 log10 (2^2 / 0.2^2)


def test_captions_lose_words_as_often_as_asked():
    chance, caption = random.Random(0), "a cat with a red hat"
    assert all(without_words(caption, 0.0, chance) == caption for _ in range(20))
    assert without_words(caption, 1.0, random.Random(3)).split() == ["cat", "red", "hat"]
    lost = [without_words(caption, 0.5, chance) != caption for _ in range(400)]
    assert 160 < sum(lost) < 240  # 0.5 (1 - 2^-6) of 400, within 4 deviations


def test_words_of_the_captions_are_one_token_and_others_are_spelt(tmp_path):
    tokenizer = new_tokenizer(["red bird", "red boat", "two birds", "two boats"] * 4, Text(length=8))
    assert tokenizer.tokenize("Red boats") == ["red</w>", "boats</w>"]
    assert "".join(tokenizer.tokenize("tie")) == "tie</w>"
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again("red bird", padding="max_length").input_ids == tokenizer("red bird", padding="max_length").input_ids
    assert len(again("red bird", padding="max_length").input_ids) == 8


def test_the_shipped_emoji_can_be_named():
    data = captioned_images(PrepareData(source="emoji"), size=32)
    assert data.images.shape == (1892, 3, 32, 32)
    assert data.captions[0] == "grinning face"


def test_prompts_alone_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(DataError, match=r"`data.source` must hold images, but .* holds prompts alone"):
        captioned_images(PrepareData(source=str(tmp_path)), size=8)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_size": 9}, r"`image_size` must be a multiple of 2, .* but is 9"),
        ({"autoencoder": {"norm_num_groups": 3}}, r"`autoencoder` must describe an AutoencoderKL"),
        ({"model": {"block_out_channels": [8, 8, 8, 8]}}, r"`model.block_out_channels` must halve the latents 3 times"),
        ({"model": {"norm_num_groups": 5}}, r"`model` must describe a UNet2DConditionModel"),
    ],
)
def test_networks_that_cannot_be_are_one_message(source, changes, expected):
    run = config(source, **changes)
    data = captioned_images(run.data, size=run.image_size)
    with pytest.raises(ConfigError, match=expected):
        train_text_teacher(run, data, say=print, on_record=print)


def test_settings_that_cannot_be_are_found_when_they_are_read():
    with pytest.raises(ConfigError, match=r"`text.width` must be a multiple of heads, 3, but is 64"):
        load_teacher_config("emoji-teacher", ["text.heads=3"])
    with pytest.raises(ConfigError, match=r"`trainer.setps` is not a setting .* Did you mean `trainer.steps`"):
        load_teacher_config("emoji-teacher", ["trainer.setps=3"])
    for teacher in ("emoji-teacher", "digits-teacher"):
        with pytest.raises(ConfigError, match=r"`schedule.prediction_type` must be .*zero_snr.*epsilon"):
            load_teacher_config(teacher, ["schedule.prediction_type=epsilon"])
    with pytest.raises(ConfigError, match=r"`model.attention_heads` must be at most the last of .*, 128, but is 129"):
        load_teacher_config("emoji-teacher", ["model.attention_heads=129"])
    with pytest.raises(ConfigError, match=r"`model.attention_head_dim` must be at most the last of .*, 32, but is 64"):
        load_teacher_config("digits-teacher", ["model.attention_head_dim=64"])
    with pytest.raises(ConfigError, match=r"`kind` must be 'image'"):
        load_teacher_config("emoji-teacher", ["kind=video"])


def test_an_autoencoder_halves_as_often_as_it_has_blocks():
    vae = new_autoencoder(Autoencoder(block_out_channels=(8, 8, 8)), size=32)
    assert vae.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mode().shape == (1, 8, 8, 8)
