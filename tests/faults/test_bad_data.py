"""Rows of the fault matrix on data: wrong-shape rows, missing column, zero rows, fewer rows than a batch; unreadable
Parquet; dtype mismatch. Every one is told by one message, with exit code 2, before anything starts."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from broken import CAPTIONED, IMAGES, flipped, good_parquet
from fuzz import BASES, NOWHERE, refused
from preparing import prepared
from tiny import save_pipeline

from ddil_ray.data import load_images
from ddil_ray.errors import DataError

COMMANDS = ("train-teacher", "distill", "plan", "evaluate")
RUN = ["trainer.batch_size=16"]


@pytest.fixture(scope="session")
def latent_teacher(tmp_path_factory):
    """A tiny teacher of prompts."""
    return save_pipeline("stable_diffusion", tmp_path_factory.mktemp("latent"))


def config_of(command, folder):
    """A file with the least config of `command`."""
    import yaml

    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(BASES[command][1]))
    return path


def refuse_images(command, name, seed, folder):
    data = folder / "data"
    data.mkdir()
    IMAGES[name].write(data, random.Random(seed))
    said = refused(command, config_of(command, folder), f"data.source={data}", *RUN)
    assert re.search(IMAGES[name].says, said), said


def refuse_captioned(name, seed, folder, teacher):
    data = folder / "data"
    data.mkdir()
    CAPTIONED[name].write(data, random.Random(seed))
    said = refused(
        "prepare", config_of("prepare", folder), f"data.source={data}", f"teacher.model={teacher}", f"output={NOWHERE}"
    )
    assert re.search(CAPTIONED[name].says, said), said


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_wrong_are_refused_with_file_column_and_remedy(name, tmp_path):
    refuse_images("train-teacher", name, 0, tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_images_refuses_them_alike(command, tmp_path):
    for number, name in enumerate(("a file cut short", "labels of another type", "NaN", "fewer rows than a batch")):
        (tmp_path / str(number)).mkdir()
        refuse_images(command, name, number, tmp_path / str(number))


@pytest.mark.parametrize("name", CAPTIONED)
def test_sources_that_cannot_be_prepared_are_refused_before_anything_starts(name, tmp_path, latent_teacher):
    refuse_captioned(name, 0, tmp_path, latent_teacher)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 13))
def test_five_hundred_malformed_datasets_are_refused(seed, tmp_path, latent_teacher):
    """12 seeds x (kinds of images, each for one of the commands in turn, and kinds of captioned ones): at least 500."""
    assert 12 * (len(IMAGES) + len(CAPTIONED)) >= 500
    cases = [(COMMANDS[(seed + i) % 4], name) for i, name in enumerate(IMAGES)]
    for number, (command, name) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        refuse_images(command, name, seed, tmp_path / str(number))
    for name in CAPTIONED:
        (tmp_path / name).mkdir()
        refuse_captioned(name, seed, tmp_path / name, latent_teacher)


def flips(folder, count, seed):
    """How many of `count` Parquet files with one byte changed are refused, and how many are read as if none were."""
    folder.mkdir(exist_ok=True)
    (path,) = good_parquet(folder, files=1)
    content, expected, chance = path.read_bytes(), load_images(str(folder)), random.Random(seed)
    refusals = 0
    for _ in range(count):
        path.write_bytes(flipped(content, chance))
        try:
            data = load_images(str(folder))
        except DataError:
            refusals += 1
            continue
        assert torch.equal(data.images, expected.images)
        assert torch.equal(data.labels, expected.labels)
    return refusals


def test_a_parquet_file_with_one_byte_changed_is_refused_or_read_as_it_was(tmp_path):
    """Row `unreadable parquet`: pages have checksums; what a footer's changed byte leaves readable has equal data."""
    assert flips(tmp_path / "data", 200, seed=0) > 100


@pytest.mark.slow
def test_two_thousand_files_with_one_byte_changed_are_refused_or_read_as_they_were(tmp_path):
    assert flips(tmp_path / "data", 2000, seed=1) > 1000


def test_no_byte_of_prepared_latents_can_change_unnoticed(tmp_path):
    """Without a digest of the whole file, 8 of 20,658 changes of a byte were: pages have checksums, headers none."""
    folder = Path(prepared(save_pipeline("dit", tmp_path), tmp_path, rows=8))
    path = min((folder / "latents").rglob("*.parquet"))
    assert load_images(str(folder)).latents
    content, chance = path.read_bytes(), random.Random(0)
    for place in chance.sample(range(len(content)), 150):
        path.write_bytes(content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :])
        with pytest.raises(DataError):
            load_images(str(folder))


def test_no_byte_of_prepared_embeddings_can_make_others_of_them(tmp_path):
    """They are read while a run goes on, a few rows at a time, so that pages' checksums are what tells."""
    folder = Path(prepared(save_pipeline("stable_diffusion", tmp_path), tmp_path, rows=4))
    path = min(folder.rglob("prompts/*.parquet"))

    def embeddings():
        prompts = load_images(str(folder)).prompts
        return prompts.rows(range(len(prompts)))

    expected, content, chance, refused = embeddings(), path.read_bytes(), random.Random(0), 0
    for _ in range(150):
        path.write_bytes(flipped(content, chance))
        try:
            found = embeddings()
        except DataError:
            refused += 1
            continue
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert refused > 75


def test_an_empty_file_among_others_is_no_fault(tmp_path):
    """As Spark and others write them, with types of their own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    good_parquet(tmp_path)
    expected = load_images(str(tmp_path))
    pq.write_table(pa.table({"image": pa.array([], pa.null())}), tmp_path / "9.parquet")
    data = load_images(str(tmp_path))
    assert torch.equal(data.images, expected.images)


def test_numbers_of_any_width_are_cast(tmp_path):
    """The rule for types: float64 is read as float32, whole numbers of any width as int64."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8)).tolist()
    for name, number, whole in (("a", pa.float64(), pa.int8()), ("b", pa.float32(), pa.uint64())):
        table = pa.table({"image": pa.array(values, pa.list_(pa.list_(number))), "label": pa.array([3, 4], whole)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    data = load_images(str(tmp_path))
    assert data.images.dtype == torch.float32
    assert torch.equal(data.images[:2], data.images[2:])
    assert data.labels.tolist() == [3, 4, 3, 4]
