"""Pins the commands: what they print, what they leave, and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import run as _run
from PIL import Image
from studies import write_run

from ddil_ray.evaluation.scoring import GROUPS

FAST_TEACHER = ["model.block_out_channels=[8,16]", "trainer.steps=3", "trainer.batch_size=16"]


def test_a_dry_run_prints_the_plan_and_starts_nothing(capsys, run_dir):
    code, out, _ = _run(capsys, "distill", "digits-pd", "--dry-run", "--json", f"output={run_dir}")
    plan = json.loads(out)
    assert code == 0
    assert [p["student_steps"] for p in plan["phases"]] == [8, 4, 2, 1]
    roles = {"trainer", "forward_states", "student_rollouts", "teacher_rollouts", "shift"}
    assert {a["role"] for a in plan["actors"]} == roles
    assert {m["role"] for m in plan["memory"]["roles"]} == {*roles, "evaluation"}
    assert not Path(run_dir).exists()
    code, out, _ = _run(capsys, "distill", "digits-lcm", "--dry-run")
    assert code == 0
    assert "Memory of an actor at its peak" in out
    assert "Nothing was started." in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distill", "digits-pd", "trainer.stepz=1", "--dry-run"], "`trainer.stepz` is not a setting of `trainer`"),
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
        (["ablate", "ablation/prior"], "Did you mean ablation/priors?"),
        (["ablate", "ablation/priors", "compare=seed"], "`compare` must be one of the axes"),
        (["ablate", "ablation/priors", "base=/nowhere.yaml"], "/nowhere.yaml"),
        (["ablate", "ablation/priors", "--out", "/proc/x"], "`--out` must be a folder that can be written"),
        (["compare", "/nowhere/a", "/nowhere/b"], "RUN_DIR must be the folder of a run"),
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
    assert {len(values) for values in found["groups"]["model"]["2"].values()} == {GROUPS}
    assert set(scores["model"]["2"]) >= {"frechet_data", "frechet_teacher", "coverage", "paired_error"}
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "Scores by class" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://matplotlib.org", "")
    assert _run(capsys, "train-teacher", "digits-teacher", *FAST_TEACHER, f"output={run_dir}")[0] == 2


@pytest.mark.parametrize(
    "command",
    [
        *("distill", "scale", "train-teacher", "prepare", "sample", "evaluate", "export", "register", "compare"),
        *("ablate", "chain", "serve", "demo"),
    ],
)
def test_every_command_explains_itself(capsys, command):
    code, out, _ = _run(capsys, command, "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("distill", "distill"),
        ("scale", "scale"),
        ("train_teacher", "train-teacher"),
        ("prepare", "prepare"),
        ("sample", "sample"),
        ("evaluate", "evaluate"),
        ("export", "export"),
        ("register", "register"),
        ("compare", "compare"),
        ("ablation", "ablate"),
        ("chain", "chain"),
        ("serve", "serve"),
    ],
)
def test_every_pipeline_is_its_command(name, command):
    script = (Path(__file__).parents[2] / "pipelines" / f"{name}.py").read_text()
    assert f'main(["{command}", *sys.argv[1:]])' in script


def test_the_runs_of_an_ablation_are_listed_and_nothing_starts(capsys):
    arguments = ["ablate", "ablation/priors", "seeds=[0,1]", "settings.trainer.steps=7", "--dry-run"]
    code, out, _ = _run(capsys, *arguments)
    assert code == 0
    assert "pd, forward only, seed 1" in out
    assert out.endswith("20 runs. Nothing was started.\n")
    runs = json.loads(_run(capsys, *arguments, "--json")[1])
    assert runs[0] == {"objective": "pd", "states": "forward only", "seed": 0}


def test_runs_are_compared_by_one_command(capsys, tmp_path):
    arms = {"plain": {"forward": 1.0}, "mixed": {"forward": 0.5, "student": 0.5}}
    runs = [write_run(tmp_path, f"{n}-{seed}", seed=seed, states=s) for n, s in arms.items() for seed in (0, 1)]
    code, out, _ = _run(capsys, "compare", *runs, "--out", tmp_path / "out", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["arms"] == ["plain-0", "mixed-0"]
    assert {r["seeds"] for r in report["comparisons"]} == {2}
    code, out, _ = _run(capsys, "compare", *runs, "--out", tmp_path / "out")
    assert code == 0
    assert f"report   {tmp_path / 'out' / 'report.html'}" in out
    assert (tmp_path / "out" / "report.html").exists()
