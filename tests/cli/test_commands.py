"""Pins the commands: what they print, what they leave, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ddil_ray.cli import main

FAST_TEACHER = ["model.block_out_channels=[8,16]", "trainer.steps=3", "trainer.batch_size=16"]


def _run(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err


def test_a_dry_run_prints_the_plan_and_starts_nothing(capsys, run_dir):
    code, out, _ = _run(capsys, "distill", "digits-pd", "--dry-run", "--json", f"output={run_dir}")
    plan = json.loads(out)
    assert code == 0
    assert [p["student_steps"] for p in plan["phases"]] == [8, 4, 2, 1]
    assert {a["role"] for a in plan["actors"]} == {"trainer", "forward_states", "student_rollouts", "teacher_rollouts"}
    assert not Path(run_dir).exists()
    code, out, _ = _run(capsys, "distill", "digits-lcm", "--dry-run")
    assert code == 0
    assert "Nothing was started." in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distill", "digits-pd", "trainer.stepz=1", "--dry-run"], "`trainer.stepz`: unknown key"),
        (["distill", "digits-pd", "data.source=/nowhere", "--dry-run"], "`data.source`"),
        (["distill", "digits-pd", "teacher.model=/nowhere/else", "--dry-run"], "`teacher.model`"),
        (["distill", "digits-pd", "trainer.batch_size=4096", "--dry-run"], "at least one batch of 4096 images"),
        (["distill", "digits-pd", "replay.max_staleness=1", "--dry-run"], "`replay.max_staleness` must be at least"),
        (["distill", "digits-pd", "evaluation.features=/nowhere", "--dry-run"], "`evaluation.features` must be auto"),
        (
            ["distill", "digits-pd", "evaluation.prompts=[a,b]", "--dry-run"],
            "`evaluation.prompts` must have one prompt",
        ),
        (["distill"], "CONFIG must be given"),
        (["distill", "--resume", "/nowhere/run"], "/nowhere/run/config.yaml"),
        (["distill", "digits-pd", "output=/proc/no", "teacher.guidance=0"], "`output` must be a folder"),
        (["train-teacher", "digits-teacher", "model.norm_num_groups=7"], "`model` must describe a UNet2DModel"),
        (["sample", "builtin:digits", "--class-label", "10"], "`--class-label` must be below 10"),
        (["sample", "builtin:digits", "--num", "1", "--out", "/proc/x/a.png"], "`--out` must be a picture file"),
        (
            ["evaluate", "builtin:digits", "digits-pd", "--out", "/proc/x"],
            "`--out` must be a folder that can",
        ),
        (["demo", "--output", "/proc/x"], "`--output` must be a folder that can be written"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(capsys, arguments, expected):
    code, out, err = _run(capsys, *arguments)
    assert code == 2
    assert err.startswith("Error: ")
    assert expected in err
    assert "Traceback" not in out + err


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_teacher_is_trained_sampled_and_evaluated(capsys, run_dir, tmp_path):
    code, out, _ = _run(capsys, "train-teacher", "digits-teacher", *FAST_TEACHER, f"output={run_dir}", "--json")
    assert code == 0
    teacher = json.loads(out)["teacher"]
    grid = tmp_path / "grid.png"
    assert _run(capsys, "sample", teacher, "--steps", 2, "--num", 6, "--class-label", 3, "--out", grid)[0] == 0
    with Image.open(grid) as picture:
        assert picture.width > picture.height > 0
    code, out, _ = _run(
        capsys, "evaluate", teacher, "digits-pd", f"teacher.model={teacher}", "evaluation.num_samples=32",
        "evaluation.steps=[1,2]", "evaluation.teacher_steps=4", "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == {"model": teacher, **found}
    scores = found["scores"]
    assert set(scores) == {"model", "teacher"}
    assert [row["class"] for row in found["classes"]["model"]["2"]] == list(range(10))
    assert set(scores["model"]["2"]) >= {"frechet_data", "frechet_teacher", "coverage", "paired_error"}
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "Scores by class" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "")
    assert _run(capsys, "train-teacher", "digits-teacher", *FAST_TEACHER, f"output={run_dir}")[0] == 2


@pytest.mark.parametrize("command", ["distill", "train-teacher", "sample", "evaluate", "demo"])
def test_every_command_explains_itself(capsys, command):
    code, out, _ = _run(capsys, command, "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize("name", ["distill", "train_teacher", "sample", "evaluate"])
def test_every_pipeline_is_its_command(name):
    script = (Path(__file__).parents[2] / "pipelines" / f"{name}.py").read_text()
    assert f'main(["{name.replace("_", "-")}", *sys.argv[1:]])' in script
