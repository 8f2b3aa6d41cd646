"""What a pipeline folder from others may hold: networks and settings, nothing that runs where it is loaded.

Loaders refuse most of this themselves, each since another version; here it is refused before any is asked.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.places import is_below

__all__ = ["classes_in", "network_class"]

_LIBRARIES = ("diffusers", "transformers")
"""Where the parts of a pipeline come from."""
_INDEX = re.compile(r"\.safetensors\.index\.(.+\.)?json$")
"""Matches names of indices of weights that are loaded, those of variants too."""


def classes_in(folder: Path) -> list[str]:
    """The classes of the parts of the pipeline in `folder`, whose contents have been looked through.

    Raises:
        ConfigError: it is no pipeline, or holds what would run.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`teacher.model` must be a diffusers pipeline folder, but {folder} has no readable model_index.json "
            f"({first_line(error)}). Point it at a folder written by `pipeline.save_pretrained`."
        ) from error
    parts = {name: part for name, part in index.items() if name[:1] != "_"} if isinstance(index, dict) else {}
    for problem in itertools.chain(_foreign(parts), *(_inside(folder / name) for name in parts)):
        raise ConfigError(
            f"`teacher.model` must be made of parts of {' and '.join(_LIBRARIES)}, but {folder} {problem} instead. Use "
            "another teacher, or a factory that loads it."
        )
    return [str(kind) for _, kind in _named(parts)]


def network_class(config: dict[str, Any]) -> Any:
    """The network class of diffusers that the config of a component names.

    Raises:
        ValueError: it names none.
    """
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ValueError(f"{name!r} is no network of diffusers")
    return kind


def _named(parts: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Library and class of every part."""
    return ((part[0], part[1]) for part in parts.values() if isinstance(part, list) and len(part) == 2)


def _foreign(parts: dict[str, Any]) -> Iterator[str]:
    """What model_index.json names besides networks of the libraries."""
    for name, part in parts.items():
        if not name.isidentifier():
            yield f"names a part {name!r}"
        if isinstance(part, str):
            yield f"names {part!r} as its {name}"
    for library, kind in _named(parts):
        if not isinstance(library, str):
            continue
        if library not in _LIBRARIES and not (library.isidentifier() and find_spec(f"diffusers.pipelines.{library}")):
            yield f"names code of {library!r}"
        if str(kind).endswith("Pipeline"):
            yield f"holds another pipeline, {kind}"


def _inside(part: Path) -> Iterator[str]:
    """What the folder of a part has besides weights and settings."""
    for path in sorted(part.rglob("*")) if part.is_dir() else ():
        name = f"{part.name}/{path.relative_to(part).as_posix()}"
        if path.suffix == ".py" or path.name == "model_index.json":
            yield f"holds {name}"
        if path.name.endswith("config.json") or _INDEX.search(path.name):
            yield from (f"names {problem} in {name}" for problem in _told(path))


def _told(path: Path) -> Iterator[str]:
    """What a file of settings names that would be code, or weights that are pickles or lie elsewhere."""
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        return  # whoever needs it says so
    if not isinstance(settings, dict):
        return
    if settings.get("auto_map"):
        yield "code of its own (auto_map)"
    weights = settings.get("weight_map")
    for file in sorted(set(map(str, weights.values()))) if isinstance(weights, dict) else ():
        if not (file.endswith(".safetensors") and is_below(file)):
            yield f"the weights {file}"
