"""Reading a config: YAML file or shipped preset, dotted overrides, and one message with everything that is wrong."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ddil_ray.config.run import RunConfig
from ddil_ray.errors import ConfigError
from ddil_ray.places import check_url
from ddil_ray.redact import redacted

__all__ = ["ConfigTree", "config_hash", "flatten", "load_config", "preset_names", "to_yaml"]

M = TypeVar("M", bound=BaseModel)
Path_ = tuple[str | int, ...]


@dataclass
class ConfigTree:
    """A config before it is validated: nested settings, and where each was given."""

    source: str
    """What messages call it."""
    settings: dict[str, Any]
    places: dict[Path_, str] = field(default_factory=dict)

    @classmethod
    def read(cls, source: str) -> ConfigTree:
        """The settings of a YAML file or preset, over those of the configs that its key `extends` names, in order.

        Raises:
            ConfigError: unreadable, or extends itself.
        """
        return cls._extended(source, ())

    @classmethod
    def _extended(cls, source: str, children: tuple[str, ...]) -> ConfigTree:
        if source in children:
            raise ConfigError(f"`extends` must lead to other configs, but {source!r} extends itself.")
        settings, places = _parse(_read(source), source)
        extends = settings.pop("extends", [])
        parents = [extends] if isinstance(extends, str) else extends
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            raise ConfigError(f"`extends` must name a config or a list of them, but is {extends!r}  [{source}]")
        tree = cls(source, {})
        for parent in parents:
            inherited = cls._extended(parent, (*children, source))
            tree = tree.merge(inherited.settings, source)
            tree.places |= inherited.places
        tree = tree.merge(settings, source)
        tree.places |= places
        return tree

    def set(self, override: str) -> None:
        """Apply one `dotted.key=value`, the value in YAML.

        Raises:
            ConfigError: not of that form.
        """
        _apply(self.settings, self.places, override)

    def merge(self, changes: Mapping[str, Any], place: str) -> ConfigTree:
        """These settings with the nested `changes` over them, which were given at `place`.

        A group that gets another `type` starts empty: the keys of one objective mean nothing to another.
        """
        merged = ConfigTree(self.source, dict(self.settings), dict(self.places))
        merged.settings = _merged(self.settings, changes, (), merged.places, place)
        return merged

    def validate(self, kind: type[M]) -> M:
        """The config.

        Raises:
            ConfigError: lists every problem with its key, value, remedy and place.
        """
        try:
            return kind.model_validate(self.settings)
        except ValidationError as error:
            lines = [_explain(problem, kind, self.places) for problem in error.errors()]
            message = f"{self.source} is not a valid config:\n" + "\n".join(f"  {line}" for line in lines)
            raise ConfigError(message) from None


def load_config(source: str, overrides: Sequence[str] = (), *, kind: type[M] = RunConfig) -> M:  # type: ignore[assignment]
    """The validated config.

    Args:
        source: YAML file by path or fsspec URL, or the name of a preset (`preset_names`); its key `extends` may name
            one or more of those, whose settings it is laid over.
        overrides: `dotted.key=value`, values in YAML.
        kind: `RunConfig`, `TeacherConfig` or `AblationConfig`.

    Raises:
        ConfigError: unreadable, or invalid; lists every problem with its key, value, remedy and place.
    """
    tree = ConfigTree.read(source)
    for override in overrides:
        tree.set(override)
    return tree.validate(kind)


_PARTS = "parts/"
"""Folder of presets that others extend; no whole configs."""


def preset_names() -> list[str]:
    """Names of the shipped configs; those in a folder are `folder/name`."""
    return [name for name in _shipped() if not name.startswith(_PARTS)]


def _shipped() -> list[str]:

    def walk(folder: Any, prefix: str) -> Iterator[str]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                yield prefix + entry.name.removesuffix(".yaml")

    return sorted(walk(resources.files("ddil_ray.presets"), ""))


def to_yaml(config: BaseModel) -> str:
    """The resolved config without secrets; it loads as it is."""
    return yaml.safe_dump(redacted(config.model_dump(mode="json")), sort_keys=False)


def flatten(config: BaseModel) -> dict[str, str]:
    """Dotted key -> value, for tracking, without secrets."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = str(value)

    walk("", redacted(config.model_dump(mode="json")))
    return flat


def config_hash(config: BaseModel) -> str:
    """Twelve hexadecimal digits that change with any setting, but not with a secret in it."""
    content = json.dumps(redacted(config.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _read(source: str) -> str:
    if source in _shipped():
        return (resources.files("ddil_ray.presets") / f"{source}.yaml").read_text()
    check_url(source, "CONFIG")
    import fsspec

    try:
        with fsspec.open(source, "r") as file:
            return str(file.read())
    except Exception as error:  # every filesystem has errors of its own
        close = difflib.get_close_matches(source, preset_names(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"CONFIG must be a readable YAML file or one of the presets {', '.join(preset_names())}, but is "
            f"{source!r} instead ({type(error).__name__}: {error}).{hint}"
        ) from None


def _parse(text: str, source: str) -> tuple[dict[str, Any], dict[Path_, str]]:
    places: dict[Path_, str] = {}
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} must be YAML, but cannot be read: {error}") from None
    if not isinstance(tree, dict) or not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{source} must hold `key: value` settings, but holds {type(tree).__name__} instead.")
    _locate(root, (), source, places)
    return tree, places


def _locate(node: yaml.Node, path: Path_, source: str, places: dict[Path_, str]) -> None:
    """Note where every key stands, and refuse keys given twice (YAML would take the last silently)."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        name, line = str(key.value), f"{source}:{key.start_mark.line + 1}"
        if name in seen:
            raise ConfigError(
                f"`{'.'.join(map(str, (*path, name)))}` must be given once, but is given again at {line}."
            )
        seen.add(name)
        places[(*path, name)] = line
        _locate(value, (*path, name), source, places)


def _apply(tree: dict[str, Any], places: dict[Path_, str], override: str) -> None:
    key, separator, text = override.partition("=")
    keys = key.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"An override must be `dotted.key=value`, but is {override!r} instead.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"The value of override {override!r} must be YAML, but cannot be read: {error}") from None
    node = tree
    for name in keys[:-1]:
        inner = node.get(name)
        node[name] = node = inner if isinstance(inner, dict) else {}
    node[keys[-1]] = value
    places[tuple(keys)] = f"override {override!r}"


def _merged(
    base: Mapping[str, Any], changes: Mapping[str, Any], path: Path_, places: dict[Path_, str], place: str
) -> dict[str, Any]:
    merged = dict(base) if changes.get("type", base.get("type")) == base.get("type") else {}
    for key, value in changes.items():
        here, before = (*path, key), merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = _merged(before if isinstance(before, Mapping) else {}, value, here, places, place)
        else:
            merged[key] = value
        places[here] = place
    return merged


def _explain(problem: Any, kind: type[BaseModel], places: dict[Path_, str]) -> str:
    path = tuple(p for p in problem["loc"] if not _is_variant(p))
    name = ".".join(map(str, path)) or "the whole"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(kind, problem["loc"][:-1])
        close = difflib.get_close_matches(str(path[-1]), allowed, n=1)
        message = "unknown key; " + (f"did you mean {close[0]!r}? " if close else "") + f"allowed: {', '.join(allowed)}"
    elif problem["type"] == "missing":
        message = "must be given, but is missing"
    elif not isinstance(problem["input"], dict):
        message += f" (found {problem['input']!r})"
    place = next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), "")
    return f"`{name}`: {message}" + (f"  [{place}]" if place else "")


def _is_variant(part: str | int) -> bool:
    """Parts that pydantic adds to a location for members of a union."""
    return isinstance(part, str) and (
        part in {"pd", "lcm", "dmd2", "float", "int", "function-after", "constrained-int", "constrained-float"}
        or part.startswith(("tuple[", "literal[", "constrained-", "PriorRamp", "nullable"))
    )


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the settings at a location of the tree."""
    schema = kind.model_json_schema()
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
