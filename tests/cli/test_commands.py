"""Pins the commands: what they print, what they leave, and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from commands import run as _run
from PIL import Image
from started import environment, until
from studies import write_run
from tiny import save_pipeline

from ddil_ray.cli.distill import _next
from ddil_ray.evaluation.scoring import GROUPS
from ddil_ray.export import consistency_scheduler, save_model_folder
from ddil_ray.models import load_model, student_of

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
        (
            ["distill", "--resume", "/nowhere/run"],
            "`--resume` must be the folder of a run that has begun",
        ),
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


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_consistency_student_is_measured_at_the_steps_that_it_has(capsys, tmp_path):
    teacher, student = load_model("builtin:digits"), tmp_path / "student"
    scheduler = consistency_scheduler(teacher, original_inference_steps=2)
    save_model_folder(student, teacher, scheduler=scheduler, name="s", description="d", steps=2)
    usual = (student, "digits-pd", "evaluation.num_samples=16", "evaluation.teacher_steps=2", "--out", tmp_path / "out")
    code, out, _ = _run(capsys, "evaluate", *usual, "evaluation.steps=[1,2,4]", "--json")
    assert code == 0
    assert {model: set(by_steps) for model, by_steps in json.loads(out)["scores"].items()} == {
        "model": {"1", "2"},
        "teacher": {"1", "2", "4"},
    }
    code, _, err = _run(capsys, "evaluate", *usual, "evaluation.steps=[4]")
    assert code == 2
    assert "`evaluation.steps` must hold a number of at most 2, the steps of this consistency student" in err
    code, _, err = _run(capsys, "evaluate", *usual, "evaluation.steps=[1]", "--guidance", 2)
    assert code == 2
    assert "`--guidance` must be 0 for this consistency student" in err


@pytest.mark.parametrize("told", [False, True])
def test_one_is_told_what_to_type_to_see_the_student(tmp_path, told):
    """With its prompt, and with guidance where its network is told that."""
    student = student_of(load_model(str(save_pipeline("stable_diffusion", tmp_path))), guidance_embedding=told)
    (line,) = _next(SimpleNamespace(folder="runs/a", rounds={4: student}), 7.0)
    guidance = " --guidance 7" if told else ""
    assert line == f'next     ddil-ray sample runs/a/student --steps 4 --prompt "a photo"{guidance} --out samples.png'
    (line,) = _next(SimpleNamespace(folder="runs/a", rounds={1: load_model("builtin:digits")}), 2.0)
    assert line == "next     ddil-ray sample runs/a/student --steps 1 --out samples.png"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["ray::", "ray::MapWorker"], ids=["Ray starts", "it measures"])
def test_a_command_on_ray_that_is_told_to_end_exits_with_143(tmp_path, when):
    """Where Ray has a handler of its own, which would exit with 15."""
    ddil_ray, options = str(Path(sys.executable).with_name("ddil-ray")), ("--out", str(tmp_path))
    much = ("builtin:digits", "digits-pd", "evaluation.num_samples=1000000")
    process = subprocess.Popen([ddil_ray, "evaluate", *much, *options], env=environment())
    try:
        children = psutil.Process(process.pid).children
        until(lambda: any(when in "".join(p.cmdline()[:1]) for p in children(recursive=True)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()


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
