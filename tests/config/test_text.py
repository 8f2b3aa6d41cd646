"""Pins what YAML is taken: nothing that means another thing than it says, that grows, or that is given twice."""

from __future__ import annotations

import time

import pytest
import yaml

from ddil_ray.config.text import MOST_BYTES, parse
from ddil_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: {b: 1, b: 2}", r"`a.b` must be given once, but is given again at f:1"),
        ("a:\n- {b: 1}\n- {b: 1, b: 2}", r"`a.1.b` must be given once, but is given again at f:3"),
        ("seed: 010", r"`seed` must be a number as it reads, but is 010 instead, .* octal one.*\[f:1\]"),
        ("seed: -007", r"`seed` .* -007 instead"),
        ("time: 12:30", r"`time` must be a number as it reads, but is 12:30 instead, .* base-60 one"),
        ("no: 1", r"Keys must be names, but one is 'no', which YAML reads as bool. Quote it"),
        ("a: {1: x}", r"Keys of `a` must be names, but one is '1', which YAML reads as int"),
        ("? [a]\n: 1", r"Keys must be names, but one is a seq"),
        ("a: *b", r"found undefined alias 'b'  \[f:1\]"),
        ("a: !!python/name:os.system", r"could not determine a constructor"),
        ("a: 1\n---\nb: 2", r"but found another document"),
        ("a: 2001-13-45", r"a number, date or other tagged value that is none"),
        ('a: !!int ""', r"a number, date or other tagged value that is none"),
        ("a: !!bool maybe", r"tagged value that is none"),
        ("a: !!timestamp x", r"tagged value that is none"),
        ("a: !!float x", r"tagged value that is none"),
        ("a: &a [*a]", r"nested"),
        ("a: &a {b: *a}", r"nested"),
        ("a: &a {<<: *a}", r"nested|anchor"),
        ("[" * 5000, r"nested"),
        ("a: \x01", r"a character that YAML does not allow"),
    ],
)
def test_what_means_another_thing_than_it_says_is_refused_with_its_line(text, expected):
    with pytest.raises(ConfigError, match=expected):
        parse(text, "f")


@pytest.mark.parametrize("kind", ["lists", "mappings", "merged"])
def test_aliases_that_repeat_a_billion_values_are_refused_at_once(kind):
    """Nine references to the level below at each of 20 levels: 9 ** 20 values."""
    lines = ["b0: &b0 {k: 1}"]
    for i in range(1, 20):
        nine = [f"*b{i - 1}"] * 9
        bodies = {
            "lists": f"[{', '.join(nine)}]",
            "mappings": "{" + ", ".join(f"k{n}: {alias}" for n, alias in enumerate(nine)) + "}",
            "merged": f"{{<<: [{', '.join(nine)}]}}",
        }
        lines.append(f"b{i}: &b{i} {bodies[kind]}")
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=r"at most 20000 values"):
        parse("\n".join(lines), "f")
    assert time.perf_counter() - started < 5


def test_aliases_and_merges_that_repeat_little_are_taken():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n"
    settings, places = parse(text, "f")
    assert settings == yaml.safe_load(text)
    assert settings["b"] == {"x": 1, "y": 3}
    assert places[("b", "y")] == "f:2"


def test_numbers_that_read_as_they_mean_are_taken():
    text = "a: 1e3\nb: 0\nc: 0.5\nd: 1_000\ne: 0x10\nf: '010'\ng: -5\nh: 1.0e-4\n"
    expected = {"a": "1e3", "b": 0, "c": 0.5, "d": 1000, "e": 16, "f": "010", "g": -5, "h": 1e-4}
    assert parse(text, "f")[0] == expected


def test_files_have_a_limit(tmp_path):
    from ddil_ray.config import load_config

    (tmp_path / "big.yaml").write_text("a: " + "x" * MOST_BYTES)
    with pytest.raises(ConfigError, match=r"at most 256 KiB of YAML, but .*big.yaml' is more"):
        load_config(str(tmp_path / "big.yaml"))
