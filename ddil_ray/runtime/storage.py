"""Checkpoints of a run: where Ray Train keeps them, and which is the newest that is whole."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.fs

from ddil_ray.storage import open_url
from ddil_ray.training.checkpoint import MANIFEST, manifest_of

__all__ = ["CheckpointStore"]

_ATTEMPT = re.compile(r"attempt-(\d+)$")


@dataclass(frozen=True)
class CheckpointStore:
    """`<run>/checkpoints/attempt-N/checkpoint_*/`: one Ray Train run per attempt, one folder per checkpoint."""

    url: str

    def filesystem(self) -> tuple[Any, str]:
        """(pyarrow filesystem or None for local paths, path), as Ray Train takes them."""
        fs, root = open_url(self.url)
        if "://" not in self.url:
            return None, root
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), root

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far."""
        fs, root = open_url(self.url)
        fs.invalidate_cache()  # other processes write here
        names = fs.ls(root, detail=False) if fs.exists(root) else []
        return sorted(int(m[1]) for m in map(_ATTEMPT.search, (n.rstrip("/") for n in names)) if m)

    def newest(self) -> str | None:
        """Path (without protocol) of the newest whole checkpoint of any number of workers, None if there is none."""
        fs, root = open_url(self.url)
        for attempt in reversed(self.attempts()):
            folders = fs.ls(f"{root}/attempt-{attempt}", detail=False)
            for folder in sorted((f for f in folders if "/checkpoint_" in f), reverse=True):
                if _whole(fs, folder.rstrip("/")):
                    return str(folder)
        return None


def _whole(fs: Any, folder: str) -> bool:
    """Whether every worker's manifest is there, and all files that it names, to their ends."""
    sizes = {info["name"].rpartition("/")[2]: info["size"] for info in fs.ls(folder, detail=True)}
    named = next((m for m in map(MANIFEST.match, sizes) if m), None)
    if named is None:
        return False
    for rank in range(int(named[1])):
        manifest = manifest_of(rank, int(named[1]))
        if manifest not in sizes or not _there(fs.cat_file(f"{folder}/{manifest}"), sizes):
            return False
    return True


def _there(manifest: bytes, sizes: dict[str, int]) -> bool:
    try:
        return all(sizes.get(name) == size for name, size in json.loads(manifest).items())
    except ValueError:  # itself not to its end
        return False
