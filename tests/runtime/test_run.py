"""Whole runs on a local Ray: every objective, faults, resuming, two workers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from psutil import NoSuchProcess
from rich.console import Console
from runs import DMD2, PD, THREE_SOURCES, kill, processes, small_run, when
from started import alive, distilling, free_port, until

from ddil_ray.config import to_yaml
from ddil_ray.config.places import anchored
from ddil_ray.errors import ConfigError, RunStoppedError
from ddil_ray.runtime.admission import Stream
from ddil_ray.runtime.run import distill, resumed_config
from ddil_ray.runtime.stages import stream_plan
from ddil_ray.runtime.storage import CheckpointStore
from ddil_ray.states.batch import Origin
from ddil_ray.tracking import View, read_journal
from ddil_ray.training.checkpoint import read_shared
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

EVALUATION = {"enabled": True, "num_samples": 32, "steps": [2, 4], "teacher_steps": 8}
RAMPED = {
    "forward": {"start": 0.8, "end": 0.2},
    "student": {"start": 0.1, "end": 0.5},
    "teacher": {"start": 0.1, "end": 0.3},
}


def _records(config):
    return read_journal(Path(config.output, config.name, "metrics.jsonl"))


def _training(config):
    return [r for r in _records(config) if "loss" in r]


def _check_staleness(config):
    bound = Recipe(config).ingredients().max_staleness
    oldest = [r["staleness/max"] for r in _training(config) if "staleness/max" in r]
    assert oldest
    assert max(oldest) <= bound


def _check_folder(result):
    folder = Path(result.folder)
    assert (folder / "student" / "model.safetensors").exists()
    assert "<svg" in (folder / "report.html").read_text()
    assert json.loads((folder / "metrics.json").read_text())["scores"]["student"].keys() == {"2", "4"}
    assert (folder / "samples" / "student-2-steps.png").exists()
    assert json.loads((folder / "environment.json").read_text())["seed"] == 0


def test_progressive_distillation_goes_from_teacher_to_student(run_dir):
    config = small_run(objective=PD, states=THREE_SOURCES, output=run_dir, evaluation=EVALUATION)
    _check_folder(distill(config))
    assert [r["step"] for r in _training(config)] == list(range(2, 41, 2))
    assert {int(r["phase"]) for r in _training(config)} == {0, 1}
    _check_staleness(config)
    with pytest.raises(ConfigError, match=r"`name` must be new.*--resume"):
        distill(config)


@pytest.mark.parametrize("objective", [PD, pytest.param(DMD2, marks=pytest.mark.slow)], ids=["pd", "dmd2"])
def test_ray_changes_nothing_about_the_method_nor_does_measuring_it(run_dir, objective):
    """States that do not depend on timing: losses are those without Ray and without measuring.

    A version whose covariate shift was measured has the figures that it has without Ray; the first and the last
    publication always are.
    """
    settings = {"objective": objective, "states": {"forward": 0.5, "teacher": 0.5}}
    shift = {"enabled": True, "every": 4, "num_samples": 32}
    url = f"file://{run_dir}"  # an fsspec URL: files are mirrored, checkpoints go through its filesystem
    placement = "pool" if objective is PD else "fused"
    config = small_run(**settings, output=url, labels={"placement": placement}, shift=shift)
    result = distill(config)
    here, folder = config.model_copy(update={"output": run_dir}), Path(run_dir) / "small"
    inline, unmeasured = (distill_inline(Recipe(c)) for c in (config, small_run(**settings)))
    assert [r["loss"] for r in _training(here)] == pytest.approx([r["loss"] for r in unmeasured.records], rel=1e-5)
    assert (folder / "student" / "model.safetensors").exists()
    assert list((folder / "checkpoints" / "attempt-1").glob("checkpoint_*"))

    expected = {(r["phase"], r["step"]): r for r in inline.records if "loss" not in r}
    total = 20 * len(result.rounds)
    assert list(expected) == [(n // 20, n) for n in range(0, total, 4)]
    measured = [r for r in _records(here) if "rollout/nonfinite" in r]
    steps = [r["step"] for r in measured]
    assert (steps[0], steps[-1]) == (0, total - 4)
    assert steps == sorted(set(steps))
    for record in measured:
        assert record == pytest.approx(expected[record["phase"], record["step"]], rel=1e-3, abs=1e-6)
    assert json.loads((folder / "metrics.json").read_text())["shift"] == measured[-1]
    assert "Covariate shift" in (folder / "report.html").read_text()

    trained = _training(here)
    again = distill(resumed_config(f"{url}/small", []), resume=True)  # nothing is left but to write the results
    assert _training(here) == trained
    for steps, model in result.rounds.items():
        expected = model.network.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in again.rounds[steps].network.state_dict().items())


def test_two_workers_train_on_the_same_mixture_without_deadlock(run_dir):
    """500 steps, three sources, ramped priors, the tightest staleness that cannot stall."""
    config = small_run(
        output=run_dir,
        states=RAMPED,
        trainer={"steps": 500, "batch_size": 32, "num_workers": 2, "lr": 1e-4},
        forward_states={"batch_size": 32},
        student_rollouts={"batch_size": 32},
        teacher_rollouts={"batch_size": 32},
        tracking={"log_every": 10},
        checkpoint={"every": 250},
    )
    (plan,) = Recipe(config).plans(1)
    tightest = Recipe(config).max_staleness([plan]) // 2
    config = config.model_copy(update={"replay": config.replay.model_copy(update={"max_staleness": tightest})})
    distill(config)
    records = _training(config)
    assert records[-1]["step"] == 500
    _check_staleness(config)
    one = Recipe(config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_workers": 1})}))
    (alone,) = one.plans(1)
    for origin in alone.origins:
        shares = [r.get(f"states/share_{origin.label}", 0.0) for r in records]
        expected = sum(alone.counts(n)[origin] for n in range(500)) / (500 * 32)
        assert sum(shares) / len(shares) == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_two_workers_share_the_critic_of_distribution_matching(run_dir):
    config = small_run(
        output=run_dir,
        objective=DMD2,
        states=THREE_SOURCES,
        trainer={"num_workers": 2, "accumulate": 2, "batch_size": 32},
        sync={"every": 5},
    )
    result = distill(config)
    records = _training(config)
    assert records[-1]["step"] == 20
    assert all("critic/loss" in r and "gan/critic_loss" in r for r in records)
    checkpoint = sorted(Path(result.folder, "checkpoints", "attempt-1").glob("checkpoint_*"))[-1]
    state = read_shared(checkpoint)["learner"]
    assert state["objective"]["iteration"] == 20
    assert state["optimizers"]["critic"]["adam"]["state"][0]["step"] == 20
    assert state["optimizers"]["student"]["adam"]["state"][0]["step"] == 10


def _reached(config, step):
    return lambda: any(r["step"] >= step for r in _training(config))


def _long(**changes):
    return small_run(**{"trainer": {"steps": 150}, "checkpoint": {"every": 40}, **changes})


@pytest.mark.slow
def test_consistency_distillation_survives_a_killed_rollout_actor_and_loses_nothing(run_dir):
    config = _long(output=run_dir, states=THREE_SOURCES, evaluation=EVALUATION)
    killed = when(_reached(config, 20), lambda: kill("ray::MapWorker"))
    _check_folder(distill(config))
    assert killed.result()
    assert [r["step"] for r in _training(config)] == list(range(2, 151, 2))
    _check_staleness(config)


def _last_begun(config):
    """The step from which credits let the last block of student states be begun; its actors rest after it."""
    recipe, student = Recipe(config), Origin.STUDENT
    bound = recipe.ingredients().max_staleness
    plan = stream_plan(recipe, student, phases=1, start_step=0, max_staleness=bound)
    stream = Stream(plan, recipe.most_actors(student), config.replay.ahead)
    lacks = (stream.lacks(len(plan) - 1, phase=0, version=n, step=n) for n in range(config.trainer.steps))
    return next(n for n, lack in enumerate(lacks) if lack is None)


@pytest.mark.slow
def test_all_state_and_label_actors_may_be_killed_at_once(run_dir):
    config = _long(output=run_dir, labels={"placement": "pool"})

    def kill_all():
        for process in processes("ray::MapWorker"):
            with contextlib.suppress(NoSuchProcess):
                process.kill()

    killed = when(_reached(config, 20), kill_all)
    distill(config)
    assert killed.result()
    assert [r["step"] for r in _training(config)] == list(range(2, 151, 2))
    pools = {"forward", "student", "labels/forward", "labels/student"}
    deaths = {pool: max(r.get(f"actors/deaths/{pool}", 0) for r in _records(config)) for pool in pools}
    assert deaths == dict.fromkeys(pools, 1)
    _check_staleness(config)


@pytest.mark.slow
def test_training_goes_on_when_the_hub_is_killed(run_dir):
    config = _long(output=run_dir, states=THREE_SOURCES)
    killed = when(_reached(config, 40), lambda: kill("ray::Hub"))
    distill(config)
    assert killed.result()
    records = _training(config)
    assert records[-1]["step"] == 150
    assert _last_begun(config) == 130
    assert max(r["step"] for r in records if "actors/busy_share/student" in r) >= 130
    _check_staleness(config)


@pytest.mark.slow
def test_a_killed_trainer_goes_on_from_its_checkpoint(run_dir):
    config = _long(output=run_dir)
    killed = when(_reached(config, 60), lambda: kill("ray::RayTrainWorker"))
    distill(config)
    assert killed.result()
    steps = [r["step"] for r in _training(config)]
    assert steps[-1] == 150
    assert max(steps.count(n) for n in range(2, 41, 2)) == 1  # nothing before the checkpoint at 40 was done again
    _check_staleness(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_after_a_checkpoint_and_resuming_finishes(run_dir, interruptible, number):
    config = _long(output=run_dir, objective=PD, states=THREE_SOURCES)
    when(_reached(config, 170), lambda: os.kill(os.getpid(), number))
    with pytest.raises(RunStoppedError, match=rf"{number.name} after step \d+ of 300.*--resume") as stopped:
        distill(config)
    assert stopped.value.exit_code == 128 + number
    before = _training(config)[-1]["step"]
    assert 170 <= before < 300
    folder = str(Path(config.output, config.name))
    for override, expected in (
        ("trainer.steps=300", r"`trainer.steps` of a resumed run must stay 150, but is 300"),
        ("student_rollouts.batch_size=8", r"`student_rollouts.batch_size` of a resumed run must stay 16"),
    ):
        with pytest.raises(ConfigError, match=expected):
            resumed_config(folder, [override])
    result = distill(resumed_config(folder, []), resume=True)
    assert list(result.rounds) == [4, 2]
    steps = [r["step"] for r in _training(config)]
    assert steps[-1] == 300
    assert before <= next(b for a, b in zip(steps, steps[1:], strict=False) if b > before) <= before + 4


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: whoever starts a program behind a shell may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_run_in_training_at_once(tmp_path, run_dir, number):
    """The checkpoint that the first one asks for never comes: the trainer stands."""
    config, store = _long(output=run_dir, trainer={"steps": 5000}), CheckpointStore(f"{run_dir}/small/checkpoints")
    Path(f"{run_dir}.yaml").write_text(to_yaml(config))
    with distilling(tmp_path / "log", f"{run_dir}.yaml") as run:
        run.until(lambda: _reached(config, 40)() and store.newest(print))
        (trainer,) = run.below("ray::RayTrainWorker")
        trainer.suspend()
        for _ in range(2):
            run.process.send_signal(number)
            time.sleep(5)
        assert run.process.wait(60) == 128 + number
    said = run.said().splitlines()[-1]
    assert said.startswith(f"Stopped at once by {number.name}; what was saved is there. Go on with")
    until(lambda: not alive([trainer]))
    assert store.newest(print).step >= 40


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_training_ends_the_run_and_resuming_measures(run_dir, interruptible, number):
    out = io.StringIO()
    config = small_run(output=run_dir, evaluation={**EVALUATION, "steps": [2], "num_samples": 1000})
    when(lambda: "Trained; measuring" in out.getvalue(), lambda: os.kill(os.getpid(), number))
    with pytest.raises(RunStoppedError, match=rf"^Stopped at once by {number.name}; .*--resume") as stopped:
        distill(config, view=View(Console(file=out, width=200)))
    assert stopped.value.exit_code == 128 + number
    assert distill(resumed_config(str(Path(config.output, config.name)), []), resume=True).scores["student"]


def test_a_run_that_is_refused_leaves_the_config_of_the_one_that_it_was_to_go_on_with(run_dir):
    folder = Path(run_dir, "small")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("as it was")
    nobody = {"tracker": "mlflow", "uri": f"http://127.0.0.1:{free_port()}", "required": True, "timeout_s": 1}
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        distill(small_run(output=run_dir, tracking=nobody), resume=True)
    assert (folder / "config.yaml").read_text() == "as it was"


def test_bad_input_is_known_before_an_actor_starts(run_dir):
    for changes, expected in (
        ({"data": {"source": "/nowhere"}}, "does not exist"),
        ({"trainer": {"batch_size": 4000}}, "at least one batch of 4000 images"),
        ({"teacher": {"model": "ddil_ray.testing:nothing"}}, "teacher.model"),
    ):
        with pytest.raises((ConfigError, ValueError), match=expected):
            distill(small_run(output=run_dir, **changes))
    assert not Path(run_dir).exists()


def test_local_models_are_found_from_other_working_directories(tmp_path, monkeypatch):
    """As Ray's workers have; names of factories and hub ids stay as they are."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    teacher, student = {"model": "mine", "weights": None}, {"model": "ddil_ray.testing:tiny_model"}
    config = anchored({"teacher": teacher, "student": student})
    assert config["teacher"]["model"] == str(tmp_path / "mine")
    assert config["student"]["model"] == "ddil_ray.testing:tiny_model"
