"""Pins which URLs are followed, and that no name, link or archive leads out of its folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from preparing import picture
from pydantic import ValidationError
from runs import small_run

from ddil_ray.ablation.folders import study_of
from ddil_ray.config import RunConfig, load_config
from ddil_ray.config.ablation import slug
from ddil_ray.config.prepare import PrepareConfig, PrepareData
from ddil_ray.data import load_images
from ddil_ray.data.pixels import open_picture
from ddil_ray.data.prepared import Index, PreparedPrompts
from ddil_ray.errors import ConfigError, DataError
from ddil_ray.folder import RunFolder
from ddil_ray.models import load_model
from ddil_ray.models.fetch import fetch_url
from ddil_ray.places import SCHEMES, TRACKING_SCHEMES, allowed, is_below
from ddil_ray.prepare.rows import Row
from ddil_ray.prepare.sources import open_source
from ddil_ray.publish.folder import pipeline_folder
from ddil_ray.runtime.run import distill
from ddil_ray.runtime.scaling import scale

ELSEWHERE = [
    "http://169.254.169.254/latest/meta-data",
    "https://host/data",
    "ftp://host/data",
    "sftp://host/data",
    "smb://host/data",
    "github://owner:repo@main/data",  # pragma: allowlist secret
    "zip://a.zip::https://host/a.zip",
    "simplecache::s3://bucket/data",
    "zip::a.zip",
    "reference://x",
]


@pytest.mark.parametrize("url", ELSEWHERE)
@pytest.mark.parametrize(
    ("group", "key"),
    [("data", "source"), ("teacher", "model"), ("student", "model"), ("teacher_rollouts", "keep_at"), (None, "output")],
)
def test_settings_that_are_followed_take_no_other_scheme(url, group, key):
    more = {"keep_rows": 8} if key == "keep_at" else {}
    with pytest.raises(ValidationError, match=r"must be a path or (a|one) URL of abfs, "):
        small_run(**({key: url} if group is None else {group: {key: url, **more}}))


@pytest.mark.parametrize("url", [url for url in ELSEWHERE if "://" in url])
def test_nor_do_arguments_of_commands(url, tmp_path):
    for call in (load_config, load_model, pipeline_folder, lambda u: study_of([u]), lambda u: scale(u, {"labels": 1})):
        with pytest.raises(ConfigError, match=r"must be a path or (a|one) URL of abfs, "):
            call(url)
    for key in ("output", "teacher.model", "data.source"):
        tree = {"output": "out", "teacher": {"model": "m"}, "data": {"source": "d"}}
        tree[key.partition(".")[0]] = {key.partition(".")[2]: url} if "." in key else url
        with pytest.raises(ValidationError, match="must be a path or"):
            PrepareConfig.model_validate(tree)


def test_web_addresses_are_refused_with_what_to_do(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("extends: digits-pd\nname: a\n")
    code, _, said = run(capsys, "distill", tmp_path / "a.yaml", "data.source=https://host/images", "--dry-run")
    assert code == 2
    assert "`data.source` must be a path or a URL of abfs, " in said
    assert "web addresses are off" in said


@pytest.mark.parametrize("place", [*(f"{scheme}://a/b" for scheme in SCHEMES), "a/b", "/a", "owner/name", "builtin:x"])
def test_paths_buckets_and_names_are_taken(place):
    assert allowed(place) == place


@pytest.mark.parametrize(
    "uri",
    [
        *(f"{scheme}://a/b" for scheme in TRACKING_SCHEMES),
        "postgresql+psycopg2://u:p@h/d",
        "databricks",
        "mlruns",
        None,
    ],
)
def test_trackers_are_taken_where_mlflow_has_them(uri):
    assert small_run(tracking={"uri": uri}).tracking.uri == uri


def test_a_tracker_of_another_kind_is_refused():
    with pytest.raises(ValidationError, match="must be a path or a URL of databricks, file, http"):
        small_run(tracking={"uri": "gopher://host"})


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "../a", "/a", "a\\b", "", "-a", "a b", "a\n", "a\0", "x" * 101, ".ssh"]
)
def test_names_of_runs_are_names_of_folders(name):
    with pytest.raises(ValidationError, match="name"):
        small_run(name=name)


@given(st.text(max_size=30))
def test_a_run_of_any_name_that_is_taken_lies_in_its_output(name):
    try:
        RunConfig.model_validate({**small_run().model_dump(mode="json"), "name": name})
    except ValidationError:
        return
    assert os.path.dirname(os.path.normpath(os.path.join("/output", name))) == "/output"


@given(st.text(max_size=30))
def test_options_of_an_ablation_become_names_of_folders(option):
    assert os.path.dirname(os.path.normpath(os.path.join("/output", slug(option)))) == "/output"


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "a..png", "..a/b", "./a"])
def test_names_below_a_folder_are_told(name):
    assert is_below(name)


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a/../../b", "..", "", "..\\a", "a\0b"])
def test_names_that_lead_out_are_told(name):
    assert not is_below(name)


def described(folder, *names):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": "x"}) + "\n" for n in names))
    return PrepareData(source=str(folder))


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_name_that_leads_out_of_the_data_is_refused(tmp_path, absolute):
    (tmp_path / "private.png").write_bytes(picture(0))
    name = str(tmp_path / "private.png") if absolute else "../private.png"
    data = described(tmp_path / "data", name)
    with pytest.raises(
        DataError, match=r"`file_name` must name a file below the folder of its metadata.jsonl, but line 1"
    ):
        open_source(data, classes=False)


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_link_that_leads_out_of_the_data_is_refused(tmp_path, of):
    (tmp_path / "private" / "b").mkdir(parents=True)
    (tmp_path / "private" / "b" / "0.png").write_bytes(picture(0))
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "0.png").write_bytes(picture(1))
    link, target = ("a/1.png", "private/b/0.png") if of == "file" else ("b", "private/b")
    (tmp_path / "data" / link).symlink_to(tmp_path / target)
    for read in (lambda s: open_source(PrepareData(source=s), classes=True), load_images):
        with pytest.raises(
            DataError, match=r"`data.source` must hold what it consists of, but .* is a link to .*private"
        ):
            read(str(tmp_path / "data"))


def test_links_inside_the_data_and_to_all_of_it_are_followed(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "0.png").write_bytes(picture(0))
    (tmp_path / "data" / "a" / "1.png").symlink_to(tmp_path / "data" / "a" / "0.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert len(load_images(str(tmp_path / "link"), image_size=8)) == 2
    reader, shards = open_source(PrepareData(source=str(tmp_path / "link")), classes=True)
    assert len([row for shard in shards for row in reader.scan(shard)]) == 2


def test_a_parquet_file_that_is_a_link_out_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": [picture(0)], "label": [0]}), tmp_path / "private.parquet")
    (tmp_path / "data" / "a.parquet").symlink_to(tmp_path / "private.parquet")
    with pytest.raises(DataError, match="is a link to"):
        load_images(str(tmp_path / "data"))


def test_embeddings_of_no_prompt_that_are_a_link_out_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "private").write_bytes(b"")
    (tmp_path / "data" / "negative.parquet").symlink_to(tmp_path / "private")
    with pytest.raises(DataError, match="is a link to"):
        PreparedPrompts(str(tmp_path / "data"), (), ("text",)).negative()


def test_an_index_that_is_a_link_out_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "private.json").write_text("{}")
    (tmp_path / "data" / "dataset.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(DataError, match="is a link to"):
        load_images(str(tmp_path / "data"))


def test_names_and_links_in_tars_lead_nowhere(tmp_path):
    """A member is bytes of the tar: nothing is unpacked or looked up by its name."""
    (tmp_path / "private.png").write_bytes(picture(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in {"../../etc/out.png": picture(1), "../../etc/out.txt": b"a cat"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, str(tmp_path / "private.png")
            tar.addfile(link)
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
    before = sorted(tmp_path.rglob("*"))
    reader, shards = open_source(PrepareData(source=str(tmp_path / "a.tar")), classes=False)
    rows = [row for row in reader.scan(shards[0]) if isinstance(row, Row)]
    assert [row.condition for row in rows] == ["a cat"]
    assert [content() for content in reader.contents(shards[0], rows)] == [picture(1)]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("wrong", [{"prompt_files": [["../../x.parquet", 1]]}, {"buckets": {"../../x": 1}}])
def test_an_index_names_files_of_its_folder_alone(wrong):
    index = {"teacher": "t", "family": "f", "conditions": "prompts", "latent_channels": 4, **wrong}
    with pytest.raises(ValidationError, match="must lead below the folder"):
        Index.model_validate(index)


def test_an_image_of_a_kind_that_needs_another_program_is_refused():
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "EPS")
    with pytest.raises(DataError, match="must hold readable images"):
        open_picture(content.getvalue(), name="a.png")


def test_files_of_a_bucket_whose_names_lead_out_of_it_are_not_fetched(tmp_path, monkeypatch):
    """As S3 takes any name, and not every fsspec refuses it."""
    monkeypatch.setenv("DDIL_RAY_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/led-out/model_index.json", b"{}")
    memory.store["/led-out/../../../out.txt"] = memory.store["/led-out/model_index.json"]
    try:
        with pytest.raises(ConfigError, match=r"`teacher.model` must be .*'\.\./\.\./\.\./out.txt' leads out of it"):
            fetch_url("memory://led-out")
        assert not [path for path in tmp_path.rglob("*") if path.name == "out.txt"]
        del memory.store["/led-out/../../../out.txt"]
        memory.pipe_file("/led-out/unet/config.json", b"{}")
        local = fetch_url("memory://led-out")
        assert {path.relative_to(local).as_posix() for path in local.rglob("*.json")} == {
            "model_index.json",
            "unet/config.json",
        }
    finally:
        memory.rm("/led-out", recursive=True)


@pytest.mark.parametrize("of", ["a file", "a folder", "a checkpoint"])
def test_a_run_folder_with_a_link_that_leads_out_is_refused_before_anything_is_touched(tmp_path, of):
    """It may be from others: a run removes checkpoints in it, writes over its files, and sends them to the tracker."""
    config, outside = small_run(output=str(tmp_path / "runs")), tmp_path / "mine"
    folder = tmp_path / "runs" / config.name
    (folder / "checkpoints" / "attempt-1").mkdir(parents=True)
    outside.mkdir()
    (outside / "key").write_text("secret")
    link = {
        "a file": folder / "environment.json",
        "a folder": folder / "samples",
        "a checkpoint": folder / "checkpoints" / "attempt-1" / "checkpoint_0000-aaaaaa_00000001",
    }[of]
    link.symlink_to(outside / "key" if of == "a file" else outside)
    with pytest.raises(DataError, match=rf"`output` must hold what it consists of, but \S+{link.name} is a link to"):
        distill(config, resume=True)
    assert (outside / "key").read_text() == "secret"
    assert [path.name for path in folder.iterdir() if path.name == "lock.json"] == []
    link.unlink()
    link.symlink_to(folder / "checkpoints")
    RunFolder(config.output, config.name).check_links()


def test_images_of_too_many_pixels_are_refused_by_their_header_alone():
    """A file of 200 bytes that says it has 2 ** 30 pixels."""
    content = bytearray(picture(8, 8))
    content[16:24] = (2**15).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match="decompression bomb"):
        open_picture(bytes(content), name="a.png")


def test_pictures_of_16_bits_keep_their_greys():
    deep = np.array([[0, 128, 129, 257, 32767, 65535]], dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "PNG")
    assert np.asarray(open_picture(file.getvalue(), name="a.png")).tolist() == [[0, 0, 1, 1, 127, 255]]
