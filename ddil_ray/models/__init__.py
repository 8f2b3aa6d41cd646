"""Networks of the world as `DiffusionModel`s; the only importer of diffusers besides `ddil_ray.export`.

To add a family: write a module with a loader from a pipeline folder, and a row in `PIPELINE_LOADERS` under the class
name that the family's denoiser has in model_index.json.

| family | module | reads |
| --- | --- | --- |
| unet | `unet` | pipeline folders, URLs or hub ids whose `unet` is a UNet2DModel |
| module | `module` | `module.path:factory` |
"""

from __future__ import annotations

import importlib
import json
import tempfile
from importlib import resources
from pathlib import Path

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.factory import is_factory
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.module import load_module

__all__ = ["PIPELINE_LOADERS", "DiffusionModel", "load_model", "student_of"]

PIPELINE_LOADERS: dict[str, str] = {"UNet2DModel": "ddil_ray.models.unet:load_unet"}
"""Loader of a pipeline folder, as `module:function`, by the class of its denoiser; imported when it is needed."""


def load_model(spec: str, *, weights: str | None = None) -> DiffusionModel:
    """The model that `teacher.model` names, in eval mode on the CPU.

    Args:
        spec: `builtin:NAME`, a pipeline folder, an fsspec URL of one, `module.path:factory`, or a hub id `owner/name`.
        weights: safetensors file for a factory's network.

    Raises:
        ConfigError: nothing of that name, or not a pipeline this library knows.
    """
    if spec.startswith("builtin:"):
        return _load_builtin(spec.removeprefix("builtin:"))
    if is_factory(spec):
        return load_module(spec, weights=weights)
    if "://" in spec:
        return _load_url(spec)
    if Path(spec).exists():
        return _load_folder(Path(spec))
    return _load_hub(spec)


def student_of(teacher: DiffusionModel, *, guidance_embedding: bool = False) -> DiffusionModel:
    """A trainable copy of `teacher`, optionally told the guidance it is to imitate.

    Raises:
        ConfigError: the family has no guidance embedding.
    """
    student = teacher.copy()
    student.network.train().requires_grad_(True)
    if not guidance_embedding:
        return student
    if student.family != "unet":
        raise ConfigError(
            "`objective.guidance_embedding` must be false for a teacher given as a factory: build the embedding into "
            "the factory's network, which is passed w."
        )
    from ddil_ray.models.unet import with_guidance_embedding

    return with_guidance_embedding(student)


def _load_builtin(name: str) -> DiffusionModel:
    root = resources.files("ddil_ray.presets")
    known = sorted(p.name for p in root.iterdir() if (p / "model_index.json").is_file())
    if name not in known:
        raise ConfigError(
            f"`teacher.model` must be one of {', '.join('builtin:' + k for k in known)}, but is "
            f"'builtin:{name}' instead."
        )
    with resources.as_file(root / name) as folder:
        return _load_folder(folder)


def _load_folder(folder: Path) -> DiffusionModel:
    index = folder / "model_index.json"
    try:
        components = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`teacher.model` must be a diffusers pipeline folder, but {folder} has no readable model_index.json "
            f"({error}). Point it at a folder written by `pipeline.save_pretrained`."
        ) from error
    classes = [entry[1] for entry in components.values() if isinstance(entry, list)]
    for name, loader in PIPELINE_LOADERS.items():
        if name in classes:
            module, _, function = loader.partition(":")
            model: DiffusionModel = getattr(importlib.import_module(module), function)(folder)
            return model
    raise ConfigError(
        f"`teacher.model` must hold one of {', '.join(PIPELINE_LOADERS)}, but {folder} holds "
        f"{', '.join(map(str, classes)) or 'no component'} instead."
    )


def _load_url(url: str) -> DiffusionModel:
    import fsspec

    with tempfile.TemporaryDirectory() as local:
        try:
            fs, path = fsspec.core.url_to_fs(url)
            fs.get(path.rstrip("/") + "/", local + "/", recursive=True)
        except Exception as error:  # every filesystem has errors of its own
            raise ConfigError(
                f"`teacher.model` must be a readable folder, but {url!r} failed: {error}. Check the address and "
                "its credentials."
            ) from error
        return _load_folder(Path(local))


def _load_hub(spec: str) -> DiffusionModel:
    from diffusers import DiffusionPipeline

    try:
        return _load_folder(Path(DiffusionPipeline.download(spec)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`teacher.model` must be an existing folder, a URL, `module.path:factory`, `builtin:NAME` or a hub id, "
            f"but {spec!r} is no local path and could not be fetched as a hub id: {first_line(error)}"
        ) from error
