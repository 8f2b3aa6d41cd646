"""Pins what is refused before a run starts."""

from __future__ import annotations

import pytest
from folders import clip_folder
from pydantic import ValidationError

from ddil_ray.config.groups import Evaluation
from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import check_instruments, load_instruments

DATA = load_images("digits")
PROMPTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_clip_needs_prompts():
    with pytest.raises(ValidationError, match="prompts must be given, one per class id"):
        Evaluation(clip="some/model")


@pytest.mark.parametrize("use", [check_instruments, load_instruments])
def test_there_is_one_prompt_per_class(use):
    with pytest.raises(ConfigError, match=r"`evaluation.prompts` must have one prompt per class id, 10 for digits"):
        use(Evaluation(prompts=PROMPTS[:9]), DATA)


@pytest.mark.parametrize("settings", [{"features": "/nowhere"}, {"clip": "/nowhere", "prompts": PROMPTS}])
def test_what_cannot_be_loaded_is_found_by_the_check(settings):
    with pytest.raises(ConfigError, match=r"`evaluation.(features|clip)` must be"):
        check_instruments(Evaluation(**settings), DATA)


def test_everything_that_is_asked_for_is_there(tmp_path):
    clip_folder(tmp_path)
    settings = Evaluation(features=str(tmp_path), clip=str(tmp_path), prompts=PROMPTS)
    check_instruments(settings, DATA)
    found = load_instruments(settings, DATA)
    assert found.features(DATA.images[:3]).shape == (3, 16)  # the vision side of the same folder
    assert found.clip is not None
    assert found.prompts == PROMPTS
