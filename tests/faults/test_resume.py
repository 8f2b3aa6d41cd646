"""Rows of the fault matrix: resume with a changed config; driver crash (what goes on is what would have been)."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import torch
from commands import run
from pydantic import BaseModel
from runs import DMD2, PD, THREE_SOURCES, kill, small_run, when
from started import distilling

from ddil_ray.config import RunConfig, to_yaml
from ddil_ray.errors import ConfigError, RunStoppedError
from ddil_ray.runtime.hooks import _phase_teacher
from ddil_ray.runtime.resume import RESUMED, begun, kind_of, resumed_config
from ddil_ray.runtime.run import distill
from ddil_ray.runtime.stages import stream_plan
from ddil_ray.states.batch import Origin
from ddil_ray.tracking import read_journal
from ddil_ray.training.checkpoint import read_checkpoint, write_checkpoint
from ddil_ray.training.inline import _InlineHooks, distill_inline, requests, state_maker
from ddil_ray.training.learner import Learner
from ddil_ray.training.loop import TrainingLoop
from ddil_ray.training.optimizer import NetworkOptimizer, OptimizerSettings
from ddil_ray.training.parallel import Alone
from ddil_ray.training.placement import trained
from ddil_ray.training.recipe import Recipe

LCM = {"type": "lcm", "solver_steps": 10, "student_steps": 2}
ROLLOUTS_OFF = {"forward": 1.0}
LORA = {"lora": {"rank": 2, "alpha": 4, "target_modules": ["inside", "outside"], "dropout": 0.2}}


def settings_of(kind, path=""):
    """Dotted paths of all settings of a typed config, of every variant of a group."""
    for name, info in kind.model_fields.items():
        here = f"{path}.{name}" if path else name
        groups = list(groups_in(info.annotation))
        if not groups or len(groups) < len(non_null(info.annotation)):  # a plain value may stand there
            yield here
        for group in groups:
            yield from settings_of(group, here)


def non_null(annotation):
    options = get_args(annotation) if get_origin(annotation) not in (None, Annotated, dict, tuple) else [annotation]
    return [option for option in options if option is not type(None)]


def groups_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) not in (dict, tuple):
        for option in get_args(annotation):
            yield from groups_in(option)


SETTINGS = sorted(set(settings_of(RunConfig)))


def test_every_setting_says_whether_it_may_change_on_resuming():
    """If this fails: give the new setting a kind in `RESUMED`."""
    assert len(SETTINGS) > 100
    for path in SETTINGS:
        assert kind_of(path) in ("identity", "elastic", "cosmetic"), path


def test_no_setting_has_a_kind_that_is_not_there():
    def paths(kinds, prefix=""):
        for name, kind in kinds.items():
            yield from [prefix + name] if isinstance(kind, str) else paths(kind, f"{prefix}{name}.")

    for path in paths(RESUMED):
        assert any(f"{known}.".startswith(f"{path}.") for known in SETTINGS), path


@pytest.fixture
def saved(run_dir):
    """The folder of a run with settings of every kind."""
    folder = Path(run_dir, "small")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(small_run(output="elsewhere", states={"forward": 0.5, "student": 0.5})))
    return str(folder)


@pytest.mark.parametrize(
    "override",
    [
        "trainer.lr=1e-5",
        "trainer.num_workers=2",
        "trainer.precision=bf16",
        "student_rollouts.num_actors=[1, 4]",
        "student_rollouts.resources={spot: 1}",
        "replay.ahead=8",
        "checkpoint.every=3",
        "tracking.experiment=other",
        "evaluation.enabled=true",
        "student.license=mit",
    ],
)
def test_what_a_run_is_computed_with_may_change(saved, override):
    config = resumed_config(saved, [override])
    assert config.output == str(Path(saved).parent)
    assert config.model_dump() != resumed_config(saved, []).model_dump()


def test_all_that_must_stay_is_named_in_one_message(saved):
    wrong = ["seed=1", "objective.student_steps=5", "states={forward: 0.4, student: 0.6}", "student.lora={rank: 4}"]
    with pytest.raises(ConfigError) as refused:
        resumed_config(saved, [*wrong, "trainer.lr=1e-5", "teacher_rollouts.batch_size=8"])
    message = str(refused.value)
    for line in (
        "`seed` of a resumed run must stay 0, but is 1 instead.",
        "`objective.student_steps` of a resumed run must stay 2, but is 5 instead.",
        "`states.forward` of a resumed run must stay 0.5, but is 0.4 instead.",
        "`states.student` of a resumed run must stay 0.5, but is 0.6 instead.",
        "`student.lora.rank` of a resumed run must stay None, but is 4 instead.",
        "`teacher_rollouts.batch_size` of a resumed run must stay 16, but is 8 instead.",
    ):
        assert line in message
    assert "trainer.lr" not in message
    assert message.endswith("Start a new run to change it.")


@pytest.fixture
def started_again(capsys, tmp_path, run_dir):
    """The command of a run with the flag of what starts it again by itself; gives exit code, output and message."""
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(small_run(output=run_dir, states={"forward": 0.5, "student": 0.5})))
    return functools.partial(run, capsys, "distill", path, "--resume-if-begun", "--allow-code")


def test_a_run_that_is_started_again_begins_where_there_is_no_checkpoint_and_else_goes_on(
    started_again, saved, run_dir
):
    config = small_run(output=run_dir)
    assert not begun(config)  # it failed before its first checkpoint
    code, out, err = started_again("--dry-run", "--json")
    assert code == 0, err
    assert not json.loads(out)["goes_on"]
    (Path(saved) / "checkpoints").mkdir()
    assert begun(config)
    code, out, err = started_again("--dry-run", "trainer.lr=1e-5", "student_rollouts.num_actors=2")
    assert code == 0, err
    assert "small, which goes on" in out


def test_asking_whether_a_run_has_begun_leaves_nothing(run_dir):
    assert not begun(small_run(output=run_dir))
    assert not Path(run_dir).exists()


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_another_run_is_not_gone_on_with(started_again, saved, options):
    Path(saved, "checkpoints").mkdir()
    code, _, err = started_again("seed=1", *options)
    assert code == 2
    assert "`seed` of a resumed run must stay 0, but is 1 instead." in err
    assert "Start a new run to change it." in err
    assert not Path(saved, "lock.json").exists()


@dataclass
class Stopping(_InlineHooks):
    """Stops before a step, and writes what `TrainingLoop.state_dict` gives to a folder."""

    stop_at: int | None = None
    folder: Path | None = None

    def phase_started(self, step, learner):
        super().phase_started(step, learner)
        if self.student_becomes_teacher and learner.phase.index > 0:  # in the middle of a round as on Ray
            self.expert.enter(learner.phase.index, _phase_teacher(learner))

    def checkpoint(self, step, state):
        if self.folder is not None:
            write_checkpoint(self.folder, state, rank=0, ranks=1)

    def wish(self, step):
        return "stop" if step == self.stop_at else None


@dataclass
class Inline:
    """A run in this process whose blocks are made when they are needed, as by `distill_inline`."""

    recipe: Recipe
    stop_at: int | None = None
    folder: Path | None = None
    taken: dict = field(default_factory=dict)

    def losses(self, resume_from=None):
        torch.manual_seed(self.recipe.config.seed)  # as every process begins
        made = self.recipe.ingredients()
        student = self.recipe.student_of(made.teacher)
        maker = state_maker(self.recipe, made, student, "cpu")
        hooks = Stopping(maker, maker.expert, made.objective.student_becomes_teacher)
        hooks.stop_at, hooks.folder = self.stop_at, self.folder
        self.recipe.equip(made.objective, maker.expert.teacher, made.data.images, made.data.labels)
        learning = trained(student.copy(), self.recipe.config, "cpu")
        loop = TrainingLoop(
            learner=Learner(learning, made.objective, self.recipe.optimizer_settings()),
            plans=made.plans,
            feeds={o: self._feed(o, made, maker).__next__ for o in self.recipe.priors.origins},
            hooks=hooks,
            settings=self.recipe.loop_settings(max_staleness=made.max_staleness),
        )
        if resume_from is not None:
            loop.load_state_dict(read_checkpoint(resume_from, Alone(), rank=0, ranks=1))
        loop.run()
        return {record["step"]: record["loss"] for record in hooks.records}

    def _feed(self, origin, made, maker):
        begin = self.taken.get(origin, 0)
        for request in itertools.islice(requests(self.recipe, origin, made.plans), begin, None):
            self.taken[origin] = self.taken.get(origin, 0) + 1
            yield maker.expert.label(maker.objective, maker.make(request), maker.device)


@pytest.mark.parametrize(
    ("changes", "stop_at"),
    [
        ({"objective": LCM, "states": ROLLOUTS_OFF}, 5),
        ({"objective": PD, "states": ROLLOUTS_OFF}, 35),
        ({"objective": {**DMD2, "student_every": 1}, "states": ROLLOUTS_OFF}, 7),
        ({"objective": LCM, "states": ROLLOUTS_OFF, "student": LORA}, 5),
        ({"objective": LCM, "states": THREE_SOURCES, "replay": {"reuse": 2}}, 8),
    ],
    ids=["lcm", "pd", "dmd2", "adapters with dropout", "rollouts, made in order, from a step that published"],
)
def test_what_goes_on_loses_not_one_bit(tmp_path, changes, stop_at):
    """20 losses and more, through the files of a checkpoint, in a loop that knows nothing of the one before."""
    recipe = Recipe(small_run(**changes, trainer={"steps": 30}, tracking={"log_every": 1}))
    whole = Inline(recipe).losses()
    begun = Inline(recipe, stop_at=stop_at, folder=tmp_path)
    before = begun.losses()
    after = Inline(recipe, taken=dict(begun.taken)).losses(resume_from=tmp_path)
    assert next(iter(after)) == stop_at + 1
    assert len(after) >= 20
    assert before | after == whole


def test_a_learning_rate_that_changes_holds_from_the_checkpoint_on():
    settings = OptimizerSettings(steps=10, lr=1e-2, decay="linear", weight_decay=0.1)

    def optimizer(settings):
        parameter = torch.nn.Parameter(torch.ones(3))
        return parameter, NetworkOptimizer([parameter], settings)

    parameter, first = optimizer(settings)
    for _ in range(5):
        parameter.grad = torch.ones(3)
        first.step(first.norm())
        first.advance()
    _, same = optimizer(settings)
    same.load_state_dict(first.state_dict())
    assert same.lr == first.lr == same.adam.param_groups[0]["lr"] == 1e-2 * 0.5
    _, changed = optimizer(replace(settings, lr=1e-3, weight_decay=0.0))
    changed.load_state_dict(first.state_dict())
    assert changed.lr == changed.adam.param_groups[0]["lr"] == 1e-3 * 0.5
    assert changed.adam.param_groups[0]["weight_decay"] == 0.0
    assert torch.equal(changed.adam.state_dict()["state"][0]["exp_avg"], first.adam.state_dict()["state"][0]["exp_avg"])
    changed.advance()
    assert changed.lr == pytest.approx(1e-3 * 0.4)


@pytest.mark.ray
@pytest.mark.slow
def test_a_deterministic_run_on_ray_is_the_run_of_one_process_bit_for_bit(run_dir, ray_cluster):
    """With rollouts, and through a kill of the trainer, which goes on from a checkpoint."""
    settings = {"objective": PD, "states": THREE_SOURCES, "sync": {"every": 4, "deterministic": True}}
    trainer, tracking = {"steps": 40}, {"log_every": 1}
    config = small_run(output=run_dir, **settings, trainer=trainer, tracking=tracking, checkpoint={"every": 12})
    journal = Path(config.output, config.name, "metrics.jsonl")

    def losses():
        return {record["step"]: record["loss"] for record in read_journal(journal) if "loss" in record}

    killed = when(lambda: max(losses(), default=0) >= 20, lambda: kill("ray::RayTrainWorker"))
    distill(config)
    assert killed.result()
    inline = {r["step"]: r["loss"] for r in distill_inline(Recipe(config)).records}
    assert losses() == inline
    assert len(inline) == 80


def test_in_a_deterministic_run_every_block_has_one_version_to_come_from():
    """The newest that is published when the trainer comes to the step that needs it, which it cannot pass before."""
    config = small_run(objective=PD, states=THREE_SOURCES)
    fixed = small_run(objective=PD, states=THREE_SOURCES, sync={"deterministic": True})
    for start in (0, 8, 20, 28):
        loose, tight = (
            stream_plan(Recipe(c), Origin.STUDENT, phases=2, start_step=start, max_staleness=12)
            for c in (config, fixed)
        )
        assert len(tight) > 0
        assert (tight.versions >= loose.versions).all()
        for needed, version in zip(tight.needed.tolist(), tight.versions.tolist(), strict=True):
            assert version == max(v for v in range(0, 40, 4) if v <= needed)
    (forward,) = {
        int(v) for v in stream_plan(Recipe(fixed), Origin.FORWARD, phases=1, start_step=0, max_staleness=12).versions
    }
    assert forward == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"num_workers": [1, 2]}}, "trainer.num_workers must be one number"),
        ({"checkpoint": {"every": 6}}, r"checkpoint.every must be a multiple of sync.every \(4\).*but is 6"),
        ({"trainer": {"steps": 22}}, r"trainer.steps must be a multiple of sync.every \(4\).*but is 22"),
    ],
)
def test_settings_that_cannot_reproduce_a_run_are_refused_where_it_must(changes, message):
    with pytest.raises(ValueError, match=message):
        small_run(sync={"deterministic": True}, **changes)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGTERM", "kill -9 of the driver"])
def test_a_run_on_ray_that_was_stopped_goes_on_without_losing_a_bit(tmp_path, run_dir, ray_cluster, way):
    """One worker, rollouts off; and what it leaves behind is checkpoints and no lock."""
    changes = {"states": ROLLOUTS_OFF, "trainer": {"steps": 600}, "tracking": {"log_every": 1}}

    def losses(config):
        journal = Path(config.output, config.name, "metrics.jsonl")
        return {record["step"]: record["loss"] for record in read_journal(journal) if "loss" in record}

    whole = small_run(output=run_dir, name="whole", **changes)
    distill(whole)
    config = small_run(output=run_dir, **changes)
    if way == "SIGTERM":
        when(lambda: len(losses(config)) >= 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(RunStoppedError, match="everything is saved"):
            distill(config)
    else:
        Path(f"{run_dir}.yaml").write_text(to_yaml(config))
        with distilling(tmp_path / "log", f"{run_dir}.yaml") as run:
            run.until(lambda: len(losses(config)) >= 10)
            run.process.kill()
            run.process.wait()
    stopped = max(losses(config))
    assert stopped <= 580
    distill(resumed_config(f"{run_dir}/small", []), resume=True)
    expected, found = losses(whole), losses(config)
    assert sorted(expected) == list(range(1, 601))
    missing = set(expected) - set(found)
    if way == "SIGTERM":
        assert missing == set()
    else:  # records of its last half second, which lay in the hub; the steps are in the checkpoint
        assert missing <= set(range(stopped + 1, min(step for step in found if step > stopped)))
    assert found == {step: loss for step, loss in expected.items() if step not in missing}
    folders = Path(run_dir, "whole", "checkpoints", "attempt-1").glob("checkpoint_*")
    assert sorted(folder.name.rpartition("_")[2] for folder in folders) == ["000000592", "000000600"]
    assert not Path(run_dir, "whole", "lock.json").exists()
