"""Pins preparing on Ray: a driver killed in the middle, and run again, leaves every row once."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch
from preparing import (
    assert_every_row_once,
    kill_after,
    picture,
    prepare,
    quiet,
    settings,
    start,
    write_folder,
    write_pairs,
)
from tiny import save_pipeline

from ddil_ray.config import to_yaml
from ddil_ray.data import load_images
from ddil_ray.errors import DataError
from ddil_ray.prepare import new_job

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_pipeline("stable_diffusion", tmp_path_factory.mktemp("teacher"))


@pytest.mark.usefixtures("ray_cluster")
def test_actors_prepare_what_one_process_does(teacher, tmp_path):
    from ddil_ray.runtime.prepare import prepare as prepare_on_ray

    source = write_folder(tmp_path / "source", [f"caption {i % 5}" for i in range(23)])
    (source / "007.png").write_bytes(b"torn")
    more = {"rows_per_file": 4, "dtype": "fp32"}
    prepare(settings(teacher, source, tmp_path / "here", **more))
    actors = {"encode_images": {"num_actors": 2}, "encode_prompts": {"num_actors": 2}}
    job = new_job(settings(teacher, source, f"file://{tmp_path}/ray", **more, **actors))
    done = prepare_on_ray(job, view=quiet())
    assert (done.buckets, done.prompts, done.skipped) == ({"16x16": 22}, 5, 1)
    assert done.images_per_s > 0
    here, on_ray = load_images(str(tmp_path / "here")), load_images(str(tmp_path / "ray"))
    torch.testing.assert_close(on_ray.images, here.images)
    assert torch.equal(on_ray.labels, here.labels)
    assert on_ray.prompts.texts() == here.prompts.texts()
    torch.testing.assert_close(on_ray.prompts.rows([3])["prompt"], here.prompts.rows([3])["prompt"])
    skipped = [(tmp_path / name / "skipped.jsonl").read_text() for name in ("here", "ray")]
    assert skipped[0] == skipped[1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_mistake_deep_in_the_source_is_one_message(teacher, tmp_path):
    from ddil_ray.runtime.prepare import prepare as prepare_on_ray

    lines = [json.dumps({"file_name": "a.png", "text": "a"})] * 200
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.png").write_bytes(picture(0))
    (tmp_path / "source" / "metadata.jsonl").write_text("\n".join([*lines, "oops"]))
    with pytest.raises(DataError, match="line 201 is 'oops' instead"):
        prepare_on_ray(new_job(settings(teacher, tmp_path / "source", tmp_path / "out")), view=quiet())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_pairs_are_prepared_once_though_the_driver_is_killed(teacher, tmp_path):
    """With a Ray of the command's own, which dies with it."""
    write_pairs(tmp_path / "source", 10_000, tars=8, captions=700)
    config = settings(teacher, tmp_path / "source", tmp_path / "out", rows_per_file=250)
    (tmp_path / "prepare.yaml").write_text(to_yaml(config))
    command = "from ddil_ray.cli import main; main(['prepare', 'prepare.yaml', '--json'])"
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # a short path: names of sockets have a limit
        kill_after(start(command, tmp_path, RAY_TMPDIR=folder), tmp_path / "out", items=20)
        done = len(list((tmp_path / "out" / "work" / "done").iterdir()))
        out, err = start(command, tmp_path, RAY_TMPDIR=folder).communicate()
    print(f"{done} of 40 items before the kill; then {out}{err[-2000:]}")  # noqa: T201
    assert 20 <= done < 40
    assert json.loads(out)["buckets"] == {"16x16": 10_000}
    assert_every_row_once(tmp_path / "out", 10_000, captions=700)
