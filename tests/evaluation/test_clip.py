"""Pins the CLIP score to its formula on a small CLIP with random weights (oracle 26: permuted prompts)."""

from __future__ import annotations

import pytest
import torch
from folders import MEAN, STD, clip_folder

from ddil_ray.errors import ConfigError
from ddil_ray.evaluation.clip import load_clip

PROMPTS = ["one red dot", "two", "a cat"]
COND = torch.tensor([0, 1, 2, 0, 2, 1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def model(folder):
    return clip_folder(folder)


@pytest.fixture(scope="module")
def images(model):
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_100_times_the_cosine_of_image_and_prompt(folder, model, images):
    from transformers import CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)([PROMPTS[c] for c in COND], padding=True, return_tensors="pt")
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        output = model(pixel_values=((images + 1) / 2 - mean) / std, **tokens)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(1).clamp(min=0)
    assert float(expected.max()) > 1
    assert load_clip(str(folder), dict(enumerate(PROMPTS)))(images, COND).tolist() == pytest.approx(
        expected.tolist(), abs=1e-4
    )


def test_permuting_the_prompts_changes_it(folder, images):
    right, wrong = (
        load_clip(str(folder), dict(enumerate(prompts)))(images, COND)
        for prompts in (PROMPTS, PROMPTS[1:] + PROMPTS[:1])
    )
    assert float((right - wrong).abs().max()) > 0.01


def test_prompts_of_some_conditions_alone_are_found_by_their_ids(folder, images):
    scores = load_clip(str(folder), {40: "two", 7: "one red dot", 900: "a cat"})(images, torch.tensor([7, 40, 900] * 2))
    by_class = load_clip(str(folder), dict(enumerate(PROMPTS)))(images, torch.tensor([0, 1, 2] * 2))
    assert torch.equal(scores, by_class)


def test_grey_and_small_images_are_scored_too(folder):
    scores = load_clip(str(folder), dict(enumerate(PROMPTS)))(torch.zeros(6, 1, 8, 8), COND)
    assert scores.shape == (6,)
    assert bool(scores.isfinite().all())


def test_a_folder_without_a_clip_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match=r"`evaluation.clip` must be the folder or hub id of a CLIP model"):
        load_clip(str(tmp_path), dict(enumerate(PROMPTS)))
