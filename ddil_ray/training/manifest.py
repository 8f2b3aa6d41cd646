"""What tells a whole checkpoint from any other: names, sizes and sha256 of the files that a process wrote; pure.

A manifest is written last, and holds the sha256 of itself, so that no byte of a checkpoint can change unnoticed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ddil_ray.errors import ConfigError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "BrokenCheckpointError",
    "DamagedCheckpointError",
    "FileFacts",
    "Manifest",
    "libraries",
    "manifest_of",
    "sha256",
]

FORMAT = 2
"""Of the checkpoints that are written here, and the only one that is read."""
MANIFEST = re.compile(r"manifest-\d+-of-(\d+)\.json$")
"""Matches names of manifests; the group is the number of processes."""
_LIBRARIES = ("ddil-ray", "ray", "safetensors", "torch")
_CHUNK = 2**22


class BrokenCheckpointError(Exception):
    """A checkpoint that is not whole; says what is wrong with it."""


class DamagedCheckpointError(BrokenCheckpointError):
    """One whose files have their sizes, but hold other bytes than when they were written."""


def manifest_of(rank: int, ranks: int) -> str:
    """Name of the manifest of one of `ranks` processes."""
    return f"manifest-{rank}-of-{ranks}.json"


def sha256(file: BinaryIO) -> str:
    """64 hexadecimal digits of all that is left of an open file."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def libraries() -> dict[str, str]:
    """Versions here of what writes and reads checkpoints."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return versions | {"python": platform.python_version()}


@dataclass(frozen=True)
class FileFacts:
    """What a file must be."""

    size: int
    """Bytes."""
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Of a file on disk."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, sha256(file))


@dataclass(frozen=True)
class Manifest:
    """What one process wrote."""

    step: int
    """Updates done."""
    files: Mapping[str, FileFacts]
    libraries: Mapping[str, str]
    """Versions of what wrote it."""

    @classmethod
    def of(cls, folder: Path, step: int) -> Manifest:
        """Of all files of a folder."""
        return cls(step, {path.name: FileFacts.of(path) for path in sorted(folder.iterdir())}, libraries())

    def render(self) -> bytes:
        """As the bytes of its file."""
        files = {name: vars(facts) for name, facts in self.files.items()}
        return _render({"format": FORMAT, "step": self.step, "files": files, "libraries": dict(self.libraries)})

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Manifest:
        """What `render` gave.

        Args:
            raw: bytes of the file.
            where: what messages call the checkpoint.

        Raises:
            BrokenCheckpointError: bytes that `render` never gave.
            ConfigError: whole, but of another format.
        """
        try:
            content = json.loads(raw)
        except ValueError:
            raise BrokenCheckpointError("a manifest is cut off or damaged") from None
        if _is_of_first_format(content):
            raise _of_other_format(
                where, 1, "an older ddil-ray, which this one does not read. Finish the run with that"
            )
        if not isinstance(content, dict) or _render({k: v for k, v in content.items() if k != "sha256"}) != raw:
            raise BrokenCheckpointError("a manifest is damaged")
        if content["format"] != FORMAT:
            raise _of_other_format(where, content["format"], "a newer ddil-ray. Install that")
        files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        return cls(content["step"], files, content["libraries"])


def _render(content: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def _is_of_first_format(content: Any) -> bool:
    return isinstance(content, dict) and content != {} and all(isinstance(size, int) for size in content.values())


def _of_other_format(where: str, number: int, written_by: str) -> ConfigError:
    return ConfigError(
        f"`--resume` must name a run whose checkpoints have format {FORMAT}, but {where} has format {number}: it was "
        f"written by {written_by} version, or start a run of another `name`."
    )
