"""The run folder: local, or mirrored to an fsspec URL; what lies where is written in docs/run-folder.md."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Any

import fsspec
import psutil

from ddil_ray.errors import ConfigError
from ddil_ray.redact import redacted

__all__ = ["RunFolder", "environment", "write_json", "write_whole"]

_PACKAGES = ("ddil-ray", "torch", "ray", "diffusers", "mlflow", "numpy", "pyarrow")


class RunFolder:
    """`<output>/<name>/`. Files are written to `local`; `sync` copies the changed ones where the output is a URL.

    Args:
        output: folder or fsspec URL.
        name: of the run.

    Raises:
        ConfigError: the output cannot be reached or written.
    """

    def __init__(self, output: str, name: str) -> None:
        self.remote = "://" in output
        self.url = f"{output.rstrip('/')}/{name}" if self.remote else str(Path(output, name).resolve())
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
            if self.remote:
                self.local = Path(tempfile.mkdtemp(prefix="ddil-ray-")) / name
            else:
                self.local = Path(self.url)
            self.local.mkdir(parents=True, exist_ok=True)
            probe = f"{self.root}/.writable"
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"")
            self.fs.rm_file(probe)
        except Exception as error:  # every filesystem has errors of its own
            raise ConfigError(
                f"`output` must be a folder or URL that can be written, but {output!r} failed: {error}. Check the "
                "address, the disk and the credentials."
            ) from error
        self._sent: dict[str, float] = {}

    def has(self, name: str) -> bool:
        """Whether a file or folder of that name is here."""
        return bool(self.fs.exists(f"{self.root}/{name}"))

    def fetch(self, *names: str) -> None:
        """Bring files of a run that began elsewhere; those that are not there are left out."""
        for name in names:
            if self.remote and self.has(name):
                self.fs.get_file(f"{self.root}/{name}", str(self.local / name))

    def sync(self) -> None:
        """Copy what changed since the last call."""
        if not self.remote:
            return
        for path in sorted(self.local.rglob("*")):
            changed = path.stat().st_mtime
            name = path.relative_to(self.local).as_posix()
            if path.is_file() and self._sent.get(name) != changed:
                target = f"{self.root}/{name}"
                self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(path), target)
                self._sent[name] = changed


def write_json(path: Path, content: Any) -> None:
    """Write `content`, without secrets, as a readable JSON file."""
    path.write_text(json.dumps(redacted(content), indent=2) + "\n")


def write_whole(fs: Any, path: str, content: bytes) -> None:
    """Write a file of an fsspec filesystem so that whoever finds it finds all of it: under another name first."""
    folder, _, name = path.rpartition("/")
    fs.makedirs(folder, exist_ok=True)
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
