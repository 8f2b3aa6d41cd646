"""Pipelines that lie elsewhere: brought to this machine once, for all its processes and later runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.places import check_url, is_below

__all__ = ["fetch_hub", "fetch_url"]


def fetch_url(url: str) -> Path:
    """A local copy of the pipeline folder at an fsspec URL, in ~/.cache/ddil-ray (or DDIL_RAY_CACHE).

    The copy is that of the folder's model_index.json as it is now: another one there is fetched anew. Delete the cache
    to have its space back.

    Raises:
        ConfigError: not readable.
    """
    check_url(url, "teacher.model")
    from filelock import FileLock

    from ddil_ray.storage import open_url

    cache = Path(os.environ.get("DDIL_RAY_CACHE", Path.home() / ".cache" / "ddil-ray"), "models")
    try:
        fs, path = open_url(url)
        path = path.rstrip("/")
        state = fs.ukey(f"{path}/model_index.json")
        local = cache / hashlib.sha256(f"{url} {state}".encode()).hexdigest()[:20]
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{local}.lock"):
            if not local.exists():
                partial = tempfile.mkdtemp(dir=cache)
                _copy(fs, path, Path(partial))
                os.replace(partial, local)
    except Exception as error:  # every filesystem has errors of its own
        raise ConfigError(
            f"`teacher.model` must be a readable folder, but {url!r} failed: {error}. Check the address and "
            "its credentials."
        ) from error
    return local


def _copy(fs: Any, folder: str, into: Path) -> None:
    """Bring all files of a folder. In a bucket names may lead out of it, which not every fsspec refuses."""
    names = {path: path.removeprefix(f"{folder}/") for path in fs.find(folder) if not path.endswith("/")}
    for name in names.values():
        if not is_below(name):
            raise ValueError(f"the file {name!r} leads out of it")
        (into / name).parent.mkdir(parents=True, exist_ok=True)
    fs.get(list(names), [str(into / name) for name in names.values()])


def fetch_hub(spec: str) -> Path:
    """The folder of the hub's own cache with the pipeline `spec`; in half precision where that is all there is.

    Raises:
        ConfigError: not fetched.
    """
    from diffusers import DiffusionPipeline

    try:
        folder = Path(DiffusionPipeline.download(spec))
        if not any(folder.glob("*/*.safetensors")) and not any(folder.glob("*/*.bin")):
            folder = Path(DiffusionPipeline.download(spec, variant="fp16"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`teacher.model` must be an existing folder, a URL, `module.path:factory`, `builtin:NAME` or a hub id, "
            f"but {spec!r} is no local path and could not be fetched as a hub id: {first_line(error)}"
        ) from error
    return folder
