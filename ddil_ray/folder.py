"""The run folder: local, or mirrored to an fsspec URL; what lies where is written in docs/run-folder.md."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from fsspec.implementations.local import LocalFileSystem

from ddil_ray.errors import ConfigError, DdilError, RunFailedError, first_line
from ddil_ray.mirror import Mirror
from ddil_ray.places import check_links
from ddil_ray.redact import redacted
from ddil_ray.storage import appears_whole, make_folder, no_room, open_url, room_at

__all__ = [
    "PART",
    "RunFolder",
    "check_writable",
    "environment",
    "holds",
    "run_url",
    "using",
    "write_json",
    "write_whole",
]

PART = ".part"
"""What names of local files end with that are being written, and are not copied."""
_PROBE_BYTES = 2**16
_PACKAGES = ("ddil-ray", "torch", "ray", "diffusers", "mlflow", "numpy", "pyarrow")


class RunFolder:
    """`<output>/<name>/`. Files are written to `local`, and copied where the output is a URL.

    Args:
        output: folder or fsspec URL.
        name: of the run.

    Raises:
        ConfigError: the output cannot be reached or written.
    """

    def __init__(self, output: str, name: str) -> None:
        self.remote = "://" in output
        self.url = run_url(output, name)
        try:
            self.fs, self.root = open_url(self.url)
            if self.remote:
                self.local = Path(tempfile.mkdtemp(prefix="ddil-ray-")) / name
            else:
                self.local = Path(self.url)
            self.local.mkdir(parents=True, exist_ok=True)
            check_writable(self.fs, self.root)
            if self.remote:
                check_writable(*open_url(str(self.local)))
        except Exception as error:  # every filesystem has errors of its own
            raise ConfigError(
                f"`output` must be a folder or URL that can be written, but {output!r} failed: {error}. Check the "
                "address, the disk and the credentials."
            ) from error
        self._sent: dict[str, tuple[int, int]] = {}
        self._mirror: Mirror | None = None
        self.others = False
        """Whether another run has it by now, over whose files nothing may be copied."""

    def check_links(self) -> None:
        """See that no link in it leads out of it: in a folder from others, what a run writes or removes would be there.

        Raises:
            DataError: one does.
        """
        if not self.remote:
            found = (f"{at}/{name}" for at, folders, files in os.walk(self.local) for name in (*folders, *files))
            then = "Give `output` a folder on that disk, or make the whole folder of the run the link."
            check_links(self.fs, str(self.local), found, field="output", then=then)

    def has(self, name: str) -> bool:
        """Whether a file or folder of that name is here.

        Raises:
            ConfigError: the output cannot be read.
        """
        return holds(self.url, name)

    def fetch(self, *names: str) -> None:
        """Bring files of a run that began elsewhere; those that are not there are left out.

        Raises:
            ConfigError: the output cannot be read.
        """
        for name in names:
            if self.remote and self.has(name):
                with reading(self.url):
                    self.fs.get_file(f"{self.root}/{name}", str(self.local / name))

    @contextmanager
    def reaching(self, then: str) -> Iterator[None]:
        """Read what was saved within this, which explains a storage that fails after the run has begun.

        Args:
            then: what the user does once it can be reached, as a sentence.

        Raises:
            RunFailedError: it fails.
        """
        try:
            yield
        except DdilError:
            raise
        except Exception as error:  # every filesystem has errors of its own
            raise RunFailedError(
                f"`output` must be reachable, but {self.url} failed: {first_line(error)}. What was saved is there. "
                f"{then}"
            ) from error

    @contextmanager
    def filling(self, then: str) -> Iterator[None]:
        """Write results within this, which explains a full disk.

        Args:
            then: what the user does once there is room.

        Raises:
            RunFailedError: no room is left.
        """
        try:
            yield
        except Exception as error:  # torch, Pillow and safetensors have words of their own
            if not no_room(error):
                raise
            raise RunFailedError(
                f"`output` must have room for the results, but {self.local} could not be written: {first_line(error)} "
                f"({room_at(self.local)}). Make room, then {then}."
            ) from error

    def sync(self) -> None:
        """Copy what changed since the last call; raises what the filesystem does, and goes on there in the next one."""
        for name, state in self._unsent().items():
            if self.others:  # since the last file
                return
            target = f"{self.root}/{name}"
            make_folder(self.fs, target.rpartition("/")[0])
            self.fs.put_file(str(self.local / name), target)
            self._sent[name] = state

    def sync_soon(self, say: Callable[[str], None]) -> None:
        """Have a thread copy what changed. A storage that fails is told once by `say`, and holds up nobody."""
        if self.remote:
            self._mirror = self._mirror or Mirror(self.sync, self.url, say)
            self._mirror.ask()

    def finish(self) -> str | None:
        """Copy what is left, for the last time; tells what is missing after that, None if nothing is.

        Files that are all where the output is are no longer `local`.
        """
        if self._mirror is not None:
            self._mirror.end()
            self._mirror = None
        try:
            self.sync()
        except Exception as error:  # every filesystem has errors of its own
            names = list(self._unsent())
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            return (
                f"{self.url} could not be written ({first_line(error)}): {len(names)} files are missing or old there "
                f"({shown}). All of them are in {self.local}. Copy them when it can be."
            )
        if self.remote and not self.others:
            shutil.rmtree(self.local.parent, ignore_errors=True)
        return None

    def _unsent(self) -> dict[str, tuple[int, int]]:
        """What changed since it was copied, with its time and size."""
        found = {}
        for path in sorted(self.local.rglob("*")) if self.remote and not self.others else ():
            if not path.is_file() or path.name.endswith(PART):
                continue
            name, facts = path.relative_to(self.local).as_posix(), path.stat()
            state = (facts.st_mtime_ns, facts.st_size)
            if self._sent.get(name) != state:
                found[name] = state
        return found


def run_url(output: str, name: str) -> str:
    """Where the folder of a run is: an absolute path, or a URL."""
    return f"{output.rstrip('/')}/{name}" if "://" in output else str(Path(output, name).resolve())


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Read in the run folder at `url` within this.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        yield
    except Exception as error:  # every filesystem has errors of its own
        raise ConfigError(
            f"`output` must be readable, but {url} failed: {first_line(error)}. Try again when it is."
        ) from error


@contextmanager
def using(url: str, then: str, kind: type[DdilError] = ConfigError) -> Iterator[None]:
    """Read and write at `url` within this.

    Args:
        url: shown to the user.
        then: what the user does about it, as a sentence.
        kind: of the error.

    Raises:
        DdilError: of that kind, where the storage fails; others pass.
    """
    try:
        yield
    except DdilError:
        raise
    except Exception as error:  # every filesystem has errors of its own
        raise kind(
            f"`output` must be a folder or URL that can be read and written, but {url} failed: {first_line(error)}. "
            f"{then}"
        ) from error


def holds(url: str, name: str) -> bool:
    """Whether the run folder at `url` has a file or folder of that name; nothing is written to find out.

    Raises:
        ConfigError: it cannot be read.
    """
    with reading(url):
        fs, root = open_url(url)
        fs.invalidate_cache()  # other processes write here
        return bool(fs.exists(f"{root}/{name}"))


def check_writable(fs: Any, folder: str) -> None:
    """Write a file as large as what every run begins with, under a name that no other process takes, and remove it."""
    probe = f"{folder}/.writable-{uuid.uuid4().hex}"
    write_whole(fs, probe, bytes(_PROBE_BYTES))
    fs.rm_file(probe)


def write_json(path: Path, content: Any) -> None:
    """Write `content`, without secrets, as a readable JSON file."""
    write_whole(LocalFileSystem(), os.path.abspath(path), (json.dumps(redacted(content), indent=2) + "\n").encode())


def write_whole(fs: Any, path: str, content: bytes) -> None:
    """Write a file of an fsspec filesystem so that whoever finds it finds all of it: under another name first, unless
    the filesystem shows no file before it is whole."""
    if appears_whole(fs):
        fs.pipe_file(path, content)
        return
    folder, _, name = path.rpartition("/")
    make_folder(fs, folder)
    part = f"{folder}/.{name}.{uuid.uuid4().hex}"
    try:
        fs.pipe_file(part, content)
        fs.mv(part, path)
    except BaseException:
        if fs.exists(part):
            fs.rm_file(part)
        raise


def environment(seed: int) -> dict[str, Any]:
    """Versions, code, seed and hardware, for `environment.json`."""
    import torch

    return {
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in _PACKAGES},
        "git_commit": _git_commit(),
        "seed": seed,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _git_commit() -> str | None:
    """Commit of the working directory, with a `+` where files differ from it."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")
