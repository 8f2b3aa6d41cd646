"""Rows "S3 5xx" and "torn multi-object checkpoint on S3": a real S3 endpoint behind a proxy that fails."""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections import Counter
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import run as run_command
from faulty_proxy import FAULTS
from preparing import prepare, settings, write_folder
from runs import small_run
from started import distilling
from tiny import save_pipeline

from ddil_ray.config import to_yaml
from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError, DataError
from ddil_ray.folder import RunFolder, write_whole
from ddil_ray.prepare.store import Store
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import StateRequest
from ddil_ray.storage import open_url
from ddil_ray.tracking import TRACKERS, BackgroundTracker, Journal, RunInfo
from ddil_ray.training.checkpoint import write_checkpoint
from ddil_ray.training.kept import KeptBlocks, from_parquet, kept_folder, to_parquet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def impatient(monkeypatch):
    """Two tries and a second without a byte, as a user may set them, so that what fails for ever does so soon."""
    settings = {"retries": {"total_max_attempts": 2, "mode": "standard"}, "read_timeout": 1}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": settings})


def _names(prefix=""):
    return {item.key for item in boto3.resource("s3").Bucket("bucket").objects.filter(Prefix=prefix)}


def _rows():
    return StateBatch(
        torch.randn(16, 2, 4, 4),
        *(torch.rand(16, dtype=torch.float64), torch.arange(16), torch.rand(16)),
        *(torch.ones(16, dtype=torch.int8), torch.full((16,), -1), torch.zeros(16, dtype=torch.int64)),
        label=torch.randn(16, 2, 4, 4),
    )


def _seconds(act):
    began = time.monotonic()
    act()
    return time.monotonic() - began


def _life_of_a_run(tmp_path, name):
    """A run folder, kept rows and a checkpoint are written, listed and read back by somebody else."""
    folder = RunFolder("s3://bucket/runs", name)
    files = {f"{i}/file.bin": os.urandom(1000 * (i + 1)) for i in range(4)}
    for path, content in files.items():
        (folder.local / path).parent.mkdir(parents=True, exist_ok=True)
        (folder.local / path).write_bytes(content)
    assert folder.finish() is None
    again = RunFolder("s3://bucket/runs", name)
    assert again.has("3/file.bin")
    for path in files:
        (again.local / path).parent.mkdir(parents=True)
    again.fetch(*files)
    assert {path: (again.local / path).read_bytes() for path in files} == files

    fs, root = open_url(f"s3://bucket/runs/{name}/kept")
    rows = _rows()
    write_whole(fs, f"{root}/0.parquet", to_parquet(rows))
    back = from_parquet(fs.cat_file(f"{root}/0.parquet"))
    assert all(torch.equal(a, b) for a, b in zip(vars(rows).values(), vars(back).values(), strict=True))
    assert [path.rpartition("/")[2] for path in fs.ls(root, detail=False)] == ["0.parquet"]

    store = Store(f"s3://bucket/runs/{name}/prepared")
    table = pa.table({"n": np.arange(1000)})
    with store.new_parquet("latents/a.parquet") as file:
        file.write(table)
    assert store.stems("latents") == {"a"}
    assert store.read_table("latents/a.parquet") == table


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_twice_is_done_again_and_nobody_notices(s3, tmp_path, recovery, fault):
    """Of every kind of request the first two fail, or one where each costs a second or s3fs alone can see it."""
    left, calm = {}, _seconds(lambda: _life_of_a_run(tmp_path, "calm"))

    def some(method, path):
        kind = method, re.sub(r"\W.*", "", path.partition("?")[2])
        left[kind] = left.get(kind, 1 if fault in ("truncate", "503") else 2) - 1
        return fault if left[kind] >= 0 else None

    s3.fault = some
    took = _seconds(lambda: _life_of_a_run(tmp_path, fault))
    recovery(f"more than undisturbed, where {s3.seen[fault]} requests to S3 fail ({fault})", took - calm)
    assert s3.seen[fault] >= 4
    assert not {name for name in _names() if name.rpartition("/")[2].startswith(".")}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_all_requests_may_fail_in_any_way(s3, tmp_path, seed):
    s3.seeded(0.1, seed)
    for turn in range(4):
        _life_of_a_run(tmp_path, f"{seed}-{turn}")
    assert sum(s3.seen[fault] for fault in FAULTS) > 5


def test_an_answer_that_takes_six_seconds_is_waited_for(s3):
    fs, _ = open_url("s3://bucket")
    fs.pipe_file("bucket/a", b"content")
    s3.script("slow", only=lambda method, path: method == "GET")
    s3.slow_s = 6
    assert fs.cat_file("bucket/a") == b"content"


@pytest.mark.slow
def test_a_storage_that_is_busy_for_ever_is_given_up_after_a_minute_or_so(s3, recovery):
    """Eight tries of botocore, twice, as s3fs repeats what the storage calls SlowDown."""
    fs, _ = open_url("s3://bucket")
    fs.exists("bucket/a")
    s3.seen.clear()
    s3.always("503")
    began = time.monotonic()
    with pytest.raises(OSError, match="reduce your request rate"):
        fs.pipe_file("bucket/a", b"content")
    took = time.monotonic() - began
    recovery("until an S3 that answers 503 for ever is given up", took)
    assert s3.seen["503"] == 16
    assert 5 < took < 200


@pytest.mark.parametrize(
    ("patience", "at_most_s"),
    [("impatient", 30), pytest.param("default", 600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_a_server_that_never_answers_is_given_up(s3, recovery, request, patience, at_most_s):
    if patience == "impatient":
        request.getfixturevalue("impatient")
    s3.always("hang")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"`output` must be a folder or URL that can be written"):
        RunFolder("s3://bucket/runs", "a")
    took = time.monotonic() - began
    recovery(f"until an S3 that never answers is given up ({patience})", took)
    assert took < at_most_s


def test_a_users_own_settings_of_s3_stand_above_ours(monkeypatch):
    theirs = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"read_timeout": 3}}
    monkeypatch.setitem(fsspec.config.conf, "s3", theirs)
    fs, path = open_url("s3://bucket/a")
    assert (path, fs.endpoint_url) == ("bucket/a", "http://127.0.0.1:9")
    assert fs.config_kwargs["read_timeout"] == 3
    assert fs.config_kwargs["retries"]["total_max_attempts"] == 8
    chained, _ = open_url("simplecache::s3://bucket/a")
    assert chained.fs.config_kwargs == fs.config_kwargs
    local, path = open_url("/tmp/s3")
    assert (local.storage_options, path) == ({}, "/tmp/s3")


def test_no_module_opens_filesystems_by_itself():
    """So that retries, and what may be opened at all, are decided in one place."""
    package = ROOT / "ddil_ray"
    opens = re.compile(r"url_to_fs\(|fsspec\.(open|filesystem|get_mapper)\(|S3FileSystem\(")
    found = {path.name for path in package.rglob("*.py") if opens.search(path.read_text())}
    assert found == {"storage.py"}


def test_what_others_write_is_seen_at_once(s3, tmp_path):
    """boto3 stands for another process: nothing that was listed before is remembered."""
    client = boto3.client("s3")
    folder, store = RunFolder("s3://bucket/runs", "a"), Store("s3://bucket/runs/a/prepared")
    checkpoints = CheckpointStore("s3://bucket/runs/a/checkpoints")
    assert (folder.has("checkpoints"), store.stems("latents"), checkpoints.attempts()) == (False, set(), [])
    for key in ("checkpoints/attempt-1/x", "prepared/latents/b.parquet"):
        client.put_object(Bucket="bucket", Key=f"runs/a/{key}", Body=b"1")
    assert (folder.has("checkpoints"), store.stems("latents"), checkpoints.attempts()) == (True, {"b"}, [1])
    client.delete_object(Bucket="bucket", Key="runs/a/prepared/latents/b.parquet")
    assert store.stems("latents") == set()


@pytest.mark.timeout(120)
def test_large_files_go_in_parts_and_a_part_that_fails_is_sent_again(s3, recovery):
    """Two parts of 50 MiB and one of ten; bytes say where they belong."""
    folder = RunFolder("s3://bucket/runs", "a")
    content = b"".join(bytes([part]) * 2**20 for part in range(110))
    (folder.local / "weights.safetensors").write_bytes(content)
    parts = lambda method, path: method == "PUT" and "partNumber" in path  # noqa: E731
    s3.script("503", "reset", only=parts)
    recovery("for 110 MiB to S3, of which a part fails and then another", _seconds(folder.sync))
    assert folder.finish() is None
    found = boto3.client("s3").get_object(Bucket="bucket", Key="runs/a/weights.safetensors")
    assert (found["ETag"].strip('"').partition("-")[2], s3.seen["503"], s3.seen["reset"]) == ("3", 1, 1)
    assert found["Body"].read() == content


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("impatient")
def test_a_large_file_whose_part_cannot_be_sent_leaves_the_old_one_and_no_parts(s3):
    folder, client = RunFolder("s3://bucket/runs", "a"), boto3.client("s3")
    (folder.local / "weights.safetensors").write_bytes(b"old")
    folder.sync()
    with (folder.local / "weights.safetensors").open("wb") as file:
        file.truncate(110 * 2**20)
    s3.always("503", only=lambda method, path: "partNumber=2" in path)
    assert "1 files are missing or old there (weights.safetensors)" in folder.finish()
    s3.calm()
    assert client.get_object(Bucket="bucket", Key="runs/a/weights.safetensors")["Body"].read() == b"old"
    assert "Uploads" not in client.list_multipart_uploads(Bucket="bucket")


def _staged(folder, step):
    folder.mkdir()
    weights = torch.full((8,), float(step))
    learner = {"student": {"w": weights}, "optimizers": {}, "rounds": {4: {"w": weights}}}
    write_checkpoint(folder, {"step": step, "learner": learner, "rank": {"taken": {0: 1}}}, rank=0, ranks=1)
    return folder


@pytest.mark.usefixtures("impatient")
def test_a_checkpoint_that_is_torn_at_any_upload_is_passed_over_for_the_one_before(s3, tmp_path):
    """The storage goes away for good after each number of objects, so that nothing can be cleaned up either."""

    def gone_after(uploads):
        left = [uploads]

        def fault(method, path):
            if method == "PUT":
                left[0] -= 1
            return "reset" if left[0] < 0 else None

        return fault

    store, said = CheckpointStore("s3://bucket/torn/checkpoints"), []
    store.put(f"attempt-1/checkpoint_0001-aa_{10:09d}", _staged(tmp_path / "10", 10))
    files = _staged(tmp_path / "20", 20)
    for uploads in range(len(list(files.iterdir()))):
        s3.fault = gone_after(uploads)
        with pytest.raises(Exception, match=r"(?i)connect"):
            store.put(f"attempt-1/checkpoint_0002-{uploads:02d}_{20:09d}", files)
        s3.calm()
        assert store.newest(said.append).step == 10
    assert any("no manifest, so its writing was cut off" in text for text in said)
    store.put(f"attempt-1/checkpoint_0003-aa_{20:09d}", files)
    assert store.newest(pytest.fail).step == 20
    store.prune(1)
    assert {name.split("/")[3] for name in _names("torn/")} == {f"checkpoint_0003-aa_{20:09d}"}


def test_a_checkpoint_that_was_found_damaged_counts_for_none_that_are_kept(s3, tmp_path):
    client, store = boto3.client("s3"), CheckpointStore("s3://bucket/damaged/checkpoints")
    for step in (10, 20, 30):
        store.put(f"attempt-1/checkpoint_0001-aa_{step:09d}", _staged(tmp_path / f"{step}", step))
    key = f"damaged/checkpoints/attempt-1/checkpoint_0001-aa_{30:09d}/learner.safetensors"
    content = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    client.put_object(Bucket="bucket", Key=key, Body=content[:-1] + bytes([content[-1] ^ 1]))
    assert CheckpointStore(store.url).newest(print).step == 20
    store.put(f"attempt-1/checkpoint_0002-aa_{40:09d}", _staged(tmp_path / "40", 40))
    store.prune(2)
    kept = {name.split("/")[3] for name in _names("damaged/")}
    assert kept == {f"checkpoint_0001-aa_{20:09d}", f"checkpoint_0002-aa_{40:09d}"}


@pytest.mark.usefixtures("impatient")
def test_a_failed_copy_is_told_once_and_made_again_with_the_next_one(s3):
    folder, said = RunFolder("s3://bucket/runs", "a"), []
    (folder.local / "metrics.jsonl").write_text("1\n")
    s3.always("503")
    for _ in range(2):
        before = s3.seen["503"]
        began = time.monotonic()
        folder.sync_soon(said.append)
        assert time.monotonic() - began < 0.5  # nobody waits
        _until(lambda before=before: s3.seen["503"] > before and not folder._mirror._asked.is_set())
        time.sleep(0.5)
    _until(lambda: said)
    s3.calm()
    folder.sync_soon(said.append)
    _until(lambda: len(said) == 2)
    assert said[0].startswith("s3://bucket/runs/a could not be written ([Errno 16] Please reduce your")
    assert said[1] == "s3://bucket/runs/a is written again, and has everything."
    (folder.local / "metrics.jsonl").write_text("1\n2\n")
    assert folder.finish() is None
    assert boto3.client("s3").get_object(Bucket="bucket", Key="runs/a/metrics.jsonl")["Body"].read() == b"1\n2\n"


@pytest.mark.usefixtures("impatient")
def test_what_could_not_be_copied_is_named_at_the_end_with_exit_code_one(s3, capsys):
    s3.always("503", only=lambda method, path: method == "PUT" and "/teacher/" in path)
    overrides = ("trainer.steps=2", "output=s3://bucket/teachers", "name=a")
    code, _, err = run_command(capsys, "train-teacher", "digits-teacher", *overrides)
    assert code == 1
    (message,) = (line for line in err.splitlines() if line.startswith("Error: "))
    assert "s3://bucket/teachers/a could not be written ([Errno 16] Please reduce your request rate.)" in message
    local = Path(re.search(r"All of them are in (\S+)\. Copy them", message)[1])
    assert (local / "teacher" / "model_index.json").exists()
    assert not _names("teachers/a/teacher")


def _put_parquet(key, **columns):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    boto3.client("s3").put_object(Bucket="bucket", Key=key, Body=buffer.getvalue())


@pytest.mark.parametrize("fault", FAULTS)
def test_training_data_are_read_through_faults(s3, fault):
    images = np.random.default_rng(0).uniform(-1, 1, (8, 16)).astype(np.float32)
    for part in range(2):
        rows = [row.reshape(4, 4).tolist() for row in images[4 * part : 4 * part + 4]]
        _put_parquet(f"data/{part}.parquet", image=rows, label=[part] * 4)
    s3.script(None, fault, None, fault, None, None, fault)
    data = load_images("s3://bucket/data")
    np.testing.assert_array_equal(data.images[:, 0].reshape(8, 16).numpy(), images)
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert s3.seen[fault] >= 2


@pytest.mark.usefixtures("impatient")
def test_training_data_that_cannot_be_read_are_one_message(s3):
    _put_parquet("data/0.parquet", image=[[[0.0]]], label=[0])
    s3.always("503", only=lambda method, path: method == "GET" and path.endswith("parquet"))
    with pytest.raises(DataError, match=r"`data.source` must .* bucket/data/0.parquet cannot be read \(.*rate"):
        load_images("s3://bucket/data")
    s3.always("503")
    with pytest.raises(DataError, match=r"`data.source` must be .* reduce your request rate"):
        load_images("s3://bucket/data")


def test_data_are_prepared_on_s3_through_faults_with_every_row_once(s3, tmp_path):
    teacher = save_pipeline("stable_diffusion", tmp_path / "teacher")
    source = write_folder(tmp_path / "source", ["a cat", "a dog", "a cat", "birds", "a dog"])
    here = prepare(settings(teacher, source, tmp_path / "out", dtype="fp32", rows_per_file=2))
    fs, _ = open_url("s3://bucket")
    fs.put(f"{source}/", "bucket/source/", recursive=True)
    s3.seeded(0.1, 1)
    done = prepare(settings(teacher, "s3://bucket/source", "s3://bucket/out", dtype="fp32", rows_per_file=2))
    assert sum(s3.seen[fault] for fault in FAULTS) > 3
    assert done[1:4] == here[1:4]
    found, expected = load_images("s3://bucket/out"), load_images(str(tmp_path / "out"))
    torch.testing.assert_close(found.images, expected.images)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.prompts.texts() == expected.prompts.texts()
    rows, same = (data.prompts.rows([2, 0, 1])["prompt"] for data in (found, expected))
    torch.testing.assert_close(rows, same)


@pytest.mark.usefixtures("impatient")
def test_rows_are_made_and_not_kept_while_the_storage_fails(s3, caplog):
    """It is asked once a minute whether it works, so that the teacher waits for it but once."""
    rows, asked = _rows(), []
    kept = KeptBlocks(4, "s3://bucket/kept", "a")
    kept._teachers[0] = "teacher"

    def make(request):
        asked.append(request.index)
        return rows

    def block(index):
        return kept.block(StateRequest(Origin.TEACHER, 0, index, 16, seed=0), None, make)

    s3.always("503")
    block(0)
    failed = s3.seen["503"]
    block(1)
    assert (asked, s3.seen["503"], failed > 0) == ([0, 1], failed, True)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("ddil_ray")]
    assert said.startswith("Blocks are made and not kept for 60 s: bucket/kept/teacher/000000.parquet: ")
    s3.calm()
    kept._rests_until = 0.0
    block(1)
    block(1)
    assert asked == [0, 1, 1]
    assert _names("kept/") == {"kept/teacher/000001.parquet"}


@pytest.mark.usefixtures("impatient")
def test_a_place_for_kept_rows_that_fails_is_refused_at_the_start(s3):
    s3.always("503")
    config = small_run(states={"forward": 0.5, "teacher": 0.5}, teacher_rollouts={"batch_size": 16, "keep_rows": 16})
    with pytest.raises(ConfigError, match=r"`teacher_rollouts.keep_at` must be .* reduce your request rate"):
        kept_folder(config, "s3://bucket/runs/a")


@pytest.mark.parametrize("failures", [("503", "reset"), pytest.param(("503",) * 12, marks=pytest.mark.slow)])
def test_mlflow_keeps_its_files_on_s3(s3, tmp_path, recovery, caplog, failures):
    """Few failures are boto3's to repeat; after more than it repeats, the tracker's thread begins again."""
    from mlflow.tracking import MlflowClient

    uri, folder = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "student"
    MlflowClient(uri).create_experiment("tests", artifact_location="s3://bucket/mlartifacts")
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(9 * 2**20))  # beyond boto3's 8 MiB: in parts
    (tmp_path / "report.html").write_text("<p>")
    tracker = TRACKERS["mlflow"](uri=uri, experiment="tests", timeout_s=5.0)
    paths = {"journal": tmp_path / "metrics.jsonl", "state": tmp_path / "tracking.json"}
    background = BackgroundTracker(tracker, RunInfo("a", params={}, tags={}), **paths, timeout_s=30.0)
    background.start()
    Journal(paths["journal"]).append([{"step": 0, "loss": 1.0}])
    s3.script(*failures, only=lambda method, path: method == "PUT")
    began = time.monotonic()
    assert background.finish("finished", [folder, tmp_path / "report.html"]) is None
    recovery(f"until MLflow has 9 MiB on S3, where {len(failures)} requests fail", time.monotonic() - began)
    assert {kind: s3.seen[kind] for kind in set(failures)} == Counter(failures)
    assert ("will be tried again" in caplog.text) == (len(failures) > 2)
    run = json.loads(paths["state"].read_text())["run_id"]
    client = MlflowClient(uri)
    assert sorted(a.path for a in client.list_artifacts(run)) == ["report.html", "student"]
    back = client.download_artifacts(run, "student/model.safetensors", str(tmp_path))
    assert Path(back).read_bytes() == (folder / "model.safetensors").read_bytes()


def _until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _distil(log, *arguments):
    with distilling(log, *arguments) as run:
        assert run.process.wait(400) == 0, run.said()[-3000:]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_on_s3_outlasts_a_storm_of_503_and_goes_on_from_there(s3, tmp_path, recovery):
    """Data, kept rows, checkpoints and the run folder are on S3, which is busy for ten seconds in mid training."""
    images = np.random.default_rng(0).uniform(-1, 1, (64, 8, 8)).astype(np.float32)
    _put_parquet("data/0.parquet", image=[image.tolist() for image in images], label=[i % 10 for i in range(64)])
    config = small_run(
        output="s3://bucket/runs",
        data={"source": "s3://bucket/data"},
        states={"forward": 0.5, "teacher": 0.5},
        teacher_rollouts={"batch_size": 16, "keep_rows": 64},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    storm: list[float] = []
    saved: list[float] = []

    def fault(method, path):
        if not storm and method == "PUT" and "checkpoint_" in path:
            storm.append(time.monotonic())
        if storm and time.monotonic() - storm[0] < 10:
            return "503"
        if storm and method == "PUT" and "manifest-" in path:
            saved.append(time.monotonic() - storm[0] - 10)
        return None

    s3.fault = fault
    _distil(tmp_path / "log", tmp_path / "run.yaml")
    assert s3.seen["503"] > 3
    recovery("after ten seconds of 503 until a checkpoint is whole", saved[0])
    names = _names("runs/small/")
    assert {f"runs/small/{n}" for n in ("config.yaml", "metrics.jsonl", "report.html", "metrics.json")} <= names
    assert any(name.startswith("runs/small/kept/") for name in names)
    assert any(name.endswith("manifest-0-of-1.json") for name in names)
    student = boto3.client("s3").get_object(Bucket="bucket", Key="runs/small/student/model.safetensors")["Body"].read()

    s3.seeded(0.05, 0)
    _distil(tmp_path / "log", "--resume", "s3://bucket/runs/small")  # nothing is left but to write the results
    again = boto3.client("s3").get_object(Bucket="bucket", Key="runs/small/student/model.safetensors")["Body"].read()
    assert again == student
