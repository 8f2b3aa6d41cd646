"""Pins preparing images with class ids: which class a row gets, and that there are no prompts."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import inline, picture, quiet, settings, write_folder, write_tar
from tiny import save_pipeline

from ddil_ray.config.prepare import PrepareData
from ddil_ray.data import load_images
from ddil_ray.errors import DataError
from ddil_ray.models import find_pipeline
from ddil_ray.prepare import begin, fill, new_job
from ddil_ray.prepare.rows import Missing
from ddil_ray.prepare.sources import open_source


def _class_folders(folder):
    for i, label in enumerate("bca"):
        (folder / label / "more").mkdir(parents=True)
        (folder / label / "more" / f"{i}.PNG").write_bytes(picture(i))
    return {"a/more/2.PNG": 0, "b/more/0.PNG": 1, "c/more/1.PNG": 2}


def _metadata(folder):
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "label": label}) for i, label in enumerate((7, 0))]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"0.png": 7, "1.png": 0}


def _parquet(folder):
    folder.mkdir()
    pq.write_table(pa.table({"image": [picture(0), picture(1)], "label": [3, 1]}), folder / "a.parquet")
    return {"a.parquet:0": 3, "a.parquet:1": 1}


def _tar(folder):
    folder.mkdir()
    write_tar(folder / "a.tar", {"0.png": picture(0), "0.cls": b"5\n", "1.json": b'{"label": 2}', "1.webp": b""})
    return {"a.tar/0": 5, "a.tar/1": None}


@pytest.mark.parametrize("write", [_class_folders, _metadata, _parquet, _tar])
def test_every_format_has_classes(tmp_path, write):
    expected = write(tmp_path / "source")
    reader, shards = open_source(PrepareData(source=str(tmp_path / "source")), classes=True)
    rows = [row for shard in shards for row in reader.scan(shard)]
    assert {row.name: None if isinstance(row, Missing) else row.condition for row in rows} == expected


@pytest.mark.parametrize("label", [-1, None, 1.5, "x", True])
def test_what_is_no_class_id_is_left_out(tmp_path, label):
    lines = [json.dumps({"file_name": "a.png", "label": label})]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    reader, (shard,) = open_source(PrepareData(source=str(tmp_path)), classes=True)
    assert list(reader.scan(shard)) == [Missing("a.png", "no class id")]


def test_a_row_of_a_tar_without_an_image_is_left_out(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.txt": b"a cat", "1.jpg": picture(1, format="JPEG"), "1.txt": b"a dog"})
    reader, (shard,) = open_source(PrepareData(source=str(tmp_path / "a.tar")), classes=False)
    first, second = reader.scan(shard)
    assert first == Missing("a.tar/0", "no image")
    (read,) = reader.contents(shard, [second])
    assert (second.condition, read()) == ("a dog", picture(1, format="JPEG"))


def test_large_row_groups_are_read_in_parts(tmp_path):
    contents = [bytes([i]) * 8 for i in range(200)]
    pq.write_table(pa.table({"image": contents, "text": [str(i) for i in range(200)]}), tmp_path / "a.parquet")
    reader, (shard,) = open_source(PrepareData(source=str(tmp_path)), classes=False)
    part = list(reader.scan(shard))[70:130]
    assert [read() for read in reader.contents(shard, part)] == contents[70:130]


def test_class_ids_are_the_conditions_of_the_latents(tmp_path):
    """With the autoencoder of a pipeline of prompts, of which preparing for classes reads nothing else."""
    teacher = save_pipeline("stable_diffusion", tmp_path)
    _class_folders(tmp_path / "source")
    write_folder(tmp_path / "captions", ["a"])
    job = new_job(settings(teacher, tmp_path / "captions", tmp_path / "out"))
    reader, shards = open_source(PrepareData(source=str(tmp_path / "source")), classes=True)
    job = replace(job, prompted=False, reader=reader, shards=tuple(shards))
    assert not begin(job)
    done = fill(job, inline(job), quiet())
    data = load_images(str(tmp_path / "out"))
    assert (done.prompts, data.prompts, data.latents, data.labelled) == (0, None, True, True)
    assert data.labels.tolist() == [0, 1, 2]
    assert not (tmp_path / "out" / "prompts").exists()


def test_families_with_text_encoders_are_of_prompts(tmp_path):
    assert find_pipeline(str(save_pipeline("stable_diffusion", tmp_path)))[0].prompted
    assert not find_pipeline("builtin:digits")[0].prompted


def test_what_does_not_suit_the_teacher_is_refused(tmp_path):
    _class_folders(tmp_path / "images")
    with pytest.raises(DataError, match=r"captions for a teacher of prompts.*Write a metadata.jsonl"):
        open_source(PrepareData(source=str(tmp_path / "images")), classes=False)
    (tmp_path / "a.txt").write_text("a prompt\n")
    with pytest.raises(DataError, match="images for a teacher of classes"):
        open_source(PrepareData(source=str(tmp_path / "a.txt")), classes=True)
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"], "lable": [1]}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"data.label_column.*Did you mean 'lable'\?"):
        open_source(PrepareData(source=str(tmp_path / "a.parquet")), classes=True)
