"""From what pydantic found wrong with a config to sentences: key, rule, value, remedy, place."""

from __future__ import annotations

import datetime
import difflib
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from ddil_ray.config.text import Places
from ddil_ray.redact import redact

__all__ = ["explain", "quoted"]

_MOST_LINES = 20
_LONGEST = 60
_SUBJECT = re.compile(r"^(Input|String|Tuple|Dictionary|Keys|Value) should ")
_MORE = re.compile(r"( after validation, not \d+|, unable to parse.*| instance of \w+)$")
_WORDS = {
    "model_type": "be a group of settings",
    "model_attributes_type": "be a group of settings",
    "dict_type": "be a group of settings",
    "tuple_type": "be a list",
    "string_type": "be text",
    "bool_type": "be true or false",
    "bool_parsing": "be true or false",
    "missing": "be given",
}
"""Rules that pydantic words for Python."""

Path = tuple[str | int, ...]


def explain(error: ValidationError, kind: type[BaseModel], settings: Mapping[str, Any], places: Places) -> list[str]:
    """A line per setting that is wrong.

    Args:
        error: what validating `settings` as `kind` gave.
        kind: the config's class.
        settings: what was given.
        places: where.
    """
    problems: dict[Path, list[Any]] = {}
    for problem in error.errors():
        problems.setdefault(_path(problem, settings), []).append(problem)
    own = {
        path: found
        for path, found in problems.items()
        if not (isinstance(found[0]["input"], dict) and _has_deeper(path, problems))
    }
    lines = [_line(path, found, kind, places) for path, found in itertools.islice(own.items(), _MOST_LINES)]
    return lines if len(own) <= _MOST_LINES else [*lines, f"... and {len(own) - _MOST_LINES} more."]


def quoted(value: Any) -> str:
    """A value as messages show it: short, without secrets, and of what holds others only what it is."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a group of settings"
    if isinstance(value, (list, tuple, set)):
        simple = all(isinstance(part, (int, float)) for part in value) and len(value) <= 8
        return repr(list(value)) if simple else f"a list of {len(value)}"
    if isinstance(value, (datetime.date, datetime.datetime)):
        return f"the date {value}"
    text = redact(repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _path(problem: Any, settings: Any) -> Path:
    """Where in `settings` a problem lies: of pydantic's location, all but the names of members of unions."""
    path: list[str | int] = []
    node: Any = settings
    for part in problem["loc"]:
        if _has(node, part):
            node = node[part]
        elif not (problem["type"] == "missing" and part == problem["loc"][-1]):
            continue
        path.append(part)
    return tuple(path)


def _has(node: Any, part: str | int) -> bool:
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node)


def _has_deeper(path: Path, problems: Mapping[Path, Any]) -> bool:
    return any(len(other) > len(path) and other[: len(path)] == path for other in problems)


def _line(path: Path, problems: Sequence[Any], kind: type[BaseModel], places: Places) -> str:
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), "")
    return _sentence(path, problems, kind) + (f"  [{place}]" if place else "")


def _sentence(path: Path, problems: Sequence[Any], kind: type[BaseModel]) -> str:
    first, name = problems[0], _dotted(path)
    if first["type"] == "extra_forbidden":
        return _unknown(path, _keys_at(kind, first["loc"][:-1]), kind)
    if first["type"].startswith("union_tag"):
        return _untagged(name, first)
    if first["type"] == "value_error":
        return _said(name, first)
    rules = list(dict.fromkeys(map(_rule, problems)))
    found = "missing" if first["type"] == "missing" else f"{quoted(first['input'])} instead"
    return f"`{name}` must {' or '.join(rules)}, but is {found}.{_hint(rules, first['input'])}"


def _said(name: str, problem: Any) -> str:
    """What a validator of ours says: a rule of the setting, or a sentence about some of its group."""
    words = problem["msg"].removeprefix("Value error, ")
    if words.startswith("must "):
        return f"`{name}` {words}, but is {quoted(problem['input'])} instead."
    one = re.match(r"[a-z][\w.]*(?= must )", words)
    if one:
        return f"`{'.'.join(filter(None, (name, one.group())))}`{words[one.end() :]}."
    return (f"`{name}`: {words}" if name else words) + "."


def _rule(problem: Any) -> str:
    return _WORDS.get(problem["type"]) or _MORE.sub("", _SUBJECT.sub("", problem["msg"]))


def _hint(rules: Sequence[str], value: Any) -> str:
    text_for_yaml = isinstance(value, (bool, int, float, datetime.date))
    return " Quote it to keep it text." if _WORDS["string_type"] in rules and text_for_yaml else ""


def _unknown(path: Path, known: Sequence[str], kind: type[BaseModel]) -> str:
    group, key = path[:-1], str(path[-1])
    near = [_dotted((*group, match)) for match in difflib.get_close_matches(key, known, n=1)]
    near += [_dotted(other) for other in _all_keys(kind) if other[-1] == key][:1]
    advice = f"Did you mean `{near[0]}`?" if near else f"Known are {', '.join(known) or 'none'}."
    return f"`{_dotted(path)}` is not a setting{f' of `{_dotted(group)}`' if group else ''}. {advice}"


def _untagged(name: str, problem: Any) -> str:
    """Of a group that is of several kinds, told apart by one key."""
    key = problem["ctx"]["discriminator"].strip("'")
    value = problem["input"].get(key) if isinstance(problem["input"], Mapping) else None
    tags = problem["ctx"].get("expected_tags")
    rule = f"one of {tags}" if tags else "given"
    return f"`{name}.{key}` must be {rule}, but is {'missing' if value is None else f'{quoted(value)} instead'}."


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


@functools.cache
def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    return kind.model_json_schema()


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the settings at a location of the tree."""
    schema = _schema(kind)
    definitions = schema.get("$defs", {})
    node: dict[str, Any] = schema
    for part in location:
        mapping = node.get("discriminator", {}).get("mapping", {})
        node = {"$ref": mapping[part]} if part in mapping else node.get("properties", {}).get(part, node)
        options = [o for o in node.get("anyOf", []) + node.get("allOf", []) if "$ref" in o]
        node = options[0] if options else node
        if "$ref" in node:
            node = definitions[node["$ref"].rpartition("/")[2]]
    return sorted(node.get("properties", {}))


def _all_keys(kind: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Paths of all settings, of groups of several kinds those of each."""
    schema = _schema(kind)

    def walk(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for option in (node, *node.get("anyOf", ()), *node.get("oneOf", ())):
            if "$ref" in option:
                yield from walk(schema["$defs"][option["$ref"].rpartition("/")[2]], path)
        for name, inner in node.get("properties", {}).items():
            yield (*path, name)
            yield from walk(inner, (*path, name))

    return walk(schema, ())
