"""Checkpoints of a run: where Ray Train keeps them, and which is the newest that is whole."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow.fs

__all__ = ["RANK_FILE", "SHARED_FILE", "CheckpointStore"]

SHARED_FILE, RANK_FILE = "learner.pt", "rank-{rank}.pt"
_ATTEMPT = re.compile(r"attempt-(\d+)$")


@dataclass(frozen=True)
class CheckpointStore:
    """`<run>/checkpoints/attempt-N/checkpoint_*/`: one Ray Train run per attempt, one folder per checkpoint."""

    url: str

    def filesystem(self) -> tuple[Any, str]:
        """(pyarrow filesystem or None for local paths, path), as Ray Train takes them."""
        fs, root = fsspec.core.url_to_fs(self.url)
        if "://" not in self.url:
            return None, root
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), root

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far."""
        fs, root = fsspec.core.url_to_fs(self.url)
        fs.invalidate_cache()  # other processes write here
        names = fs.ls(root, detail=False) if fs.exists(root) else []
        return sorted(int(m[1]) for m in map(_ATTEMPT.search, (n.rstrip("/") for n in names)) if m)

    def newest(self, *, ranks: int) -> str | None:
        """Path (without protocol) of the newest whole checkpoint of `ranks` workers, None if there is none."""
        fs, root = fsspec.core.url_to_fs(self.url)
        for attempt in reversed(self.attempts()):
            folders = fs.ls(f"{root}/attempt-{attempt}", detail=False)
            for folder in sorted((f for f in folders if "/checkpoint_" in f), reverse=True):
                if _whole(fs, folder.rstrip("/"), ranks):
                    return str(folder)
        return None


def _whole(fs: Any, folder: str, ranks: int) -> bool:
    """Whether the shared and every rank's file is there to its end; a torch file is a zip archive."""
    for name in (SHARED_FILE, *(RANK_FILE.format(rank=rank) for rank in range(ranks))):
        if not fs.exists(f"{folder}/{name}"):
            return False
        with fs.open(f"{folder}/{name}", "rb") as file:
            if not zipfile.is_zipfile(file):
                return False
    return True
