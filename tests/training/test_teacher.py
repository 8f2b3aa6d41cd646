"""Pins teacher training: it learns, and it survives few steps."""

from __future__ import annotations

import pytest

from ddil_ray.config import TeacherConfig, load_config
from ddil_ray.errors import ConfigError, DataError
from ddil_ray.training.teacher import new_teacher, teacher_data, train_teacher

SMALL = ["model.block_out_channels=[8,16]", "trainer.batch_size=32"]


def _config(*overrides):
    return load_config("digits-teacher", [*SMALL, *overrides], kind=TeacherConfig)


@pytest.mark.parametrize("steps", [1, 200])
def test_a_teacher_learns(steps):
    config, records = _config(f"trainer.steps={steps}"), []
    data = teacher_data(config)
    trained = train_teacher(new_teacher(config, data), data, config.trainer, on_record=records.append)
    assert records[-1]["step"] == steps
    assert not any(p.requires_grad for p in trained.network.parameters())
    if steps > 1:
        assert records[-1]["loss"] < 0.8 * records[0]["loss"]


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match=r"at least one batch of 5000 images, but digits holds 1797"):
        teacher_data(_config("trainer.batch_size=5000"))


def test_images_that_cannot_be_halved_are_refused():
    config = _config("model.block_out_channels=[8,8,8,8,8]")
    with pytest.raises(ConfigError, match=r"`model.block_out_channels` must halve the images 4 times.*8 x 8"):
        new_teacher(config, teacher_data(config))
