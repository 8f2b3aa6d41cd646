"""Pins the layout of prepared data: what is written is read back, by rows and by prompts."""

from __future__ import annotations

import json
import shutil

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


def _rewrite(path, **columns):
    table = pq.read_table(path)
    for name, column in columns.items():
        place = table.column_names.index(name)
        table = table.drop_columns([name]) if column is None else table.set_column(place, name, column)
    pq.write_table(table, path)


def _index(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _nan(shape):
    tensor = torch.zeros(shape).half()
    tensor.view(-1)[-1] = float("nan")
    return tensor_column(tensor)


LATENTS, PROMPTS = "latents/16x16/0.parquet", "prompts/1.parquet"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: (f / LATENTS).unlink(), r"the 5 rows of bucket 16x16 that its .* holds 0"),
        (lambda f: (f / LATENTS).write_bytes(b"PAR1"), r"whole Parquet files, but .*0.parquet cannot be read"),
        (lambda f: _rewrite(f / LATENTS, cond=None), r"must be a column .*0.parquet has latent and not"),
        (lambda f: _rewrite(f / LATENTS, latent=None), r"0.parquet has cond and not 'latent'"),
        (lambda f: _rewrite(f / LATENTS, latent=_nan((5, 4, 8, 8))), r"column 'latent' of .*0.parquet has NaN"),
        (
            lambda f: _rewrite(f / LATENTS, latent=tensor_column(torch.zeros(5, 4, 4, 4).half())),
            r"shape that its dataset.json tells of, \(4, 8, 8\), but those of 16x16 .* are \(4, 4, 4\)",
        ),
        (lambda f: _rewrite(f / LATENTS, latent=pa.array([[0.5]] * 5)), r"'latent' must hold tensors .* is list"),
        (lambda f: _rewrite(f / LATENTS, cond=pa.array([0, 1, 2, 3, 7])), r"conditions from 0 to 6, .*0.parquet has 7"),
        (lambda f: _rewrite(f / LATENTS, cond=pa.array([0, 1, 2, 3, None])), r"conditions from 0 to 6, .* has None"),
        (lambda f: _rewrite(f / LATENTS, cond=pa.array([0.5] * 5)), r"'cond' must hold whole numbers, but is double"),
        (lambda f: (f / PROMPTS).unlink(), r"prompts/1.parquet cannot be read"),
        (lambda f: _rewrite(f / PROMPTS, pooled=None), r"prompts/1.parquet has text, prompt and not 'pooled'"),
        (
            lambda f: _rewrite(f / PROMPTS, pooled=tensor_column(torch.zeros(3, 5).half())),
            r"alike in all files, but holds .* of shape \(4,\) in .* and .* of shape \(5,\) in .*1.parquet",
        ),
        (lambda f: shutil.copy(f / "prompts/0.parquet", f / PROMPTS), r"the 7 prompts in 2 files .* holds 8"),
        (lambda f: _index(f, prompts=8), r"the 8 prompts in 2 files that its dataset.json tells of, but .* holds 7"),
        (lambda f: _index(f, embeddings=[]), r"must hold embeddings of its prompts"),
        (lambda f: _index(f, buckets={"16x16": -5}), r"no readable dataset.json \(buckets.16x16: "),
        (lambda f: _index(f, buckets={"../16x16": 5}), r"no readable dataset.json"),
        (lambda f: _index(f, buckets={}, conditions="classes"), r"latents or prompts, but .* of neither"),
        (lambda f: _index(f, prompt_files=[["../x.parquet", 7]]), r"no readable dataset.json \(prompt_files.0.0: "),
        (lambda f: _index(f, latent_shapes={}), r"the shape that its dataset.json tells of, None"),
        (lambda f: (f / "dataset.json").write_text("[" * 100_000), r"no readable dataset.json \("),
        (lambda f: (f / "dataset.json").write_bytes(b"\xff\xfe"), r"no readable dataset.json \("),
    ],
)
def test_what_was_changed_since_it_was_prepared_is_refused_with_file_and_column(tmp_path, spoil, expected):
    write(tmp_path)
    assert load_images(str(tmp_path), format="prepared").latents
    spoil(tmp_path)
    with pytest.raises(DataError, match=expected) as caught:
        load_images(str(tmp_path), format="prepared")
    assert len(str(caught.value).splitlines()) == 1


def test_embeddings_without_a_number_are_refused_where_they_are_read(tmp_path):
    write(tmp_path)
    _rewrite(tmp_path / PROMPTS, prompt=_nan((3, 3, 4)))
    prompts = load_images(str(tmp_path)).prompts
    with pytest.raises(DataError, match=r"column 'prompt' of prompts/1.parquet has NaN"):
        prompts.rows([6])
    with pytest.raises(DataError, match=r"negative.parquet cannot be read"):
        prompts.negative()


def test_prompts_are_found_from_other_working_directories(tmp_path, monkeypatch):
    """As Ray's workers have."""
    embedded, _ = write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    data = load_images("data")
    monkeypatch.chdir("/")
    assert torch.equal(data.prompts.rows([1])["prompt"], embedded["prompt"][[1]])
