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

from ddil_ray.config.explain import explain, quoted
from ddil_ray.config.run import RunConfig
from ddil_ray.config.text import MOST_BYTES, Places, parse
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.places import check_url
from ddil_ray.redact import redact, redacted

__all__ = ["ConfigTree", "config_hash", "deciding", "flatten", "load_config", "preset_names", "to_yaml"]

M = TypeVar("M", bound=BaseModel)
_MOST_PARENTS = 32
_NOT_DECIDING = {"name", "output", "tracking", "checkpoint", "shift", "faults", "max_failures", "placement"} | {
    "num_actors", "num_cpus", "num_gpus", "accelerator_type", "resources", "label_selector"
}  # fmt: skip
"""Parts of dotted settings."""


@dataclass
class ConfigTree:
    """A config before it is validated: nested settings, and where each was given."""

    source: str
    """What messages call it."""
    settings: dict[str, Any]
    places: Places = field(default_factory=dict)

    @classmethod
    def read(cls, source: str) -> ConfigTree:
        """The settings of a YAML file or preset, over those of the configs that its key `extends` names, in order.

        Raises:
            ConfigError: unreadable, or extends itself.
        """
        return cls._extended(source, (), [])

    @classmethod
    def of(cls, settings: Mapping[str, Any], source: str) -> ConfigTree:
        """What `read` gives for a file that holds `settings`.

        Args:
            settings: nested; their key `extends` may name configs.
            source: what messages call them.

        Raises:
            ConfigError: a config that they extend is unreadable.
        """
        return cls._over_parents(dict(settings), {}, source, (), [])

    @classmethod
    def _extended(cls, source: str, children: tuple[str, ...], read: list[str]) -> ConfigTree:
        read.append(source)
        if source in children:
            raise ConfigError(f"`extends` must lead to other configs, but {quoted(source)} extends itself.")
        if len(read) > _MOST_PARENTS:
            raise ConfigError(f"`extends` must lead to at most {_MOST_PARENTS} configs in all, but leads to more.")
        shown = redact(source)
        settings, places = _settings(_read(source), shown)
        return cls._over_parents(settings, places, shown, (*children, source), read)

    @classmethod
    def _over_parents(
        cls, settings: dict[str, Any], places: Places, shown: str, children: tuple[str, ...], read: list[str]
    ) -> ConfigTree:
        extends = settings.pop("extends", [])
        parents = [extends] if isinstance(extends, str) else extends
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            raise ConfigError(
                f"`extends` must name a config or a list of them, but is {quoted(extends)} instead.  [{shown}]"
            )
        tree = cls(shown, {})
        for parent in parents:
            inherited = cls._extended(parent, children, read)
            tree = tree.merge(inherited.settings, shown)
            tree.places |= inherited.places
        tree = tree.merge(settings, shown)
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
            lines = explain(error, kind, self.settings, self.places)
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


def deciding(config: BaseModel) -> dict[str, str]:
    """`flatten` without what says how a result is called, and where and how it comes about."""
    return {key: value for key, value in flatten(config).items() if _NOT_DECIDING.isdisjoint(key.split("."))}


def config_hash(config: BaseModel) -> str:
    """Twelve hexadecimal digits that change with any setting, but not with a secret in it."""
    content = json.dumps(redacted(config.model_dump(mode="json")), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def _read(source: str) -> str:
    if source in _shipped():
        return (resources.files("ddil_ray.presets") / f"{source}.yaml").read_text()
    check_url(source, "CONFIG")
    from ddil_ray.storage import open_url

    try:
        fs, path = open_url(source)
        with fs.open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except Exception as error:  # every filesystem has errors of its own
        close = difflib.get_close_matches(source, preset_names(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"CONFIG must be a readable YAML file or one of the presets {', '.join(preset_names())}, but is "
            f"{source!r} instead ({type(error).__name__}: {first_line(error)}).{hint}"
        ) from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"CONFIG must be at most {MOST_BYTES // 1024} KiB of YAML, but {source!r} is more.")
    try:
        return str(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"CONFIG must be text in UTF-8, but {source!r} is not from byte {error.start} on. Save it as UTF-8."
        ) from None


def _settings(text: str, source: str) -> tuple[dict[str, Any], Places]:
    tree, places = parse(text, source)
    if tree is None:
        raise ConfigError(f"{source} must hold `key: value` settings, but is empty. Name a config that is not.")
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold `key: value` settings, but holds {quoted(tree)} instead.")
    return tree, places


def _apply(tree: dict[str, Any], places: Places, override: str) -> None:
    key, separator, text = override.partition("=")
    keys = key.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"An override must be `dotted.key=value`, but is {quoted(key)} instead. Write key=value.")
    place = f"override {key}"
    value, _ = parse(text, place)
    node = tree
    for name in keys[:-1]:
        inner = node.get(name)
        node[name] = node = inner if isinstance(inner, dict) else {}
    node[keys[-1]] = value
    places[tuple(keys)] = place


def _merged(
    base: Mapping[str, Any], changes: Mapping[str, Any], path: tuple[str, ...], places: Places, place: str
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
