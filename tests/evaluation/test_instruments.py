"""Pins what is refused before a run starts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from folders import clip_folder

from ddil_ray.config.groups import Evaluation
from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import check_instruments, load_instruments
from ddil_ray.prompts import HeldEmbeddings
from ddil_ray.testing import tiny_model

DATA = load_images("digits")
PROMPTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTED = replace(DATA, prompts=HeldEmbeddings({}, PROMPTS))


def _check(settings, data):
    check_instruments(settings, data, tiny_model())


@pytest.mark.parametrize("use", [_check, load_instruments])
def test_a_clip_needs_prompts(use):
    with pytest.raises(ConfigError, match=r"`evaluation.prompts` must be given, one per class id"):
        use(Evaluation(clip="some/model"), DATA)


@pytest.mark.parametrize("use", [_check, load_instruments])
def test_there_is_one_prompt_per_class(use):
    with pytest.raises(ConfigError, match=r"`evaluation.prompts` must have one prompt per class id, 10 for digits"):
        use(Evaluation(prompts=PROMPTS[:9]), DATA)


@pytest.mark.parametrize("use", [_check, load_instruments])
def test_data_of_prompts_brings_its_own(use):
    with pytest.raises(ConfigError, match=r"`evaluation.prompts` must be left out for data of prompts"):
        use(Evaluation(prompts=PROMPTS), PROMPTED)


def test_a_clip_is_told_the_prompts_of_the_data_alone_that_are_measured(tmp_path):
    clip_folder(tmp_path)
    few = replace(PROMPTED, images=PROMPTED.images[3:5], labels=PROMPTED.labels[3:5])
    found = load_instruments(Evaluation(features=str(tmp_path), clip=str(tmp_path)), few)
    assert found.prompts == {int(id_): PROMPTS[id_] for id_ in few.labels}
    assert found.clip is not None
    assert found.clip.conditions.tolist() == sorted(found.prompts)


@pytest.mark.parametrize("settings", [{"features": "/nowhere"}, {"clip": "/nowhere", "prompts": PROMPTS}])
def test_what_cannot_be_loaded_is_found_by_the_check(settings):
    with pytest.raises(ConfigError, match=r"`evaluation.(features|clip)` must be"):
        _check(Evaluation(**settings), DATA)


def test_everything_that_is_asked_for_is_there(tmp_path):
    clip_folder(tmp_path)
    settings = Evaluation(features=str(tmp_path), clip=str(tmp_path), prompts=PROMPTS)
    _check(settings, DATA)
    found = load_instruments(settings, DATA)
    assert found.features(DATA.images[:3]).shape == (3, 16)  # the vision side of the same folder
    assert found.clip is not None
    assert found.prompts == dict(enumerate(PROMPTS))
