"""YAML as configs are written in it: of a bounded size, every key a name given once, no number that reads as another.

A file may come from anywhere, so what a few lines of YAML can grow to through aliases is bounded before it is built.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ddil_ray.errors import ConfigError

__all__ = ["MOST_BYTES", "Places", "parse"]

MOST_BYTES = 256 * 1024
"""Of a file."""
_MOST_NODES = 20_000
_DEEPEST = 32
_OCTAL = re.compile(r"[-+]?0[0-9_]+")

Places = dict[tuple[str | int, ...], str]
"""Where each setting was given, by its path."""


def parse(text: str, source: str) -> tuple[Any, Places]:
    """What `text` holds, and where each key of it stands.

    Args:
        text: one document, or none (then it holds None).
        source: what messages call it.

    Raises:
        ConfigError: no YAML, or YAML that configs are not written in. Messages quote no values, which may be secret.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        walk = _Walk(source)
        walk(node, ())
        return loader.construct_document(node), walk.places
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{source} must be YAML, but cannot be read: {error.problem or error.context}  [{source}{line}]"
        ) from None
    except yaml.YAMLError:
        raise ConfigError(
            f"{source} must be YAML, but has a character that YAML does not allow. Remove it, or write it as an escape."
        ) from None
    except RecursionError:
        raise _too_much(source, "is nested deeper") from None
    except Exception:  # whatever PyYAML meets in a value of a tag
        raise ConfigError(
            f"{source} must be YAML, but has a number, date or other tagged value that is none. Quote it to keep it "
            "text."
        ) from None


def _too_much(source: str, found: str) -> ConfigError:
    return ConfigError(
        f"{source} must hold at most {_MOST_NODES} values and be nested at most {_DEEPEST} levels deep, counting what "
        f"aliases repeat, but {found}. Write it without aliases."
    )


class _Walk:
    """Goes through a document as it is written, notes where keys stand, and refuses what would be read as another."""

    def __init__(self, source: str) -> None:
        self.places: Places = {}
        self._source, self._nodes = source, 0

    def __call__(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise _too_much(self._source, "holds more")
        if len(path) > _DEEPEST:
            raise _too_much(self._source, "is nested deeper")
        if isinstance(node, yaml.MappingNode):
            self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            for i, inner in enumerate(node.value):
                self(inner, (*path, i))
        else:
            self._number(node, path)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> None:
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                self(value, (*path, "<<"))  # a level of its own, so that one that leads to itself ends
                continue
            name = self._name(key, path)
            if name in seen:
                raise ConfigError(
                    f"`{_dotted((*path, name))}` must be given once, but is given again at {self._line(key)}."
                )
            seen.add(name)
            self.places[(*path, name)] = self._line(key)
            self(value, (*path, name))

    def _name(self, key: yaml.Node, path: tuple[str | int, ...]) -> str:
        if isinstance(key, yaml.ScalarNode) and key.tag == "tag:yaml.org,2002:str":
            return str(key.value)
        kind = key.tag.rpartition(":")[2]
        found = f"{key.value!r}, which YAML reads as {kind}" if isinstance(key, yaml.ScalarNode) else f"a {kind}"
        where = f"Keys of `{_dotted(path)}`" if path else "Keys"
        raise ConfigError(f"{where} must be names, but one is {found}. Quote it to keep it text.  [{self._line(key)}]")

    def _number(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and (":" in node.value or _OCTAL.fullmatch(node.value)):
            base = "a base-60" if ":" in node.value else "an octal"
            raise ConfigError(
                f"`{_dotted(path)}` must be a number as it reads, but is {node.value} instead, which YAML takes for "
                f"{base} one. Write it without a leading 0 or a colon, or quote it to keep it text.  "
                f"[{self._line(node)}]"
            )

    def _line(self, node: yaml.Node) -> str:
        return f"{self._source}:{node.start_mark.line + 1}"


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path)) or "value"
