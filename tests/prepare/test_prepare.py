"""Pins what preparing makes: the pipeline's own latents and embeddings, and every row once, whatever stops it."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from preparing import (
    assert_every_row_once,
    encode,
    inline,
    kill_after,
    picture,
    prepare,
    quiet,
    settings,
    start,
    write_folder,
    write_pairs,
    write_tar,
)
from rich.console import Console
from tiny import save_pipeline

from ddil_ray.data import load_images
from ddil_ray.data.pixels import decode_image
from ddil_ray.data.prepared import read_index
from ddil_ray.errors import ConfigError, DataError, RunFailedError
from ddil_ray.models import find_pipeline
from ddil_ray.prepare import begin, fill, new_job
from ddil_ray.runtime.lock import RunLock
from ddil_ray.runtime.prepare import prepare as prepare_on_ray
from ddil_ray.tracking import View


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_pipeline("stable_diffusion", tmp_path_factory.mktemp("teacher"))


def rows_of(output, bucket="16x16"):
    """Rows of a bucket by source."""
    files = sorted((output / "latents" / bucket).glob("*"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    rows = table.drop_columns("latent").to_pylist()
    latents = torch.tensor(table["latent"].combine_chunks().to_numpy_ndarray())
    assert len({row["source"] for row in rows}) == len(rows)
    return {row["source"]: row | {"latent": latent} for row, latent in zip(rows, latents, strict=True)}


CAPTIONS = ["a cat", "a dog ", "a cat", "birds", "a dog"]


@pytest.fixture(scope="module")
def plain(teacher, tmp_path_factory):
    """(source, output) of five pictures, prepared in fp32 in files of two rows."""
    root = tmp_path_factory.mktemp("plain")
    source = write_folder(root / "source", CAPTIONS)
    config = settings(teacher, source, root / "out", dtype="fp32", rows_per_file=2)
    assert prepare(config)[:4] == (str(root / "out"), {"16x16": 5}, 3, 0)
    return source, root / "out"


def test_latents_are_the_codecs_and_embeddings_the_encoders(teacher, plain):
    source, output = plain
    family, folder = find_pipeline(str(teacher))
    codec, encoder = family.codec(folder), family.text_encoder(folder)
    pixels = [decode_image((source / f"{i:03}.png").read_bytes(), name="", image_size=None) for i in range(5)]
    data = load_images(str(output))
    torch.testing.assert_close(data.images, codec.encode(torch.stack(pixels)))
    assert data.labels.tolist() == [0, 1, 0, 2, 1]
    assert data.prompts.texts() == ["a cat", "a dog", "birds"]
    for name, rows in encoder(["a cat", "a dog", "birds"]).items():
        torch.testing.assert_close(data.prompts.rows([0, 1, 2])[name], rows)


def test_a_row_says_where_it_comes_from(plain):
    row = rows_of(plain[1])["003.png"]
    sizes = {name: row[name] for name in ("original_height", "original_width", "crop_top", "crop_left")}
    assert row["cond"] == 2
    assert sizes == {"original_height": 16, "original_width": 16, "crop_top": 0, "crop_left": 0}


def test_half_precision_is_the_default(teacher, plain, tmp_path):
    prepare(settings(teacher, plain[0], tmp_path / "out"))
    (file,) = (tmp_path / "out" / "prompts").iterdir()
    assert pq.read_schema(file).field("prompt").type.value_type == pa.float16()
    half, full = load_images(str(tmp_path / "out")), load_images(str(plain[1]))
    torch.testing.assert_close(half.images, full.images.half().float())
    torch.testing.assert_close(half.prompts.rows([2])["prompt"], full.prompts.rows([2])["prompt"].half())


def _metadata(folder):
    write_folder(folder, CAPTIONS)


def _nested_metadata(folder):
    write_folder(folder / "train", CAPTIONS)


def _parquet(column, **writing):
    def write(folder):
        folder.mkdir()
        values = [column(picture(i)) for i in range(5)]
        pq.write_table(pa.table({"image": values, "caption": CAPTIONS}), folder / "a.parquet", **writing)

    return write


def _array(content):
    return decode_image(content, name="", image_size=None).tolist()


def _tars(caption):
    def write(folder):
        folder.mkdir()
        for number, ids in enumerate(((0, 1, 2), (3, 4))):
            members = {}
            for i in ids:
                members |= {f"x/{i:03}.png": picture(i), **caption(f"x/{i:03}", CAPTIONS[i])}
            write_tar(folder / f"{number}.tar", members)

    return write


@pytest.mark.parametrize(
    "write",
    [
        _metadata,
        _nested_metadata,
        _parquet(lambda content: content, row_group_size=3),
        _parquet(lambda content: {"bytes": content, "path": "x.png"}),
        _parquet(_array),
        _tars(lambda key, text: {f"{key}.txt": text.encode()}),
        _tars(lambda key, text: {f"{key}.json": json.dumps({"caption": text, "width": 16}).encode()}),
    ],
)
def test_every_format_gives_the_same(teacher, plain, tmp_path, write):
    write(tmp_path / "source")
    prepare(settings(teacher, tmp_path / "source", tmp_path / "out", dtype="fp32", rows_per_file=2))
    found, expected = load_images(str(tmp_path / "out")), load_images(str(plain[1]))
    torch.testing.assert_close(found.images, expected.images)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.prompts.texts() == expected.prompts.texts()


def test_urls_are_read_and_written(teacher, plain, tmp_path):
    memory = fsspec.filesystem("memory")
    root = f"memory://{tmp_path.name}"
    memory.put(str(plain[0]), f"{root}/source", recursive=True)
    prepare(settings(teacher, f"{root}/source", f"{root}/out", dtype="fp32"))
    found = load_images(f"{root}/out")
    torch.testing.assert_close(found.images, load_images(str(plain[1])).images)
    assert found.prompts.texts() == ["a cat", "a dog", "birds"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_prompts_alone(teacher, tmp_path, kind):
    texts = ["one", "two", "one", "", "three"]
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts, "n": [0] * 5}), tmp_path / "a.parquet")
    else:
        lines = texts if kind == "txt" else [json.dumps({"prompt": text}) for text in texts]
        (tmp_path / f"a.{kind}").write_text("\n".join(lines))
    done = prepare(settings(teacher, tmp_path / f"a.{kind}", tmp_path / "out", rows_per_file=2))
    data = load_images(str(tmp_path / "out"))
    assert data.prompts.texts() == ["one", "two", "three"]
    assert (len(data.images), data.labels.tolist()) == (0, [0, 1, 2])
    assert data.prompts.rows([2, 0])["prompt"].shape == (2, 12, 16)
    assert (done.buckets, done.skipped) == ({}, 0 if kind == "txt" else 1)


def test_wide_and_tall_images_go_to_buckets_of_their_shape(teacher, tmp_path):
    sizes = {"wide.png": (16, 40), "tall.png": (64, 30), "small.png": (8, 8), "grey.png": (20, 16)}
    lines = [json.dumps({"file_name": name, "text": name}) for name in sizes]
    source = tmp_path / "source"
    source.mkdir()
    (source / "metadata.jsonl").write_text("\n".join(lines))
    for name, (height, width) in sizes.items():
        (source / name).write_bytes(picture(len(name), height, width))
    config = settings(teacher, source, tmp_path / "out", buckets=[[16, 16], [16, 32], [32, 16]], dtype="fp32")
    assert prepare(config).buckets == {"16x16": 2, "16x32": 1, "32x16": 1}
    index = read_index(str(tmp_path / "out"))
    assert index.latent_shapes == {"16x16": (4, 8, 8), "16x32": (4, 8, 16), "32x16": (4, 16, 8)}
    wide = rows_of(tmp_path / "out", "16x32")["wide.png"]
    assert {k: wide[k] for k in ("original_height", "original_width", "crop_top", "crop_left")} == {
        "original_height": 16, "original_width": 40, "crop_top": 0, "crop_left": 4,
    }  # fmt: skip
    family, folder = find_pipeline(str(teacher))
    pixels = decode_image((source / "wide.png").read_bytes(), name="", image_size=None)[:, :, 4:36]
    torch.testing.assert_close(wide["latent"], family.codec(folder).encode(pixels[None])[0])
    tall = rows_of(tmp_path / "out", "32x16")["tall.png"]  # 34 x 16 when it covers the bucket
    assert (tall["crop_top"], tall["crop_left"]) == (1, 0)
    assert len(load_images(str(tmp_path / "out"), bucket="16x32").images) == 1


def test_what_cannot_be_prepared_is_skipped_and_listed(teacher, tmp_path):
    source = write_folder(tmp_path / "source", ["fine", "torn", "text", None, "gone", "  ", "fine"])
    (source / "001.png").write_bytes(picture(1)[:-40])
    (source / "002.png").write_bytes(b"not a picture")
    (source / "004.png").unlink()
    done = prepare(settings(teacher, source, tmp_path / "out", rows_per_file=2))
    assert (done.buckets, done.skipped, done.prompts) == ({"16x16": 2}, 5, 4)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["name"]: line["reason"] for line in lines}
    assert set(reasons) == {"001.png", "002.png", "003.png", "004.png", "005.png"}
    assert reasons["003.png"] == reasons["005.png"] == "no caption"
    assert "No such file" in reasons["004.png"]
    assert "must hold readable images" in reasons["002.png"]
    assert set(rows_of(tmp_path / "out")) == {"000.png", "006.png"}


@pytest.mark.parametrize("gone", ["folder", "tar"])
def test_a_source_that_goes_while_it_is_prepared_ends_it_and_costs_no_row(teacher, tmp_path, gone):
    source = tmp_path / "source"
    write_folder(source, ["a", "b", "c"])
    if gone == "tar":
        members = {f"{i}.{kind}": part for i in range(3) for kind, part in (("png", picture(i)), ("txt", b"a"))}
        source = tmp_path / "tars"
        source.mkdir()
        write_tar(source / "a.tar", members)
    config = settings(teacher, source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop_after={"ImageStage": 0})
    job = new_job(config)
    assert not begin(job)
    source.rename(tmp_path / "away")
    with pytest.raises(RunFailedError, match=r"must stay readable .*(metadata.jsonl|a.tar).*same command"):
        fill(job, inline(job), quiet())
    (tmp_path / "away").rename(source)
    assert prepare(config).skipped == 0


def test_where_nothing_can_be_prepared_there_is_no_data(teacher, tmp_path):
    source = write_folder(tmp_path / "source", ["a", "b"])
    for i in range(2):
        (source / f"00{i}.png").write_bytes(b"?")
    for _ in range(2):
        with pytest.raises(DataError, match=r"all 2 were left out. The first is 000.png: `data.source` must hold"):
            prepare(settings(teacher, source, tmp_path / "out"))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_what_overflows_the_type_is_left_out(tmp_path):
    teacher = save_pipeline("stable_diffusion", tmp_path)
    settings_of_vae = teacher / "vae" / "config.json"
    settings_of_vae.write_text(settings_of_vae.read_text().replace('"scaling_factor": 0.5', '"scaling_factor": 5e7'))
    source = write_folder(tmp_path / "source", ["a"])
    with pytest.raises(DataError, match=r"000.png: latents are not finite in fp16"):
        prepare(settings(teacher, source, tmp_path / "half"))
    assert prepare(settings(teacher, source, tmp_path / "full", dtype="fp32")).buckets == {"16x16": 1}


def test_embeddings_that_overflow_the_type_are_refused(tmp_path):
    from transformers import CLIPTextModel

    teacher = save_pipeline("stable_diffusion", tmp_path)
    encoder = CLIPTextModel.from_pretrained(teacher / "text_encoder")
    scale = next(p for name, p in encoder.named_parameters() if name.endswith("final_layer_norm.weight"))
    scale.data.mul_(1e6)
    encoder.save_pretrained(teacher / "text_encoder")
    (tmp_path / "prompts.txt").write_text("a\n")
    with pytest.raises(ConfigError, match=r"fp16 overflows for one of 'a' and the 0 after it. Set `dtype=fp32`"):
        prepare(settings(teacher, tmp_path / "prompts.txt", tmp_path / "half"))
    assert prepare(settings(teacher, tmp_path / "prompts.txt", tmp_path / "full", dtype="fp32")).prompts == 1


@pytest.mark.parametrize("stop", [{"ScanStage": 0}, {"PromptStage": 1}, {"ImageStage": 0}, {"ImageStage": 2}])
def test_a_rerun_does_only_what_is_missing(teacher, plain, tmp_path, stop):
    config = settings(teacher, plain[0], tmp_path / "out", dtype="fp32", rows_per_file=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, stop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert not (tmp_path / "out" / "dataset.json").exists()
    asked, job = {}, new_job(config)
    assert not begin(job)

    def execute(stage, requests):
        asked[stage] = len(requests)
        return inline(job)(stage, requests)

    fill(job, execute, quiet())
    assert asked["ImageStage"] == 3 - stop.get("ImageStage", 0)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert set(rows_of(tmp_path / "out")) == {f"{i:03}.png" for i in range(5)}
    torch.testing.assert_close(load_images(str(tmp_path / "out")).images, load_images(str(plain[1])).images)
    assert prepare(config).images_per_s is None


def test_a_killed_process_and_a_rerun_leave_every_row_once(teacher, tmp_path):
    write_pairs(tmp_path / "source", 300, tars=3, captions=40)
    config = settings(teacher, tmp_path / "source", tmp_path / "out", rows_per_file=5)
    script = f"import preparing; preparing.prepare(preparing.PrepareConfig(**{config.model_dump()!r}))"
    kill_after(start(script, tmp_path), tmp_path / "out", items=20)
    assert prepare(config).buckets == {"16x16": 300}
    assert_every_row_once(tmp_path / "out", 300, captions=40)


def test_what_a_killed_process_left_is_removed(teacher, plain, tmp_path):
    """A bucket's file without its item's marker, and a file that was being written."""
    config = settings(teacher, plain[0], tmp_path / "out", dtype="fp32", rows_per_file=2)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, {"ImageStage": 1})
    torn = tmp_path / "out" / "latents" / "16x32"
    torn.mkdir(parents=True)
    (torn / "00000-00001.parquet").write_bytes(b"of an item that is not done")
    (torn / ".ddil-ray-0123").write_bytes(b"half a file")
    prepare(config)
    assert not list(torn.iterdir())
    assert set(rows_of(tmp_path / "out")) == {f"{i:03}.png" for i in range(5)}


def test_progress_says_how_fast_and_how_much_is_left(teacher, plain, tmp_path):
    job = new_job(settings(teacher, plain[0], tmp_path / "out"))
    said = io.StringIO()
    begin(job)
    fill(job, inline(job), View(Console(file=said, width=200)))
    last = said.getvalue().splitlines()[-1]
    assert re.fullmatch(r"images  5/5  \d+ images/s  0:00:00 left", last)


def test_another_preparation_in_the_same_output_is_refused(teacher, plain, tmp_path):
    source, output = plain
    with pytest.raises(ConfigError, match=r"others: buckets was 'square' and is '\[\[16, 32\]\]'; dtype was"):
        prepare(settings(teacher, source, output, buckets=[[16, 32]], rows_per_file=2))
    write_folder(tmp_path / "source", CAPTIONS)
    prepare(settings(teacher, tmp_path / "source", tmp_path / "out"))
    with (tmp_path / "source" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "005.png", "text": "new"}\n')
    with pytest.raises(ConfigError, match="files of data"):
        prepare(settings(teacher, tmp_path / "source", tmp_path / "out"))
    with pytest.raises(ConfigError, match="must be empty or begun by"):
        prepare(settings(teacher, source, tmp_path / "source"))


def test_a_limit_takes_the_first_rows(teacher, tmp_path):
    _tars(lambda key, text: {f"{key}.txt": text.encode()})(tmp_path / "source")
    done = prepare(settings(teacher, tmp_path / "source", tmp_path / "out", limit=2))
    assert done[1:4] == ({"16x16": 2}, 2, 0)
    assert set(rows_of(tmp_path / "out")) == {"0.tar/x/000", "0.tar/x/001"}
    assert [path.name for path in (tmp_path / "out" / "work" / "scanned").iterdir()] == ["00000.json"]


def test_pictures_are_turned_as_their_camera_says(teacher, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    source = tmp_path / "source"
    source.mkdir()
    for name, content in {"turned": buffer.getvalue(), "upright": encode(np.rot90(pixels, -1))}.items():
        (source / f"{name}.png").write_bytes(content)
    lines = [json.dumps({"file_name": f"{name}.png", "text": "a"}) for name in ("turned", "upright")]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    prepare(settings(teacher, source, tmp_path / "out", buckets=[[32, 16], [16, 32]]))
    first, second = rows_of(tmp_path / "out", "32x16").values()
    assert torch.equal(first["latent"], second["latent"])


def _broken(name, content):
    def write(folder):
        folder.mkdir()
        (folder / name).write_bytes(content)

    return write


def _table(**columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("write", "more", "expected"),
    [
        (lambda folder: None, {}, "does not exist or is empty"),
        (_broken("a.doc", b""), {}, r"holds a.doc and the like"),
        (_broken("metadata.jsonl", b'{"file_name": "a.png", "text": "a"}\n{oops\n'), {}, r"line 2 is '\{oops' instead"),
        (_broken("metadata.jsonl", b'{"file": "a.png", "text": "a"}'), {}, r"`file_name` in each .* has file, text"),
        (_broken("metadata.jsonl", b'{"file_name": "a.png", "texts": "a"}'), {}, r"Did you mean 'texts'\?"),
        (_broken("metadata.jsonl", b'{"file_name": "a.png", "text": " "}'), {}, "all 1 were left out"),
        (_broken("a.parquet", _table(images=[b"x"], text=["a"])), {}, r"data.image_column.*Did you mean 'images'\?"),
        (_broken("a.parquet", _table(image=[b"x"], tekst=["a"])), {}, r"data.caption_column.*Did you mean 'tekst'\?"),
        (_broken("a.parquet", b"PAR1"), {}, "whole Parquet files, but a.parquet cannot be read"),
        (_broken("a.tar", b"no tar" * 200), {}, r"whole tars .* a.tar cannot be read"),
        (_broken("a.png", picture(0)), {}, "in a folder per class, or with a metadata.jsonl"),
        (_metadata, {"buckets": [[16, 17]]}, r"sides that are multiples of 2, .* one is 16x17"),
        (_metadata, {"teacher": {"model": "builtin:digits"}}, "must be a teacher of latents"),
        (_metadata, {"output": "source/out"}, "must lie outside `data.source`"),
        (_metadata, {"output": "/proc/x"}, "`output` must be a folder or URL that can be written"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(teacher, tmp_path, monkeypatch, write, more, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "source")
    tree = settings(teacher, tmp_path / "source", tmp_path / "out").model_dump() | more
    with pytest.raises((ConfigError, DataError), match=expected):
        prepare(type(settings(teacher, "", "")).model_validate(tree))


def test_an_output_in_which_another_process_works_is_refused(teacher, plain, tmp_path, monkeypatch):
    """Else the second removes what the first has not finished, and both tell that all is there."""
    job = new_job(settings(teacher, plain[0], tmp_path / "out"))
    begin(job)
    place = SimpleNamespace(fs=job.store.fs, root=job.store.root, url=job.store.url, others=False)
    monkeypatch.setattr(RunLock, "stale_s", 0.1)
    with (
        RunLock(place, pytest.fail, field="output"),
        pytest.raises(ConfigError, match=r"`output` must be that of no run that is active, but .*process"),
    ):
        prepare_on_ray(job, view=View())
