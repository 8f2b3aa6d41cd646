"""Checkpoints of a run: where they lie, which is the newest that is whole, and which may go."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.storage import open_url
from ddil_ray.training.manifest import (
    MANIFEST,
    BrokenCheckpointError,
    DamagedCheckpointError,
    FileFacts,
    Manifest,
    libraries,
    manifest_of,
    sha256,
)

__all__ = ["CheckpointStore", "Saved", "verify"]

_ATTEMPT = re.compile(r"attempt-(\d+)$")
_CHECKPOINT = re.compile(r"checkpoint_(\d+)[^/]*$")
_DAMAGED = "damaged.txt"
"""Beside the files of a checkpoint of which one was read and found damaged; holds the reason."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole by its manifests and the sizes of its files."""

    path: str
    """Without protocol."""
    step: int
    libraries: Mapping[str, str]
    """Versions of what wrote it."""
    files: Mapping[str, FileFacts]
    """What its files must be, by name."""

    def other_versions(self) -> str:
        """What is of another version here, as "torch 2.12.0 (here 2.13.0)"; empty where nothing is."""
        here = libraries()
        changed = [name for name in sorted(here) if self.libraries.get(name) != here[name]]
        return ", ".join(f"{name} {self.libraries.get(name, 'unknown')} (here {here[name]})" for name in changed)


@dataclass(frozen=True)
class CheckpointStore:
    """`<run>/checkpoints/attempt-N/checkpoint_GROUP_STEP/`, of which names that sort later are newer.

    There is an attempt per start of the command, and in it a group per start of the processes that train together: a
    folder never holds files of two writings, and what was written after going on from an older checkpoint is newer.
    Every process puts its own files there, its manifest last. One that is found damaged is marked for all processes:
    it counts for nothing when others are removed, but is read again by who looks for the newest, as storages may err.
    """

    url: str

    def filesystem(self) -> tuple[Any, str]:
        """(pyarrow filesystem or None for local paths, path), as Ray Train takes them."""
        fs, root = open_url(self.url)
        if "://" not in self.url:
            return None, root
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), root

    def attempts(self) -> list[int]:
        """Numbers of the attempts so far."""
        fs, root = self._opened()
        return sorted(int(m[1]) for m in map(_ATTEMPT.search, _folders(fs, root)) if m)

    def new_group(self, attempt: str) -> str:
        """How names of checkpoints begin that are written from now on, by processes that begin to train together."""
        fs, root = self._opened()
        before = [int(m[1]) for m in map(_CHECKPOINT.search, _folders(fs, f"{root}/{attempt}")) if m]
        return f"{attempt}/checkpoint_{max(before, default=0) + 1:04d}-{uuid.uuid4().hex[:6]}"

    def newest(self, say: Callable[[str], object]) -> Saved | None:
        """The newest whole checkpoint of any number of workers, every byte of it read; None if there is none.

        Args:
            say: told of newer ones that are passed over, and why.

        Raises:
            ConfigError: one of another format; or none is whole and one is damaged, which may be a fault of who reads
                it: to begin anew would have it removed.
            OSError: one cannot be read; names it.
        """
        fs, _ = self._opened()
        damaged: list[str] = []
        for folder in self._checkpoints():
            found = _looked_at(fs, folder)
            if isinstance(found, Saved):
                with contextlib.suppress(Exception):  # whoever found it damaged was wrong
                    fs.rm_file(f"{folder}/{_DAMAGED}")
                return found
            say(f"The checkpoint {folder} is passed over for the one before it: {found}.")
            if isinstance(found, DamagedCheckpointError):
                damaged.append(f"{folder}: {found}")
                with contextlib.suppress(Exception):  # it is said all the same
                    fs.pipe_file(f"{folder}/{_DAMAGED}", f"{found}\n".encode())
        if damaged:
            raise ConfigError(
                f"`--resume` must find a checkpoint that is whole, but all in {self.url} are damaged or cut off, the "
                f"newest damaged one {damaged[0]}. Try again from another machine, as this one may read them wrong. To "
                "begin anew, remove that folder."
            )
        return None

    def put(self, name: str, staged: Path) -> None:
        """Copy what a process wrote to `staged` into the checkpoint `name`, its manifest last, and read it back.

        Whatever fails, what was there before stays, and what was copied goes again.

        Args:
            name: attempt-N/checkpoint_GROUP_STEP.
            staged: see `write_checkpoint`.

        Raises:
            OSError: no room, or bytes that came back others; and whatever the storage raises.
        """
        fs, root = self._opened()
        folder = f"{root}/{name}"
        files = sorted(staged.iterdir(), key=lambda file: (MANIFEST.match(file.name) is not None, file.name))
        try:
            fs.makedirs(folder, exist_ok=True)
            for file in files:
                _copy(fs, file, f"{folder}/{file.name}")
        except BaseException:
            with contextlib.suppress(Exception):
                for file in reversed(files):
                    if fs.exists(f"{folder}/{file.name}"):
                        fs.rm_file(f"{folder}/{file.name}")
                if not fs.ls(folder):
                    fs.rmdir(folder)
            raise

    def prune(self, keep: int, score: Callable[[int], float | None] = lambda step: None) -> None:
        """Remove all that is older than the newest whole checkpoint, but the `keep` newest whole ones and the best.

        What is older and not whole, or was found damaged, goes too: nobody writes it any more.

        Args:
            keep: at least 1.
            score: of the checkpoint of a step, the lower the better; None where it is not known.

        Raises:
            OSError: one could not be looked at, and stays, or not be removed.
        """
        fs, _ = self._opened()
        folders = self._checkpoints()
        found = {folder: _glanced_at(fs, folder) for folder in folders}
        whole = [saved for saved in found.values() if isinstance(saved, Saved)]
        unread = {folder: error for folder, error in found.items() if isinstance(error, OSError)}
        scored = [(value, saved.path) for saved in whole if (value := score(saved.step)) is not None]
        kept = unread.keys() | {saved.path for saved in whole[:keep]} | {path for _, path in sorted(scored)[:1]}
        for folder in folders[folders.index(whole[0].path) :] if whole else ():
            if folder not in kept:
                _remove(fs, folder)
        for error in unread.values():
            raise error

    @contextlib.contextmanager
    def fetched(self, saved: Saved, name: str) -> Iterator[Path]:
        """One file of a checkpoint, on this machine's disk while the context is entered.

        Raises:
            OSError: it changed on its way here.
        """
        fs, _ = self._opened()
        if isinstance(fs, LocalFileSystem):
            yield Path(saved.path, name)
            return
        with tempfile.TemporaryDirectory() as here:
            fs.get_file(f"{saved.path}/{name}", f"{here}/{name}")
            if FileFacts.of(Path(here, name)) != saved.files[name]:
                raise OSError(f"{saved.path}/{name} has other bytes here than there")
            yield Path(here, name)

    def _opened(self) -> tuple[Any, str]:
        fs, root = open_url(self.url)
        fs.invalidate_cache()  # other processes write here
        return fs, root

    def _checkpoints(self) -> list[str]:
        """Folders of checkpoints, whole or not, the newest first."""
        fs, root = self._opened()
        found: list[str] = []
        for attempt in reversed(self.attempts()):
            folders = [f for f in _folders(fs, f"{root}/attempt-{attempt}") if _CHECKPOINT.search(f)]
            found += sorted(folders, reverse=True)
        return found


def verify(fs: Any, folder: str, *, digests: bool = True) -> Saved:
    """The checkpoint in `folder`, which is whole.

    Args:
        fs: fsspec filesystem.
        folder: path on it.
        digests: read all files and compare what they hold; False compares their sizes alone, and takes the word of
            who read them before.

    Raises:
        BrokenCheckpointError: a manifest or a file is missing, cut off or damaged; DamagedCheckpointError where
            sizes are right and bytes are not.
        ConfigError: of another format.
    """
    sizes = {info["name"].rpartition("/")[2]: info["size"] for info in fs.ls(folder, detail=True)}
    if not digests and _DAMAGED in sizes:
        raise DamagedCheckpointError("it was found damaged before")
    manifests = _manifests(fs, folder, sizes)
    files = {name: facts for manifest in manifests for name, facts in manifest.files.items()}
    for name, facts in files.items():
        if sizes.get(name) != facts.size:
            raise BrokenCheckpointError(f"{name} must have {facts.size} bytes, but has {sizes.get(name, 'none')}")
    for name, facts in files.items() if digests else ():
        with fs.open(f"{folder}/{name}", "rb") as file:
            if sha256(file) != facts.sha256:
                raise DamagedCheckpointError(f"{name} has another sha256 than when it was written")
    return Saved(folder, manifests[0].step, manifests[0].libraries, files)


def _looked_at(fs: Any, folder: str) -> Saved | BrokenCheckpointError:
    """A checkpoint every byte of which was read, or what is wrong with it.

    Raises:
        OSError: it cannot be read; names it.
    """
    try:
        return verify(fs, folder)
    except BrokenCheckpointError as reason:
        return reason
    except OSError as error:
        raise OSError(
            f"the checkpoint {folder} cannot be read ({first_line(error)}); if that stays so, move it away to go on "
            "from the one before it"
        ) from error


def _glanced_at(fs: Any, folder: str) -> Saved | BrokenCheckpointError | OSError:
    """A checkpoint whose files have their sizes, or what is wrong with it, or why that is not known."""
    try:
        return verify(fs, folder, digests=False)
    except (BrokenCheckpointError, OSError) as error:
        return error


def _manifests(fs: Any, folder: str, names: dict[str, int]) -> list[Manifest]:
    """Those of all ranks."""
    found = next((m for m in map(MANIFEST.match, sorted(names)) if m), None)
    if found is None:
        raise BrokenCheckpointError("it has no manifest, so its writing was cut off")
    wanted = [manifest_of(rank, int(found[1])) for rank in range(int(found[1]))]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise BrokenCheckpointError(f"it has no {missing[0]}, so its writing was cut off")
    return [Manifest.parse(fs.cat_file(f"{folder}/{name}"), folder) for name in wanted]


def _folders(fs: Any, root: str) -> list[str]:
    return [name.rstrip("/") for name in fs.ls(root, detail=False)] if fs.exists(root) else []


def _copy(fs: Any, file: Path, target: str) -> None:
    """Put a file, bring it to the disk, and read it back."""
    fs.put_file(str(file), target)
    if isinstance(fs, LocalFileSystem):
        for path in (target, os.path.dirname(target)):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    with file.open("rb") as here, fs.open(target, "rb") as there:
        if sha256(here) != sha256(there):
            raise OSError(f"{target} does not read back as it was written")


def _remove(fs: Any, folder: str) -> None:
    """Remove a checkpoint, its manifests first: a rest of it is never taken for whole."""
    names = sorted((info["name"] for info in fs.ls(folder, detail=True)), key=lambda name: "/manifest-" not in name)
    for name in names:
        fs.rm_file(name)
    if fs.exists(folder):  # object stores have none without files
        fs.rm(folder, recursive=True)
