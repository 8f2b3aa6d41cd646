"""Pins what a user reads of a wrong setting: its path, the rule, the value, the nearest name; and never a secret."""

from __future__ import annotations

import pytest
import yaml
from fuzz import BASES, beyond, groups, leaves, put
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.config import AblationConfig, load_config
from ddil_ray.errors import ConfigError

OWN = ("distill", "train-teacher", "train-teacher text", "prepare")
"""Commands with a config of their own."""
SECRET = "hunter2-9f8e7d"  # pragma: allowlist secret


def message(tmp_path, kind, tree, overrides=()):
    """What is said of `tree`; empty where nothing is wrong."""
    text = tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False)
    (tmp_path / "c.yaml").write_text(text)
    try:
        load_config(str(tmp_path / "c.yaml"), list(overrides), kind=kind)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("trainer", "stepz"), 1, "`trainer.stepz` is not a setting of `trainer`. Did you mean `trainer.steps`?"),
        (("trainr",), {}, "`trainr` is not a setting. Did you mean `trainer`?"),
        (("lr",), 1, "`lr` is not a setting. Did you mean `trainer.lr`?"),
        (("pd",), 1, "`pd` is not a setting. Known are"),
        (("float",), 1, "`float` is not a setting. Known are"),
        (("objective", "pd"), 1, "`objective.pd` is not a setting of `objective`"),
        (("objective", "type"), "cm", "`objective.type` must be one of 'pd', 'lcm', 'dmd2', but is 'cm' instead."),
        (("objective",), {}, "`objective.type` must be given, but is missing."),
        (("objective",), 5, "`objective` must be a group of settings, but is 5 instead."),
        (("trainer",), None, "`trainer` must be a group of settings, but is null instead."),
        (("name",), False, "`name` must be text, but is false instead. Quote it to keep it text."),
        (("teacher", "model"), None, "`teacher.model` must be text, but is null instead."),
        (("trainer", "lr"), True, "`trainer.lr` must be a valid number, but is true instead."),
        (("states", "forward"), True, "but is true instead"),
        (("trainer", "steps"), "1e3", "`trainer.steps` must be a valid integer, but is '1e3' instead."),
        (("trainer", "betas"), [0.9], "`trainer.betas.1` must be given, but is missing."),
        (("student_rollouts", "num_actors"), "x", "must be a valid integer or be a list, but is 'x' instead."),
        (("states", "forward"), {"start": 1, "end": 2}, "`states.forward.end` must be less than or equal to 1"),
        (("output",), "a\0b", "`output` must be text without control characters, but is 'a\\x00b' instead."),
        (("trainer", "resources"), {"a": -1}, "`trainer.resources.a` must be greater than 0, but is -1 instead."),
    ],
)
def test_a_wrong_setting_is_named_with_rule_and_value(path, value, expected, tmp_path):
    kind, base = BASES["distill"]
    assert expected in message(tmp_path, kind, put(base, path, value))


def test_traps_of_yaml_do_not_pass_for_what_they_do_not_say(tmp_path):
    kind, base = BASES["distill"]
    text = yaml.safe_dump(base)
    assert "`seed` must be a number as it reads" in message(tmp_path, kind, text + "seed: 010\n")
    assert "`trainer.lr` must be a valid number, but is true" in message(tmp_path, kind, text + "trainer: {lr: yes}\n")
    assert message(tmp_path, kind, text + "trainer: {lr: 1e-3}\n") == ""  # a text to YAML, a number to all readers
    assert message(tmp_path, kind, text + "replay:\n") != ""
    config = load_config("digits-pd", ["trainer.lr=1e3"])
    assert config.trainer.lr == 1000


@pytest.mark.parametrize("command", OWN)
def test_every_number_is_held_to_its_bounds(command, tmp_path):
    """At a bound nothing is said of it; just beyond, its path, with the value."""
    kind, base = BASES[command]
    bounded = [(path, node) for path, node in leaves(kind, base) if beyond(node)]
    assert len(bounded) >= 5
    for path, node in bounded:
        name = f"`{'.'.join(path)}` must be "
        for value in beyond(node):
            found = message(tmp_path, kind, put(base, path, value))
            assert name in found, (path, value, found)
            assert f"but is {value!r} instead" in found
        for bound in (node[key] for key in ("minimum", "maximum") if key in node):
            found = message(tmp_path, kind, put(base, path, bound))  # what others allow beside it is another matter
            assert name not in found or f"but is {bound!r} instead" not in found, (path, bound)


@pytest.mark.parametrize("command", OWN)
def test_unknown_keys_anywhere_are_named_by_path_with_the_nearest(command, tmp_path):
    kind, base = BASES[command]
    for path, node in groups(kind, base):
        for key in node["properties"]:
            typo = (*path, key[:-1] + "zz")
            found = message(tmp_path, kind, put(base, typo, 1))
            assert f"`{'.'.join(typo)}` is not a setting" in found, found
            assert "Did you mean `" in found or "Known are" in found


def test_a_config_with_a_thousand_mistakes_is_told_of_twenty(tmp_path):
    kind, base = BASES["distill"]
    found = message(tmp_path, kind, base | {f"key{i}": 1 for i in range(1000)})
    assert "and 980 more" in found
    assert len(found.splitlines()) == 22


_URL = f"https://me:{SECRET}@host/path"
_SPOTS = [
    ({"tracking": {"uri": [_URL]}}, ()),
    ({"tracking": _URL}, ()),
    ({"tracking": {"password": SECRET}}, ()),
    ({"password": {"of": [SECRET]}}, ()),
    ({"trainer": {"steps": _URL}}, ()),
    ({"trainer": {"steps": {"token": SECRET}}}, ()),
    ({"trainer": {"betas": [SECRET, SECRET, SECRET]}}, ()),
    ({"extends": _URL}, ()),
    ({"extends": {"token": SECRET}}, ()),
    ({"states": {"forward": [SECRET]}}, ()),
    ({}, (f"tracking.password={SECRET}",)),
    ({}, (f"tracking.uri=[{_URL}, 1]",)),
    ({}, (f"trainer.steps=[{SECRET}",)),
    ({}, (f"a..b={SECRET}",)),
]


@pytest.mark.parametrize("spot", range(len(_SPOTS)))
def test_no_message_shows_a_secret_of_the_config(spot, tmp_path):
    changes, overrides = _SPOTS[spot]
    kind, base = BASES["distill"]
    found = message(tmp_path, kind, base | changes, overrides)
    assert found
    assert SECRET not in found


@given(cut=st.integers(0, 40), glued=st.sampled_from(["[", "{", "'", '"', ": :", "\t", "*", "!x ", "%", "@"]))
def test_no_message_about_broken_yaml_shows_a_secret(cut, glued, tmp_path_factory):
    kind, base = BASES["distill"]
    text = yaml.safe_dump(base) + f"tracking:\n  uri: {glued}https://me:{SECRET}@host\n"
    found = message(tmp_path_factory.mktemp("secret"), kind, text[: len(text) - cut // 4] + glued)
    assert SECRET not in found


def test_an_ablation_is_explained_as_well(tmp_path):
    tree = {"name": "a", "base": "digits-pd", "compare": "x", "axes": {"x": {"one": {}, "two": 5}}}
    assert "`axes.x.two` must be a group of settings, but is 5" in message(tmp_path, AblationConfig, tree)
