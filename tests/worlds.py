"""Teachers on tiny pipelines, with prompts and latents to train on, that tests share."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import save_pipeline

from ddil_ray.data import ImageData
from ddil_ray.models import DiffusionModel, load_model
from ddil_ray.prompts import HeldEmbeddings, Prompts
from ddil_ray.testing import TinyNetwork, tiny_model
from ddil_ray.trained import trained_parameters

__all__ = ["WORDS", "asked", "moved", "narrow_model", "tiny_data", "tiny_teacher"]

WORDS = ["a red bird", "two boats", "rain"]


def tiny_teacher(family: str, folder: Path, **settings) -> DiffusionModel:
    """The model of a tiny pipeline of `family` in `folder`, with embeddings of `WORDS` where it reads prompts."""
    model = load_model(str(save_pipeline(family, folder, **settings)))
    encoder = model.family.text_encoder(model.folder)
    if encoder is not None:
        model.bind(Prompts(HeldEmbeddings(encoder(WORDS)), encoder.negative(None)).bank())
    return model


def tiny_data(teacher: DiffusionModel, rows: int = 16) -> ImageData:
    """Random latents, one of three prompts (or classes) each."""
    latents = torch.randn(rows, *teacher.sample_shape, generator=torch.Generator().manual_seed(1))
    encoder = teacher.family.text_encoder(teacher.folder)
    prompts = HeldEmbeddings(encoder(WORDS)) if encoder is not None else None
    return ImageData(latents, torch.arange(rows) % 3, "tiny", prompts, prepared_for=teacher.family.name)


def narrow_model() -> DiffusionModel:
    """The tiny model at half the width; give it as `worlds:narrow_model`."""
    return tiny_model().with_network(TinyNetwork((1, 8, 8), conditions=11, width=16))


def moved(student: DiffusionModel) -> DiffusionModel:
    """`student` with trained weights that are far from where they were."""
    torch.manual_seed(1)
    for parameter in trained_parameters(student.network):
        torch.nn.init.normal_(parameter, std=0.2)
    return student


def asked(model: DiffusionModel, *, w: float = 0.0) -> torch.Tensor:
    """What `model` says of three fixed states, one per prompt or class."""
    x_t = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    with torch.no_grad():
        return model.denoiser()(x_t, t, torch.arange(3), torch.full((3,), w))
