"""Pins every kind of feature network, and what is said where one cannot be had."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from folders import MEAN, STD, save_preprocessor, vit_folder

from ddil_ray.data import ImageData, load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import load_features, train_features
from ddil_ray.evaluation.preprocess import load_preprocessing
from ddil_ray.prompts import HeldEmbeddings

DATA = load_images("digits")
USERS = """
import torch
class Corners(torch.nn.Module):
    def forward(self, images):
        return images[:, 0, ::7, ::7].flatten(1)
def corners(): return Corners()
def maps(): return torch.nn.Identity()
def colours_only(): return torch.nn.Conv2d(3, 4, 1)
def dictionary(): return {}
class Masking(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1) * torch.rand(1)
def masking(): return Masking()
def needs_more(size): return Corners()
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_features.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_features"
    sys.modules.pop("users_features", None)


def test_auto_is_trained_the_same_twice_and_says_how_good_it_is():
    a, b = train_features(DATA, epochs=2), train_features(DATA, epochs=2)
    assert torch.equal(a(DATA.images[:10]), b(DATA.images[:10]))
    assert a(DATA.images[:10]).shape == (10, 64)
    assert "% on held-out images" in a.name


def test_auto_without_labels_is_random_and_says_so():
    unlabelled = ImageData(DATA.images[:50], torch.full((50,), -1), "mine")
    assert "random" in load_features("auto", unlabelled).name


def test_auto_learns_the_words_of_prompts_where_there_are_no_classes():
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    prompts = HeldEmbeddings({}, [f"the digit {word}, by hand" for word in words])
    network = train_features(replace(DATA, prompts=prompts), epochs=4)
    assert network(DATA.images[:10]).shape == (10, 64)
    found = re.fullmatch(
        r"64 features of a classifier of 10 words of the prompts of digits, (.+)% on held-.*", network.name
    )
    assert found, network.name
    assert float(found[1]) > 80


def test_auto_of_prompts_that_share_no_word_is_random_and_says_so():
    prompts = HeldEmbeddings({}, [f"image{n}" for n in range(50)])
    distinct = ImageData(DATA.images[:50], torch.arange(50), "mine", prompts=prompts)
    assert "random" in load_features("auto", distinct).name


def test_auto_shrinks_large_images():
    large = ImageData(torch.zeros(4, 3, 200, 100), torch.full((4,), -1), "mine")
    network = load_features("auto", large)
    assert network.size == 64
    assert network(large.images).shape == (4, 64)


def test_a_factory_is_the_users_own_network(users_module):
    network = load_features(f"{users_module}:corners", DATA)
    assert network(DATA.images[:9]).tolist() == DATA.images[:9, 0, [0, 0, 7, 7], [0, 7, 0, 7]].tolist()
    assert network.name == f"4 features of {users_module}:corners"
    assert network.size is None


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("dictionary", r"must return a torch.nn.Module, but returned dict instead"),
        ("maps", r"must map images \(N, 1, 8, 8\) to rows \(N, D\), but .* gave shape \(2, 1, 8, 8\)"),
        ("colours_only", r"must map images \(N, 1, 8, 8\) to rows \(N, D\), but .* failed on two images"),
        ("masking", r"the same each time, but .*:masking gave other ones when it was asked again"),
        ("needs_more", r"must name an importable factory without arguments"),
        ("nothing", r"must name an importable factory without arguments"),
    ],
)
def test_a_factory_that_gives_no_features_is_one_message(users_module, factory, expected):
    with pytest.raises(ConfigError, match=rf"`evaluation.features` .*{expected}"):
        load_features(f"{users_module}:{factory}", DATA)


def test_a_folder_gives_the_models_pooled_output_of_its_own_preprocessing(tmp_path):
    model = vit_folder(tmp_path)
    network = load_features(str(tmp_path), DATA)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        expected = model(((images + 1) / 2 - mean) / std).pooler_output
    assert torch.allclose(network(images), expected, atol=1e-6)
    assert network(DATA.images[:3]).shape == (3, 16)  # grey, 8 x 8: repeated and enlarged
    assert (network.size, network.name) == (16, f"16 features of {tmp_path}")


def test_preprocessing_is_read_in_every_form_that_transformers_writes(tmp_path):
    for settings, size in (
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}, 28),
        ({"size": {"shortest_edge": 32}, "crop_size": 24}, 24),
        ({"size": 20}, 20),
        ({"size": {"height": 40, "width": 40}, "crop_size": 24, "do_center_crop": False}, 40),
    ):
        save_preprocessor(tmp_path, **settings)
        assert load_preprocessing(str(tmp_path), field="x").size == size


def test_a_folder_that_is_none_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match=r"`evaluation.features` must be auto, inception.*there is no such folder"):
        load_features("autoo", DATA)
    with pytest.raises(ConfigError, match=r"`evaluation.features` must come with a readable preprocessor_config.json"):
        load_features(str(tmp_path), DATA)
    save_preprocessor(tmp_path)
    with pytest.raises(ConfigError, match=r"`evaluation.features` must be a folder that transformers' AutoModel"):
        load_features(str(tmp_path), DATA)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}))
    with pytest.raises(ConfigError, match=r"`evaluation.features` must state a size"):
        load_features(str(tmp_path), DATA)


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is here")
def test_inception_says_what_to_install():
    with pytest.raises(ConfigError, match=r"inception needs torch-fidelity.*pip install torch-fidelity"):
        load_features("inception", DATA)


def test_inception_weights_must_be_a_file():
    with pytest.raises(ConfigError, match=r"`evaluation.feature_weights` must be a file, but is '/nowhere'"):
        load_features("inception", DATA, weights="/nowhere")


def test_a_folder_without_weights_of_a_pooler_gives_the_class_token_the_same_each_time(tmp_path):
    """As DINO's: transformers would make up the pooler's weights, anew at each load."""
    from transformers import ViTModel

    whole = vit_folder(tmp_path)
    bare = ViTModel(whole.config, add_pooling_layer=False)
    bare.load_state_dict(whole.state_dict(), strict=False)
    bare.save_pretrained(tmp_path)
    first, second = (load_features(str(tmp_path), DATA)(DATA.images[:5]) for _ in range(2))
    assert torch.equal(first, second)
    pixels = load_preprocessing(str(tmp_path), field="f")(DATA.images[:5])
    with torch.no_grad():
        assert torch.allclose(first, bare.eval()(pixels).last_hidden_state[:, 0], atol=1e-6)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    vit_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if "embeddings.cls_token" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"must be a folder with all weights of its model.*lacks 1 of them, embeddings"
    ):
        load_features(str(tmp_path), DATA)
