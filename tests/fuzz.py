"""What tests throw at the commands: configs right or wrong by construction, by their schema; and what must follow."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import yaml
from hypothesis import strategies as st

from ddil_ray.cli import main
from ddil_ray.config import AblationConfig, ChainConfig, RunConfig, TeacherConfig, TextTeacherConfig
from ddil_ray.config.prepare import PrepareConfig

__all__ = ["BASES", "Leaf", "bad_values", "beyond", "broken_texts", "groups", "leaves", "put", "refused", "valid"]

NOWHERE = "/dev/null/nowhere"
"""No folder: a config that was let through would fail for it, before anything starts."""

_RUN = {
    "name": "mine",
    "output": NOWHERE,
    "teacher": {"model": "builtin:digits"},
    "data": {"source": "digits"},
    "objective": {"type": "pd"},
}
BASES: dict[str, tuple[type, dict[str, Any]]] = {
    "distill": (RunConfig, _RUN),
    "plan": (RunConfig, _RUN),
    "evaluate": (RunConfig, _RUN),
    "train-teacher": (TeacherConfig, {"name": "mine", "output": NOWHERE, "data": {"source": "digits"}}),
    "train-teacher text": (
        TextTeacherConfig,
        {"kind": "text-to-image", "name": "mine", "output": NOWHERE, "data": {"source": "emoji"}},
    ),
    "prepare": (
        PrepareConfig,
        {"output": NOWHERE, "teacher": {"model": "builtin:digits"}, "data": {"source": "emoji"}},
    ),
    "chain": (
        ChainConfig,
        {
            "name": "mine",
            "output": NOWHERE,
            "distill": {"extends": "digits-pd"},
            "compare": {"runs": ["a"]},
            "export": {},
        },
    ),
    "ablate": (
        AblationConfig,
        {
            "name": "mine",
            "base": "digits-perceptron",
            "compare": "rate",
            "axes": {"rate": {"low": {"trainer": {"lr": 1e-4}}, "high": {"trainer": {"lr": 1e-3}}}},
        },
    ),
}
"""The class and the least valid config of each command."""

Leaf = tuple[tuple[str, ...], dict[str, Any]]
"""A setting: its path, and what the schema says of it."""


def refused(command: str, *arguments: object) -> str:
    """The one message with which the command refuses `arguments`: exit code 2, nothing else said or started."""
    words = [command.partition(" ")[0], *(["builtin:digits"] if command == "evaluate" else []), *map(str, arguments)]
    if command in ("evaluate", "ablate"):
        words += ["--out", NOWHERE]
    out, err, before = io.StringIO(), io.StringIO(), _ray_is_up()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(words)
    said = err.getvalue()
    assert ended.value.code == 2, (words, said, out.getvalue())
    assert re.findall("^Error: ", said, re.MULTILINE) == ["Error: "], said
    assert said.startswith("Error: "), said
    assert "Traceback" not in said
    assert re.search(r" must |is not a setting", said), said
    assert "pydantic" not in said
    assert _ray_is_up() == before
    return said


def _ray_is_up() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """`tree` with `value` at `path`."""
    key, *rest = path
    inner = tree.get(key)
    return {**tree, key: put(inner if isinstance(inner, dict) else {}, tuple(rest), value) if rest else value}


@functools.cache
def _schema(kind: type) -> dict[str, Any]:
    return kind.model_json_schema()


def leaves(kind: type, tree: dict[str, Any]) -> list[Leaf]:
    """All settings of `kind` that are no groups; of groups of several kinds, those that `tree` chooses."""
    return [(path, node) for path, node in _walk(kind, tree) if "properties" not in node]


def groups(kind: type, tree: dict[str, Any]) -> list[Leaf]:
    """All groups."""
    return [((), _schema(kind)), *((p, n) for p, n in _walk(kind, tree) if "properties" in n)]


def _walk(kind: type, tree: dict[str, Any]) -> Iterator[Leaf]:
    schema = _schema(kind)

    def resolved(node: dict[str, Any], given: Any) -> dict[str, Any]:
        if "discriminator" in node:
            chosen = given["type"] if isinstance(given, dict) else next(iter(node["discriminator"]["mapping"]))
            node = {"$ref": node["discriminator"]["mapping"][chosen]}
        if "$ref" in node:
            return schema["$defs"][node["$ref"].rpartition("/")[2]]
        if "anyOf" in node:
            return {"anyOf": [resolved(option, None) for option in node["anyOf"]]}
        return node

    def walk(node: dict[str, Any], path: tuple[str, ...], given: Any) -> Iterator[Leaf]:
        for name, inner in node.get("properties", {}).items():
            value = given.get(name) if isinstance(given, dict) else None
            found = resolved(inner, value)
            yield (*path, name), found
            yield from walk(_group_in(found, value), (*path, name), value)

    return walk(schema, (), tree)


def _group_in(node: dict[str, Any], given: Any) -> dict[str, Any]:
    """Whose settings to go on to: of a group that may be left out, where it is not."""
    return node["anyOf"][0] if "anyOf" in node and isinstance(given, dict) else node


_WRONG: dict[str, list[Any]] = {
    "integer": ["x", 1.5, True, [], {}, None, 10**30, -(10**30), "1e3", ""],
    "number": ["x", True, [], {}, None, float("nan"), float("inf"), -float("inf"), ""],
    "string": [5, True, 1.5, [], {}, None, "a\0b", "x" * 5000],
    "boolean": ["maybe", 7, 1.5, [], {}, None],
    "array": ["x", 5, True, {}, None, 1.5],
    "object": ["x", 5, True, [], None, 1.5],
}


def bad_values(node: dict[str, Any]) -> list[Any]:
    """Values that a setting cannot have, whatever else is set; of the numbers also those just beyond its bounds."""
    if "anyOf" in node:
        lists = [bad_values(option) for option in node["anyOf"] if option.get("type") != "null"]
        nothing_is_fine = len(lists) < len(node["anyOf"])
        found = [value for value in lists[0] if all(_among(value, others) for others in lists[1:])]
        return [value for value in found if not (value is None and nothing_is_fine)]
    if "properties" in node:
        return _WRONG["object"]
    if "enum" in node or "const" in node:
        return [value for value in _WRONG["string"] if value != "a\0b"] + ["no such thing"]
    return _WRONG.get(node.get("type", ""), []) + beyond(node)


def _among(value: Any, values: list[Any]) -> bool:
    return any(type(value) is type(other) and repr(value) == repr(other) for other in values)


def beyond(node: dict[str, Any]) -> list[Any]:
    """Just outside the bounds."""
    whole = node.get("type") == "integer"
    found = [node[key] for key in ("exclusiveMinimum", "exclusiveMaximum") if key in node]
    found += [node["minimum"] - (1 if whole else 1e-3)] if "minimum" in node else []
    return found + ([node["maximum"] + (1 if whole else 1e-3)] if "maximum" in node else [])


def valid(node: dict[str, Any] | Literal[True]) -> st.SearchStrategy[Any]:
    """Values that a setting may have by itself, its bounds among them."""
    if node is True:
        return st.booleans() | st.integers() | st.lists(st.integers(), max_size=2)
    if "anyOf" in node:
        return st.one_of([valid(option) for option in node["anyOf"]])
    if "const" in node:
        return st.just(node["const"])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    if "properties" in node:
        return st.fixed_dictionaries({}, optional={name: valid(inner) for name, inner in node["properties"].items()})
    return _OF_TYPE[node["type"]](node)


def _numbers(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    low, high = (node.get(key, node.get(f"exclusive{key.capitalize()}")) for key in ("minimum", "maximum"))
    if node["type"] == "integer":
        return st.integers(low, high)
    ends = {"exclude_min": "exclusiveMinimum" in node, "exclude_max": "exclusiveMaximum" in node}
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **ends)


def _arrays(node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "prefixItems" in node:
        return st.tuples(*(valid(item) for item in node["prefixItems"])).map(list)
    return st.lists(valid(node["items"]), min_size=node.get("minItems", 0), max_size=4)


def _strings(node: dict[str, Any]) -> st.SearchStrategy[str]:
    if "pattern" in node:
        return st.from_regex(node["pattern"], fullmatch=True).map(lambda text: text[: node.get("maxLength", 100)])
    return st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=40)


_OF_TYPE = {
    "integer": _numbers,
    "number": _numbers,
    "array": _arrays,
    "string": _strings,
    "boolean": lambda node: st.booleans(),
    "null": lambda node: st.none(),
    "object": lambda node: st.dictionaries(st.text(max_size=5), valid(node["additionalProperties"]), max_size=2),
}

_WORD = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"), min_size=1, max_size=8)


@st.composite
def broken_texts(draw: st.DrawFn, tree: dict[str, Any]) -> bytes:
    """A file that is no config, whatever the settings in it: `tree` with something that YAML, or we, do not take."""
    text, word = yaml.safe_dump(tree, sort_keys=False), draw(_WORD)
    levels = draw(st.integers(7, 40))
    kinds: list[bytes | str] = [
        "",
        "# a comment alone\n",
        f"- {word}\n- {text.splitlines()[0]}\n",
        word,
        f"{text}{text.splitlines()[0]}\n",  # a key given twice
        f"{text}{word}: [1, 2\n",
        f"{text}{word}: {{a: 1\n",
        f'{text}{word}: "not closed\n',
        f"{text}\t{word}: 1\n",
        f"{text}  {word}: 1\n nested: 2\n",
        f"{text}{word}: *{word}\n",
        f"{text}{word}: !!python/object/apply:os.system ['true']\n",
        f"{text}{word}: !{word} 1\n",
        f'{text}{word}: !!{draw(st.sampled_from(["int", "float", "bool", "timestamp"]))} ""\n',
        f"{text}---\n{text}",
        f"{text}{word}: &a [*a]\n",
        f"{text}{word}: &a\n  b: *a\n",
        f"{text}? [a, b]\n: 1\n",
        f"{text}{draw(st.integers(0, 99))}: 1\n",
        f"{text}no: 1\n",
        f"{text}seed: 0{draw(st.integers(10, 77))}\n".replace("8", "7").replace("9", "7"),
        f"{text}seed: {draw(st.integers(1, 23))}:{draw(st.integers(10, 59))}\n",
        f"{text}{word}: {'9' * 5000}\n",
        f"{text}{word}: 2001-99-{draw(st.integers(32, 99))}\n",
        f"{text}{word}: {'[' * 40 * levels}\n",
        text + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '1'] * 9)}]\n" for i in range(levels)),
        text + f"{word}: {'x' * 300_000}\n",
        text.encode("utf-16"),
        text.encode() + b"\xff\xfe" + draw(st.binary(max_size=4)),
        text.encode() + b"\x00",
        b"\x80" + draw(st.binary(max_size=60)),
        b"\x89PNG\r\n\x1a\n" + draw(st.binary(max_size=60)),
    ]
    made = draw(st.sampled_from(kinds))
    return made.encode() if isinstance(made, str) else made
