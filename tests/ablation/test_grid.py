"""Pins how an ablation becomes runs, and that its errors are all known before one starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from runs import PD, small_run

from ddil_ray.ablation.grid import check_runs, grid_runs
from ddil_ray.config import AblationConfig, load_config, preset_names, to_yaml
from ddil_ray.errors import ConfigError

STATES = {"forward only": {"states": {"forward": 1.0, "student": 0.0}}, "half": {}}
OBJECTIVES = {"lcm": {}, "pd": {"objective": {**PD, "loss": "v"}, "states": {"teacher": 0.0}}}


@pytest.fixture
def spec(tmp_path):
    """Make an ablation of the small run, with changes."""

    def make(**changes):
        base = tmp_path / "base.yaml"
        base.write_text(to_yaml(small_run(evaluation={"enabled": True, "num_samples": 32, "steps": [2, 4]})))
        tree = {"name": "grid", "base": str(base), "seeds": [0, 5], "compare": "states"}
        tree |= {"axes": {"objective": OBJECTIVES, "states": STATES}, **changes}
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return path

    return make


def _load(path, *overrides):
    return load_config(str(path), overrides, kind=AblationConfig)


def test_the_grid_is_the_product_of_axes_and_seeds(spec):
    runs = grid_runs(_load(spec()))
    assert [run.label for run in runs[:4]] == [
        "lcm, forward only, seed 0", "lcm, half, seed 0", "pd, forward only, seed 0", "pd, half, seed 0",
    ]  # fmt: skip
    assert [run.seed for run in runs] == [0] * 4 + [5] * 4
    assert len({run.folder(Path("out")) for run in runs}) == len({run.key for run in runs}) == 8
    assert runs[3].folder(Path("out")) == Path("out/runs/pd--half/seed-0")
    assert (runs[3].arm, runs[3].group) == ("half", {"objective": "pd"})


def test_options_change_what_they_name_and_another_type_starts_its_group_anew(spec):
    first, second, third, fourth = grid_runs(_load(spec()))[:4]
    assert (first.config.states.student, second.config.states.student) == (0.0, 0.5)
    assert first.config.objective.solver_steps == 10
    assert third.config.objective.model_dump() == {**PD, "loss": "v", "student_steps": (4, 2)}
    assert third.config.trainer == first.config.trainer
    assert fourth.reference == third.config


def test_the_command_line_changes_base_settings_and_seeds(spec, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(to_yaml(small_run(teacher={"guidance": 2.0}, evaluation={"enabled": True, "steps": [2]})))
    runs = grid_runs(_load(spec(), f"base={other}", "settings.trainer.steps=7", "seeds=[3]"))
    assert [run.seed for run in runs] == [3] * 4
    assert {(run.config.teacher.guidance, run.config.trainer.steps) for run in runs} == {(2.0, 7)}


def test_a_key_changes_with_settings_of_the_run_and_of_its_baseline_only(spec):
    key = grid_runs(_load(spec()))[1].key
    assert grid_runs(_load(spec(name="grid")))[1].key == key
    assert grid_runs(_load(spec(settings={"trainer": {"lr": 1.0}})))[1].key != key
    changed = {**STATES, "forward only": {"states": {"forward": 0.9, "student": 0.1}}}
    assert grid_runs(_load(spec(axes={"objective": OBJECTIVES, "states": changed})))[1].key != key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"compare": "state"}, "`compare` must be one of the axes objective, states, but is 'state'"),
        ({"axes": {"states": {"one": {}}}}, "must have a baseline and another option"),
        ({"axes": {"states": {"a b": {}, "A-b": {}}}}, "names that differ in letters or digits"),
        ({"settings": {"seed": 3}}, "`settings.seed` must be left out"),
        ({"axes": {"states": {"a": {}, "b": {"name": "x"}}}}, "`axes.states.b.name` must be left out"),
        ({"seeds": [1, 1]}, "`seeds` must differ"),
        ({"axis": {}}, "`axis` is not a setting. Did you mean `axes`"),
    ],
)
def test_a_bad_spec_is_refused(spec, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        _load(spec(**changes))


def test_every_bad_combination_is_told_at_once_with_its_place(spec):
    axes = {"states": {"good": {}, "odd": {"states": {"forward": 2.0}}, "typo": {"trainer": {"stepz": 1}}}}
    with pytest.raises(ConfigError) as error:
        grid_runs(_load(spec(axes=axes)))
    assert "odd is not a valid config" in str(error.value)
    assert "`trainer.stepz` is not a setting of `trainer`. Did you mean `trainer.steps`?" in str(error.value)
    assert "axes.states.typo of the ablation" in str(error.value)


def test_arms_that_are_measured_differently_cannot_be_compared(spec):
    axes = {"states": {"a": {}, "b": {"evaluation": {"num_samples": 64}}}}
    with pytest.raises(ConfigError, match=r"`axes.states.b` must leave `evaluation`"):
        grid_runs(_load(spec(axes=axes)))


def test_what_needs_teacher_and_data_is_checked_for_every_combination(spec):
    axes = {"data": {"digits": {}, "none": {"data": {"source": "/nowhere"}}}}
    with pytest.raises(ConfigError, match=r"none: `data.source`.*"):
        check_runs(grid_runs(_load(spec(axes=axes, compare="data", seeds=[0]))))
    rounds = {"objective": {"lcm": {}, "pd": {"objective": {**PD, "student_steps": [4]}}}}
    with pytest.raises(ConfigError, match=r"`evaluation.steps` must hold a number that a pd student .*but is \[2\]"):
        grid_runs(_load(spec(axes=rounds, compare="objective", settings={"evaluation": {"steps": [2]}})))


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("ablation/")])
def test_shipped_ablations_hold(name):
    check_runs(grid_runs(load_config(name, kind=AblationConfig)))
