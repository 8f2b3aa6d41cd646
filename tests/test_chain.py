"""Pins pipelines that chain: which stages are done, skipped and done again, and what a mistake looks like."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import run
from pages import blocks
from studies import write_run

from ddil_ray.chain import Chain, versions
from ddil_ray.config import ChainConfig, load_config
from ddil_ray.folder import RunFolder
from ddil_ray.runtime.lock import RunLock

ROOT = Path(__file__).parents[1]
TEACHER = {
    "extends": "digits-teacher",
    "model": {"block_out_channels": [8, 16]},
    "trainer": {"steps": 2, "batch_size": 16},
}
DISTILL = {"extends": "digits-lcm", "trainer": {"steps": 2}}


@pytest.fixture
def written(tmp_path):
    """Writes the config of a chain."""

    def write(**stages):
        path = tmp_path / "chain.yaml"
        path.write_text(yaml.safe_dump({"name": "c", "output": str(tmp_path / "runs"), **stages}))
        return path

    return write


def _told(capsys, *arguments):
    code, out, err = run(capsys, "chain", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["stages"]


def _done(pipeline, name, files):
    """A stage that left `files`, written by hand."""
    stage = pipeline.stage(name)
    for file, content in files.items():
        path = Path(pipeline.url, stage.folder, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    pipeline.finish(stage, 1.0)
    return stage


def _chain(folder, **stages):
    return Chain(ChainConfig.model_validate({"name": "c", "output": str(folder), **stages}))


def test_what_is_done_is_skipped_and_what_changes_is_done_again(capsys, written):
    config = written(train_teacher=TEACHER)
    first = _told(capsys, config)["train_teacher"]
    assert (first["state"], first["why"]) == ("done", "it was not done before")
    assert Path(first["folder"], "teacher", "model_index.json").exists()
    again = _told(capsys, config)["train_teacher"]
    assert (again["state"], again["folder"]) == ("skipped", first["folder"])
    other = _told(capsys, config, "train_teacher.trainer.steps=3")["train_teacher"]
    assert (other["state"], other["why"]) == ("done", "trainer.steps was 2 and is 3")
    assert other["folder"] != first["folder"]
    assert _told(capsys, config)["train_teacher"]["folder"] == first["folder"]
    shutil.rmtree(first["folder"])
    assert "its folder is gone" in run(capsys, "chain", config)[2]


def test_what_was_cut_off_is_done_again_from_nothing(capsys, written):
    config = written(train_teacher=TEACHER)
    folder = Path(_told(capsys, config)["train_teacher"]["folder"])
    folder.with_name(f"{folder.name}.json").unlink()
    (folder / "teacher" / "half").touch()
    told = _told(capsys, config)["train_teacher"]
    assert (told["state"], told["why"]) == ("done", "it was begun and not finished")
    assert not (folder / "teacher" / "half").exists()
    folder.with_name(f"{folder.name}.json").write_text('{"stage": "train_')
    assert _told(capsys, config)["train_teacher"]["state"] == "done"


def test_the_first_stage_that_fails_ends_it_with_its_own_message(capsys, written):
    config = written(train_teacher=TEACHER, prepare={"data": {"source": "emoji"}}, distill=DISTILL)
    code, out, err = run(capsys, "chain", config)
    assert code == 2
    assert out.splitlines()[0].startswith("train_teacher  done      ")
    assert "prepare has not been done. The same command goes on from here." in err
    assert err.splitlines()[-1].startswith("Error: `teacher.model` must be a teacher of latents")
    assert len(out.splitlines()) == 1
    code, out, _ = run(capsys, "chain", config)
    assert code == 2
    assert out.startswith("train_teacher  skipped   ")


def test_a_dry_run_tells_what_is_to_do_and_leaves_nothing(capsys, written, tmp_path):
    config = written(train_teacher=TEACHER, distill=DISTILL, export={})
    code, out, _ = run(capsys, "chain", config, "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "train_teacher  to do     it was not done before",
        "prepare        left out",
        "distill        to do     after train_teacher",
        "baseline       left out",
        "evaluate       left out",
        "compare        left out",
        "export         to do     after distill",
        "Nothing was started.",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_stage_alone_needs_those_before_it(capsys, written):
    config = written(train_teacher=TEACHER, distill=DISTILL, export={})
    code, _, err = run(capsys, "chain", config, "--only", "distill")
    assert code == 2
    assert "`--only` must come after the stages that distill needs, but train_teacher must be done first" in err
    told = _told(capsys, config, "--only", "train_teacher")
    assert [told[name]["state"] for name in ("train_teacher", "distill", "export")] == ["done", "to do", "to do"]
    code, _, err = run(capsys, "chain", config, "--only", "compare")
    assert code == 2
    assert "`--only` must be one of the stages of CONFIG, train_teacher, distill, export, but is 'compare'" in err


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ({}, "one of the stages train_teacher, prepare, distill"),
        ({"evaluate": {}}, "`distill` must be given where evaluate is"),
        ({"distill": DISTILL, "compare": {}}, "`compare.runs` must name a finished run where baseline is left out"),
        ({"distill": {**DISTILL, "name": "x"}}, "`distill.name` must be left out"),
        (
            {"train_teacher": TEACHER, "distill": {"teacher": {"model": "x"}}},
            "`distill.teacher.model` must be left out",
        ),
        (
            {"distill": DISTILL, "export": {"variant": True}},
            "`export.dtype` must be fp16 or bf16 where variant is true",
        ),
        ({"distil": DISTILL}, "`distil` is not a setting. Did you mean `distill`?"),
        ({"distill": {**DISTILL, "trainer": {"stepz": 1}}}, "`trainer.stepz` is not a setting of `trainer`"),
        ({"distill": {"extends": "/nowhere.yaml"}}, "/nowhere.yaml"),
        ({"train_teacher": TEACHER, "distill": DISTILL, "evaluate": {"seed": -1}}, "`evaluate` is not a valid config"),
        (
            {"distill": {**DISTILL, "evaluation": {"enabled": False}}, "baseline": {"seed": 1}, "compare": {}},
            "`distill.evaluation.enabled` must be true where `compare` is given, but is false",
        ),
    ],
)
def test_bad_input_is_one_message_and_nothing_starts(capsys, written, tmp_path, stages, expected):
    code, out, err = run(capsys, "chain", written(**stages))
    assert code == 2
    assert err.startswith("Error: ")
    assert expected in err
    assert out == ""
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def nothing_at_hand(monkeypatch, tmp_path):
    """No token of the hub, and no package of ONNX."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
@pytest.mark.usefixtures("nothing_at_hand")
def test_what_the_last_stages_need_is_looked_for_before_the_first_starts(capsys, written, tmp_path, more):
    runs = [write_run(tmp_path, "whole"), write_run(tmp_path, "cut", finished=False), str(tmp_path / "nowhere")]
    export = {"push": "me/digits", "onnx": True}
    config = written(train_teacher=TEACHER, distill=DISTILL, compare={"runs": runs}, export=export)
    code, out, err = run(capsys, "chain", config, *more)
    assert (code, out) == (2, "")
    said = err.splitlines()
    assert len(said) == 4
    assert f"`compare.runs` must be a finished run, but {tmp_path}/cut has no metrics.json" in said[0]
    assert f"`compare.runs` must be the folder of a run, but {tmp_path}/nowhere has no config.yaml" in said[1]
    assert said[2].startswith("`export.push` must have a token of the hub")
    assert said[3].startswith("`export.onnx` must have onnx, onnxscript and onnxruntime, but onnxscript is missing")
    assert not (tmp_path / "runs").exists()
    code, _, err = run(capsys, "chain", config, "export.push=a/b/c", *more)
    assert (code, "`export.push` must be owner/name, but is 'a/b/c' instead" in err) == (2, True)


@pytest.mark.usefixtures("nothing_at_hand")
def test_stages_that_are_done_or_not_chosen_need_nothing(capsys, written, tmp_path):
    settings = {"distill": DISTILL, "export": {"push": "me/digits"}}
    pipeline = _chain(tmp_path / "runs", **settings)
    _done(pipeline, "distill", {"metrics.json": "{}"})
    assert run(capsys, "chain", written(**settings), "--only", "distill", "--dry-run")[0] == 0
    assert run(capsys, "chain", written(**settings), "--dry-run")[0] == 2
    _done(pipeline, "export", {"model_index.json": "{}"})
    told = _told(capsys, written(**settings))
    assert (told["distill"]["state"], told["export"]["state"]) == ("skipped", "skipped")


@pytest.mark.parametrize("source", ["digits-chain", "page"])
def test_all_settings_of_the_pipelines_that_are_shown_are_right(tmp_path, source):
    if source == "page":
        (block,) = (block for block in blocks(ROOT / "docs" / "chain.md") if block.language == "yaml")
        source = str(tmp_path / "pipeline.yaml")
        Path(source).write_text(block.text)
    pipeline = Chain(load_config(source, [f"output={tmp_path}"], kind=ChainConfig))
    assert pipeline.config.stages == ["train_teacher", "distill", "baseline", "evaluate", "compare", "export"]
    assert pipeline.stage("train_teacher").why == "it was not done before"


def test_two_chains_do_not_share_a_folder(capsys, written, tmp_path):
    config = written(train_teacher=TEACHER)
    with RunLock(RunFolder(str(tmp_path / "runs"), "c"), print):
        code, _, err = run(capsys, "chain", config)
    assert code == 2
    assert "`name` must be that of no run that is active" in err


def test_a_record_of_what_was_deleted_is_not_taken_for_what_was_cut_off_after_it(tmp_path):
    done = _done(_chain(tmp_path, distill=DISTILL), "distill", {"metrics.json": "{}"})
    folder = Path(tmp_path, "c", done.folder)
    shutil.rmtree(folder)
    pipeline = _chain(tmp_path, distill=DISTILL)
    stage = pipeline.stage("distill")
    assert (stage.result, stage.why) == (None, "its folder is gone")
    pipeline.begin(stage)
    folder.mkdir()
    stage = _chain(tmp_path, distill=DISTILL).stage("distill")
    assert (stage.result, stage.why) == (None, "it was begun and not finished")


def test_where_and_how_a_stage_runs_decides_nothing(tmp_path):
    usual = _chain(tmp_path, distill=DISTILL).stage("distill")
    elsewhere = {
        **DISTILL,
        "trainer": {"steps": 2, "num_workers": 2, "max_failures": 0},
        "student_rollouts": {"num_actors": 4, "label_selector": {"pool": "rollout"}},
        "checkpoint": {"every": 1},
        "tracking": {"tracker": "none"},
        "faults": {"max_deaths": 1},
    }
    assert _chain(tmp_path, distill=elsewhere).stage("distill").folder == usual.folder
    assert _chain(tmp_path / "moved", distill=DISTILL).stage("distill").folder == usual.folder
    other = {**DISTILL, "trainer": {"steps": 2, "lr": 0.1}}
    assert _chain(tmp_path, distill=other).stage("distill").folder != usual.folder


def test_files_that_a_stage_names_decide_it(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"one")
    distill = {**DISTILL, "data": {"source": str(photos)}}
    _done(_chain(tmp_path, distill=distill), "distill", {"metrics.json": "{}"})
    assert _chain(tmp_path, distill=distill).stage("distill").result is not None
    (photos / "b.png").write_bytes(b"two")
    stage = _chain(tmp_path, distill=distill).stage("distill")
    assert (stage.result, stage.why) == (None, "content of data.source is another")
    (photos / "b.png").unlink()
    assert _chain(tmp_path, distill=distill).stage("distill").result is not None
    os.utime(photos / "a.png", ns=(0, 0))
    assert _chain(tmp_path, distill=distill).stage("distill").result is None


def test_the_files_of_one_name_are_a_version_too(tmp_path):
    assert versions(str(tmp_path / "weights"), "teacher.weights") is None
    (tmp_path / "weights").write_bytes(b"one")
    before = versions(str(tmp_path / "weights"), "teacher.weights")
    (tmp_path / "weights").write_bytes(b"other")
    assert versions(str(tmp_path / "weights"), "teacher.weights") != before


def test_what_another_stage_left_decides_a_stage_by_its_bytes(tmp_path):
    def student_of(weights):
        pipeline = _chain(tmp_path / weights, train_teacher=TEACHER, distill=DISTILL, export={})
        assert pipeline.missing("distill") == ["train_teacher"]
        _done(pipeline, "train_teacher", {"teacher/model_index.json": "{}", "teacher/unet/w": weights, "log": weights})
        assert (pipeline.missing("distill"), pipeline.missing("export")) == ([], ["distill"])
        return pipeline.stage("distill")

    one, two = student_of("one"), student_of("two")
    assert one.folder != two.folder
    assert one.config.teacher.model.endswith("/teacher")
    assert Path(one.config.teacher.model, "unet", "w").read_text() == "one"
    shutil.rmtree(tmp_path / "one")
    again = student_of("one")
    assert (again.folder, again.why) == (one.folder, "it was not done before")


def test_a_baseline_is_the_run_with_other_settings(tmp_path):
    pipeline = _chain(
        tmp_path, distill=DISTILL, baseline={"states": {"forward": 1.0, "student": 0.0}}, compare={"runs": ["r"]}
    )
    assert pipeline.missing("compare") == ["distill", "baseline"]
    student = _done(pipeline, "distill", {"metrics.json": "1"})
    baseline = _done(pipeline, "baseline", {"metrics.json": "2"})
    assert (student.config.states.student, baseline.config.states.student) == (0.5, 0.0)
    assert baseline.config.trainer == student.config.trainer
    runs = [Path(run).name for run in pipeline.students("compare")]
    assert runs == [baseline.config.name, student.config.name]
    assert runs[0].startswith("c-baseline-")


def test_a_chain_lies_at_a_url(capsys, written, s3):
    config = written(train_teacher=TEACHER, output="s3://bucket/chains")
    told = _told(capsys, config)["train_teacher"]
    assert told["state"] == "done"
    assert told["folder"].startswith("s3://bucket/chains/c/c-train-teacher-")
    assert versions(f"{told['folder']}/teacher", "teacher.model") is not None
    assert _told(capsys, config)["train_teacher"] == {
        "state": "skipped",
        "why": "done before",
        "folder": told["folder"],
    }


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_whole_pipeline_goes_on_after_a_signal_and_does_what_is_missing(capsys, written, tmp_path):
    measured = {"num_samples": 64, "steps": [1, 4], "teacher_steps": 8}
    config = written(
        train_teacher={**TEACHER, "trainer": {"steps": 30, "batch_size": 32}},
        distill={
            "extends": "digits-lcm",
            "trainer": {"steps": 100, "batch_size": 16},
            "checkpoint": {"every": 5},
            "shift": {"enabled": False},
            "tracking": {"tracker": "none", "log_every": 1},
            "evaluation": measured,
        },
        baseline={"states": {"forward": 1.0, "student": 0.0}, "trainer": {"steps": 8}},
        evaluate={"evaluation": {"num_samples": 96}},
        compare={},
        export={"dtype": "fp16"},
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "pipelines" / "chain.py"), str(config), "--json"]

    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "runs" / "c").glob("c-distill-*/checkpoints/*/*/manifest*")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 143, err[-3000:]
    assert "distill has not been done. The same command goes on from here." in err
    assert "Stopped by SIGTERM" in err.splitlines()[-1]

    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout)["stages"]
    assert {name: stage["state"] for name, stage in told.items()} == {
        "train_teacher": "skipped",
        "prepare": "left out",
        **dict.fromkeys(("distill", "baseline", "evaluate", "compare", "export"), "done"),
    }
    assert told["distill"]["why"] == "it was begun and not finished"
    records = [json.loads(line) for line in Path(told["distill"]["folder"], "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == sorted(set(steps))  # it went on where it had stopped
    folders = {name: Path(stage["folder"]) for name, stage in told.items() if "folder" in stage}
    assert json.loads((folders["evaluate"] / "metrics.json").read_text())["about"]["num_samples"] == 96
    report = json.loads((folders["compare"] / "report.json").read_text())
    assert report["arms"] == [folders["baseline"].name, folders["distill"].name]
    assert (folders["export"] / "model_index.json").exists()

    assert {stage["state"] for stage in _told(capsys, config).values()} == {"skipped", "left out"}
    changed = _told(capsys, config, "export.dtype=bf16")
    assert [name for name, stage in changed.items() if stage["state"] == "done"] == ["export"]
    assert changed["export"]["why"] == "dtype was fp16 and is bf16"
