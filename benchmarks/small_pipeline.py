"""The Stable Diffusion pipeline that benchmarks train on: random, with a UNet of 1 million parameters, and its data."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import stable_diffusion

from ddil_ray.data import ImageData
from ddil_ray.data.prepared import NEGATIVE_FILE, Index, prompts_table, tensor_column, write_index
from ddil_ray.models import DiffusionModel, load_model
from ddil_ray.prepare.store import NewParquet
from ddil_ray.prompts import HeldEmbeddings

__all__ = ["random_latents", "save_prepared", "save_small_pipeline", "small_teacher"]

for _logging in (diffusers_logging, transformers_logging):
    _logging.disable_progress_bar()

SIDE, WORDS = 16, 16
"""Height and width of the latents; width of an embedded word."""


def save_small_pipeline(folder: Path) -> Path:
    """Write the pipeline to `folder`/pipeline, the same each time."""
    torch.manual_seed(0)
    pipeline = stable_diffusion(folder)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WORDS,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def small_teacher(folder: Path) -> DiffusionModel:
    """The pipeline's denoiser as a teacher."""
    return load_model(str(save_small_pipeline(folder)))


def random_latents(teacher: DiffusionModel, *, rows: int = 512) -> ImageData:
    """Random latents with one of eight prompts each."""
    assert teacher.family is not None
    assert teacher.folder is not None
    encoder = teacher.family.text_encoder(teacher.folder)
    assert encoder is not None
    prompts = HeldEmbeddings(encoder([f"number {i}" for i in range(8)]))
    images = torch.randn(rows, *teacher.sample_shape, generator=torch.Generator().manual_seed(5))
    return ImageData(images, torch.arange(rows) % 8, "latents", prompts, prepared_for=teacher.family.name)


def save_prepared(teacher: DiffusionModel, folder: Path) -> Path:
    """Write `random_latents` as `ddil-ray prepare` does."""
    data, bucket = random_latents(teacher), f"{2 * SIDE}x{2 * SIDE}"
    assert isinstance(data.prompts, HeldEmbeddings)
    embeddings = data.prompts.embeddings
    negative = teacher.family.text_encoder(teacher.folder).negative(None)
    tables = {
        f"latents/{bucket}/0.parquet": pa.table({"cond": data.labels.numpy(), "latent": tensor_column(data.images)}),
        "prompts/00000.parquet": prompts_table([f"number {i}" for i in range(8)], embeddings),
        NEGATIVE_FILE: prompts_table([""], negative),
    }
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        file = NewParquet(str(folder / name))
        file.write(table)
        file.close()
    index = Index(
        teacher=str(teacher.folder),
        family=teacher.family.name,
        conditions="prompts",
        latent_channels=data.images.shape[1],
        buckets={bucket: len(data)},
        latent_shapes={bucket: tuple(data.images.shape[1:])},
        prompts=8,
        prompt_files=[("prompts/00000.parquet", 8)],
        embeddings=list(embeddings),
    )
    write_index(str(folder), index)
    return folder
