"""Pins what a user reads when a config is wrong, and that anything wrong is a message and never a traceback."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_ray.config import (
    AblationConfig,
    ChainConfig,
    RunConfig,
    TeacherConfig,
    TextTeacherConfig,
    config_hash,
    flatten,
    load_config,
    preset_names,
    to_yaml,
)
from ddil_ray.config.prepare import PrepareConfig
from ddil_ray.errors import ConfigError

MINIMAL = """\
name: mine
teacher:
  model: builtin:digits
data:
  source: digits
objective:
  type: pd
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_load_again_as_they_are_written(name, written):
    kinds = {
        "ablation/": AblationConfig,
        "digits-chain": ChainConfig,
        "digits-teacher": TeacherConfig,
        "emoji-teacher": TextTeacherConfig,
        "emoji-prepare": PrepareConfig,
        "": RunConfig,
    }
    kind = next(kind for prefix, kind in kinds.items() if name.startswith(prefix))
    yours = ["data.source=mine"] if "/" in name and kind is RunConfig else []
    config = load_config(name, yours, kind=kind)
    assert load_config(written(to_yaml(config)), kind=kind) == config


def test_a_config_extends_others_and_mistakes_name_the_file_they_stand_in(tmp_path):
    (tmp_path / "part.yaml").write_text("trainer: {steps: 7, lr: 0.1}\nobjective: {type: lcm, skip: 2}\n")
    (tmp_path / "other.yaml").write_text("trainer: {batch_size: 12}\nseed: -1\n")
    own = f"extends: [{tmp_path}/part.yaml, {tmp_path}/other.yaml]\n" + MINIMAL + "trainer: {lr: 0.2}\n"
    (tmp_path / "own.yaml").write_text(own)
    with pytest.raises(ConfigError, match=r"`seed`.*other.yaml:2\]"):
        load_config(str(tmp_path / "own.yaml"))
    config = load_config(str(tmp_path / "own.yaml"), ["seed=3"])
    assert (config.trainer.steps, config.trainer.batch_size, config.trainer.lr) == (7, 12, 0.2)
    assert config.objective.type == "pd"  # another type starts empty


@pytest.mark.parametrize("extends", ["5", "[[a]]", "{a: b}"])
def test_what_extends_nothing_is_refused(extends, written):
    with pytest.raises(ConfigError, match=r"`extends` must name a config"):
        load_config(written(f"extends: {extends}\n{MINIMAL}"))


def test_a_config_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {tmp_path}/b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"extends: {tmp_path}/a.yaml\n")
    with pytest.raises(ConfigError, match=r"`extends` must lead to other configs"):
        load_config(str(tmp_path / "a.yaml"))


def test_pipeline_configs_load():
    folder = Path(__file__).parents[2] / "pipelines" / "configs"
    paths = sorted(folder.glob("*.yaml"))
    assert paths
    for path in paths:
        load_config(str(path), kind=TeacherConfig if path.stem.endswith("teacher") else RunConfig)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "trainer.stepz=5",
            r"`trainer.stepz` is not a setting of `trainer`. Did .* `trainer.steps`\?.*\[override trainer.stepz\]",
        ),
        ("trainer.steps=many", r"`trainer.steps` must be a valid integer, but is 'many' instead"),
        ("trainer.steps=0", r"`trainer.steps` must be greater than or equal to 1, but is 0 instead"),
        ("trainer.lr=nan", r"`trainer.lr` must be a finite number, but is 'nan' instead"),
        ("states.forward=0.5", r"`states`: forward \+ student \+ teacher \+ mixed must be 1 at the start, but is 0.5"),
        ("objective.student_steps=[8,3]", r"`objective.student_steps` must each divide.*3 follows 8"),
        ("objective.type=cm", r"`objective.type` must be one of 'pd', 'lcm', 'dmd2', but is 'cm' instead"),
        ("evaluation.steps=[3]", r"`evaluation.steps` must hold a number that a pd student .*but is \[3\]"),
        (
            "objective.type=dmd2 objective.time_range=[0.9,0.1]",
            r"`objective.time_range` must be \[low, high\] .*but is \[0.9, 0.1\]",
        ),
        ("objective.type=dmd2 tracking.log_every=2", r"`tracking.log_every` must be at least .*\(5\).*but is 2"),
        (
            "objective.type=dmd2 objective.gan_wait=1",
            r"`objective.gan_wait` is not a setting of `objective`. Did you mean `objective.gan_weight`\?",
        ),
        ("threshold.applies_to=students", r"`threshold.applies_to` must be 'teacher', 'target' or 'both', but is "),
        ("states.mixed_segment=0", r"`states.mixed_segment` must be greater than or equal to 1 .*but is 0 instead"),
        ("states.mixed_segment=epoch", r"`states.mixed_segment` must .*'trajectory', but is 'epoch' instead"),
        ("states.mixed_takeover=0", r"`states.mixed_takeover` must be greater than 0, but is 0 instead"),
        ("states.mixed_teacher_probability=1.5", r"`states.mixed_teacher_probability` must be less than .*1.5"),
        (
            "states.mixed_teacher_probability.start=0 states.mixed_teacher_probability.end=2",
            r"`states.mixed_teacher_probability.end` must be less than or equal to 1, but is 2 instead",
        ),
        ("objective.solver_steps=9", r"`objective.solver_steps` is not a setting of `objective`. Did you mean"),
        ("teacher.guidance=[3,1]", r"low <= high, but is \[3.0, 1.0\]"),
        ("teacher.guidance=[1,3]", r"`teacher.guidance` must be one number unless the student is told it"),
        ("trainer.batch_size=10 trainer.num_workers=3", r"multiple of num_workers x accumulate \(3 x 1\), but is 10"),
        ("trainer.parallel=zero", r"`trainer.parallel` must be 'ddp' or 'fsdp'"),
        (
            "trainer.parallel=fsdp trainer.optimizer=adamw_8bit",
            r"`trainer.optimizer` must be adamw where parallel is fsdp, but is",
        ),
        (
            "trainer.parallel=fsdp trainer.channels_last=true",
            r"`trainer.channels_last` must be false where parallel is fsdp",
        ),
        (
            "trainer.parallel=fsdp trainer.num_workers=2 trainer.num_gpus=0.5",
            r"`trainer.num_gpus` must be whole, 0 or auto where parallel is fsdp.*but is 0.5",
        ),
        ("replay.capacity=10", r"`replay.capacity` must hold .*128 \+ 128, but is 10"),
        ("labels.placement=gpu", r"`labels.placement` must be 'fused' or 'pool'"),
        ("student_rollouts.num_actors=[4,2]", r"\[min, max\] with min <= max, but is \[4, 2\]"),
        ("name=a/b", r"`name` must match pattern .*but is 'a/b' instead"),
    ],
)
def test_every_mistake_names_the_field_what_was_found_and_what_is_allowed(override, expected, written):
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(written(MINIMAL), override.split())
    assert caught.value.exit_code == 2


def test_all_mistakes_come_at_once_with_their_lines(written):
    text = MINIMAL + "trainer:\n  stepz: 3\n  batch_size: -1\n"
    with pytest.raises(ConfigError) as caught:
        load_config(written(text))
    message = str(caught.value)
    assert "run.yaml:9]" in message
    assert "run.yaml:10]" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "must hold `key: value` settings, but holds a list of 2"),
        ("a: [1,\n", "must be YAML"),
        (MINIMAL + "name: twice\n", "`name` must be given once, but is given again at .*run.yaml:8"),
        ("", "must hold `key: value` settings, but is empty"),
    ],
)
def test_files_that_are_no_config_are_refused(text, expected, written):
    with pytest.raises(ConfigError, match=expected):
        load_config(written(text))


def test_a_name_that_is_neither_file_nor_preset_gets_the_nearest():
    with pytest.raises(ConfigError, match=r"digits-lcm, digits-pd.*Did you mean digits-pd\?"):
        load_config("digits-pdd")


@pytest.mark.parametrize("override", ["steps", "=3", "a..b=1", "trainer.steps=[1"])
def test_overrides_that_are_none_are_refused(override, written):
    with pytest.raises(ConfigError, match="override"):
        load_config(written(MINIMAL), [override])


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)
_KEYS = ("model", "steps", "type", "every", "num_actors")
_FIELDS = st.sampled_from([(group, key) for group in RunConfig.model_fields for key in _KEYS])


@settings(max_examples=150)
@given(field=_FIELDS, value=_VALUES)
def test_any_value_anywhere_is_accepted_or_explained(field, value, tmp_path_factory):
    tree = yaml.safe_load(MINIMAL)
    group, key = field
    tree[group] = {**tree[group], key: value} if isinstance(tree.get(group), dict) else {key: value}
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    with contextlib.suppress(ConfigError):  # anything else fails the test
        load_config(str(path))


def test_credentials_are_not_among_the_tracked_parameters(written):
    config = load_config(written(MINIMAL), ["tracking.uri=https://me:secret@tracking.example"])
    assert flatten(config)["tracking.uri"] == "https://***@tracking.example"
    assert "secret" not in str(flatten(config))


def test_the_hash_changes_with_any_setting(written):
    a, b = (load_config(written(MINIMAL), [f"seed={seed}"]) for seed in (0, 1))
    assert config_hash(a) != config_hash(b)
