"""Malformed configs, thrown at the commands themselves: always one message with exit code 2, never a start."""

from __future__ import annotations

import pytest
import yaml
from fuzz import BASES, bad_values, broken_texts, groups, leaves, put, refused
from hypothesis import given, settings
from hypothesis import strategies as st

COMMANDS = list(BASES)
_NAMES = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_0123456789é -"), min_size=1, max_size=12)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def dumped(tree, folder):
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def wrong_value(command, data, folder):
    """A setting has a value that it cannot have: the message names it."""
    kind, base = BASES[command]
    settings_ = [*leaves(kind, base), *groups(kind, base)[1:]]
    path, node = data.draw(st.sampled_from([leaf for leaf in settings_ if bad_values(leaf[1])]))
    value = data.draw(st.sampled_from(bad_values(node)))
    said = refused(command, dumped(put(base, path, value), folder))
    assert f"`{path[0]}" in said, (path, value, said)


def unknown_key(command, data, folder):
    """A key that no group has, anywhere, whatever it holds: the message names it."""
    kind, base = BASES[command]
    path, node = data.draw(st.sampled_from(groups(kind, base)))
    key = data.draw(_NAMES.filter(lambda name: name not in node["properties"] and name != "extends"))
    said = refused(command, dumped(put(base, (*path, key), data.draw(_ANY)), folder))
    assert f"`{'.'.join((*path, key))}` is not a setting" in said


def missing_key(command, data, folder):
    """Something that must be given is not."""
    base = BASES[command][1]
    optional = {"output", "kind", "compare", "export"} - ({"output"} if command == "prepare" else set())
    gone = data.draw(st.sampled_from([key for key in base if key not in optional]))
    said = refused(command, dumped({key: value for key, value in base.items() if key != gone}, folder))
    assert f"`{gone}" in said


def broken_text(command, data, folder):
    """A file that is no YAML, or none that a config is written in."""
    path = folder / "c.yaml"
    path.write_bytes(data.draw(broken_texts(BASES[command][1])))
    refused(command, path)


def bad_override(command, data, folder):
    """An override that is none, or of a setting that is none, or of a value that cannot be."""
    kind, base = BASES[command]
    path, node = data.draw(st.sampled_from([leaf for leaf in leaves(kind, base) if bad_values(leaf[1])]))
    name, key = ".".join(path), data.draw(_NAMES.filter(lambda text: not text.startswith("-")))
    value = data.draw(st.sampled_from(bad_values(node)))
    wrong = data.draw(
        st.sampled_from([
            f"{name}={yaml.safe_dump(value, default_flow_style=True)}",
            f"{name}.{key}.x=1",
            f"{name}=[1",
            f"{name}=*a",
            f"..{key}=1",
            f"{name}",
            f"={key}",
            f"zz{key.replace('=', '')}=1",
        ])
    )  # fmt: skip
    refused(command, dumped(base, folder), wrong)


MALFORMED = (wrong_value, unknown_key, missing_key, broken_text, bad_override)


@pytest.mark.parametrize("malform", MALFORMED)
@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=6)
@given(data=st.data())
def test_a_malformed_config_is_refused_in_one_message(command, malform, data, tmp_path_factory):
    malform(command, data, tmp_path_factory.mktemp("malformed"))


@pytest.mark.slow
@pytest.mark.parametrize("malform", MALFORMED)
@pytest.mark.parametrize("command", COMMANDS)
@settings(max_examples=100)
@given(data=st.data())
def test_two_thousand_malformed_configs_are_refused(command, malform, data, tmp_path_factory):
    """4 kinds x 8 commands x 100 examples, and every key that must be given: more than 3,200."""
    malform(command, data, tmp_path_factory.mktemp("malformed"))


@settings(max_examples=20)
@given(data=st.data())
def test_any_value_anywhere_ends_in_one_message(data, tmp_path_factory):
    """Where it is valid by chance, the run fails for its output, which is nowhere, before anything starts."""
    kind, base = BASES["distill"]
    path, _ = data.draw(st.sampled_from([leaf for leaf in leaves(kind, base) if leaf[0] != ("output",)]))
    if path[:1] not in (("teacher",), ("student",)):  # whose names may be looked up on the hub
        refused("distill", dumped(put(base, path, data.draw(_ANY)), tmp_path_factory.mktemp("any")))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_file_is_refused(command, tmp_path):
    for source, expected in {
        tmp_path: "IsADirectoryError",
        tmp_path / "nowhere.yaml": "FileNotFoundError",
        "nosuch://bucket/c.yaml": "must be a path or a URL of",
        "x" * 5000: "name too long",
    }.items():
        assert expected.lower() in refused(command, source).lower()
