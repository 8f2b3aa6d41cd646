"""Pins adapters: new ones change nothing (oracle 18), leave the teacher alone, and are refused where they cannot be."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import PIPELINES
from torch import nn
from worlds import asked, moved, tiny_teacher

from ddil_ray.errors import ConfigError
from ddil_ray.models import Lora, student_of
from ddil_ray.models.lora import fused
from ddil_ray.models.unet import new_unet, unet_model
from ddil_ray.testing import tiny_model
from ddil_ray.trained import is_adapted, trained_parameters, trained_state


def pixels(tmp_path):
    torch.manual_seed(0)
    unet = new_unet(sample_shape=(1, 8, 8), num_classes=10, block_out_channels=(8, 16))
    return unet_model(unet, dict(DDIMScheduler(prediction_type="v_prediction").config))


TEACHERS = {
    "unet": pixels,
    "factory": lambda tmp_path: tiny_model(),
    **{family: lambda tmp_path, family=family: tiny_teacher(family, tmp_path) for family in PIPELINES},
}


def lora_of(teacher, rank=2, **settings):
    return Lora(rank=rank, alpha=3, target_modules=None if teacher.family else ("inside", "outside"), **settings)


@pytest.fixture(params=TEACHERS)
def teacher(request, tmp_path):
    model = TEACHERS[request.param](tmp_path)
    model.network.eval()
    return model


def test_a_student_of_adapters_is_its_teacher_at_first_and_not_when_they_have_moved(teacher):
    names, modules = list(teacher.network.state_dict()), [type(m) for m in teacher.network.modules()]
    before, whole = asked(teacher), sum(p.numel() for p in teacher.network.parameters())
    student = student_of(teacher, lora=lora_of(teacher))
    assert torch.equal(asked(student), before)
    assert {p for p in student.network.parameters() if p.requires_grad} == set(trained_parameters(student.network))
    assert sum(tensor.numel() for tensor in trained_state(student.network).values()) < 0.5 * whole
    assert not torch.allclose(asked(moved(student)), before, atol=1e-3)
    assert torch.equal(asked(teacher), before)
    assert (list(teacher.network.state_dict()), [type(m) for m in teacher.network.modules()]) == (names, modules)


def test_fused_adapters_are_a_plain_network_that_says_the_same(teacher):
    student = moved(student_of(teacher, lora=lora_of(teacher)))
    plain, expected = fused(student), asked(student)
    assert list(plain.network.state_dict()) == list(teacher.network.state_dict())
    assert not is_adapted(plain.network)
    torch.testing.assert_close(asked(plain), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(asked(student), expected)
    assert fused(teacher) is teacher


def test_every_student_starts_with_the_same_adapters():
    a, b = (student_of(tiny_model(), lora=lora_of(tiny_model())).network.state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_base_stays_as_it_is_evaluated_and_dropout_is_the_adapters():
    teacher = tiny_model()
    teacher.network.between = nn.BatchNorm1d(3)
    network = student_of(teacher, lora=lora_of(teacher, dropout=0.5)).network
    training = {name for name, part in network.named_modules() if part.training}
    assert training == {f"{layer}.lora_dropout.default" for layer in ("inside", "outside")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora": Lora()}, r"`student.lora.target_modules` must name layers .* but is not set.*inside, outside"),
        ({"lora": Lora(target_modules=("insid",))}, r"`student.lora.target_modules` must name .* \['insid'\] instead"),
        (
            {"lora": Lora(target_modules=("inside",)), "guidance_embedding": True},
            r"`student.lora` must be null for a student that is to be told guidance",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        student_of(tiny_model(), **settings)


def test_layers_that_take_no_adapters_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"`student.lora.target_modules` must name linear.*conv_norm_out"):
        student_of(pixels(tmp_path), lora=Lora(target_modules=("conv_norm_out",)))
