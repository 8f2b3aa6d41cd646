"""Pins the layout of prepared data: what is written is read back, by rows and by prompts."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ddil_ray.data import load_images
from ddil_ray.data.prepared import Index, prompts_table, tensor_column, write_index
from ddil_ray.errors import DataError


def write(folder, *, prompts=7, rows=5):
    """Prepared data of two prompt files with small row groups, and one bucket."""
    embedded = {"prompt": torch.randn(prompts, 3, 4).half(), "pooled": torch.randn(prompts, 4).half()}
    files, start = [], 0
    (folder / "prompts").mkdir(parents=True)
    for number, size in enumerate((4, prompts - 4)):
        part = {name: rows_[start : start + size] for name, rows_ in embedded.items()}
        table = prompts_table([f"prompt {i}" for i in range(start, start + size)], part)
        pq.write_table(table, folder / "prompts" / f"{number}.parquet", row_group_size=2)
        files.append((f"prompts/{number}.parquet", size))
        start += size
    latents = torch.randn(rows, 4, 8, 8).half()
    if rows:
        (folder / "latents" / "16x16").mkdir(parents=True)
        table = pa.table({"cond": pa.array([6, 0, 3, 3, 1][:rows]), "latent": tensor_column(latents)})
        pq.write_table(table, folder / "latents" / "16x16" / "0.parquet")
    index = Index(
        teacher="t", family="stable_diffusion", conditions="prompts", latent_channels=4, prompts=prompts,
        buckets={"16x16": rows} if rows else {}, latent_shapes={"16x16": (4, 8, 8)} if rows else {},
        prompt_files=files, embeddings=["prompt", "pooled"],
    )  # fmt: skip
    write_index(str(folder), index)
    return embedded, latents


def test_latents_and_prompts_are_read_back(tmp_path):
    embedded, latents = write(tmp_path)
    data = load_images(str(tmp_path))
    assert data.latents
    assert torch.equal(data.images, latents.float())
    assert data.labels.tolist() == [6, 0, 3, 3, 1]
    rows = data.prompts.rows([6, 0, 3, 6])
    for name, expected in embedded.items():
        assert torch.equal(rows[name], expected[[6, 0, 3, 6]])
    assert data.prompts.texts()[6] == "prompt 6"


def test_prompts_alone_are_data_without_images(tmp_path):
    write(tmp_path, rows=0)
    data = load_images(str(tmp_path))
    assert len(data.images) == 0
    assert data.labels.tolist() == list(range(7))


def test_what_was_not_prepared_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=r"`data.bucket` must be one of 16x16 \(5 images\), but is '8x8'"):
        load_images(str(tmp_path), bucket="8x8")
    with pytest.raises(DataError, match=r"has no readable dataset.json"):
        load_images(str(tmp_path / "latents"), format="prepared")


def test_prompts_are_found_from_other_working_directories(tmp_path, monkeypatch):
    """As Ray's workers have."""
    embedded, _ = write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    data = load_images("data")
    monkeypatch.chdir("/")
    assert torch.equal(data.prompts.rows([1])["prompt"], embedded["prompt"][[1]])
