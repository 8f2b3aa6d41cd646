"""Copies of exported pipeline folders, in the same or another precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ddil_ray.card import add_section, call_with
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.export import forget_origins
from ddil_ray.models import local_folder
from ddil_ray.models.family import absent_components
from ddil_ray.models.latents import variant_of
from ddil_ray.models.match import said_of
from ddil_ray.places import check_url

__all__ = ["DTYPES", "check_target", "copy_folder", "pipeline_folder"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pipeline_folder(spec: str, field: str = "MODEL") -> Path:
    """The pipeline folder that `spec`, given as `field`, names, or the student of the run folder that it names.

    Raises:
        ConfigError: neither.
    """
    check_url(spec, field)
    from ddil_ray.storage import open_url

    try:
        fs, root = open_url(spec)
        student = fs.exists(f"{root.rstrip('/')}/student/model_index.json")
    except Exception:  # of any filesystem; fetching explains it
        student = False
    with said_of(field):
        folder = local_folder(f"{spec.rstrip('/')}/student" if student else spec)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{field} must be a run folder with a student, or a diffusers pipeline folder, but {spec} has no "
            "model_index.json. The student of a factory is one safetensors file: copy it as it is."
        )
    return folder


def check_target(source: Path, out: Path) -> None:
    """Whether `source` can be copied to `out`.

    Raises:
        ConfigError: `out` holds something, or lies in `source`.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"`--out` must be a new or empty folder, but {out} holds files. Choose another.")
    if out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"`--out` must not lie in the folder that is exported, but {out} does. Choose another.")


def copy_folder(source: Path, out: Path, *, dtype: str | None = None, variant: bool = False) -> None:
    """Copy the pipeline in `source` to `out`.

    Args:
        source: a pipeline folder.
        out: see `check_target`.
        dtype: precision of the copy, a key of `DTYPES`; None leaves files as they are.
        variant: name the files of weights after `dtype`, as the hub does for half precisions.

    Raises:
        ConfigError: the pipeline cannot be read.
    """
    if dtype is not None:
        _save_cast(source, out, dtype, variant=variant)
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=None if dtype is None else _what_is_there(source, out))
    if dtype is not None:
        named = f', variant="{dtype}"' if variant else ""
        call_with(out, f"torch_dtype={DTYPES[dtype]}{named}")
        add_section(out, "Precision", f"The weights were cast to {dtype} from those that were trained.")


def _save_cast(source: Path, out: Path, dtype: str, *, variant: bool) -> None:
    from diffusers import DiffusionPipeline

    parts = [part for part in source.iterdir() if part.is_dir()]
    read = next((found for part in parts if (found := variant_of(part))), None)
    try:
        absent = absent_components(source)
        pipeline = DiffusionPipeline.from_pretrained(
            source, torch_dtype=DTYPES[dtype], variant=read, use_safetensors=True, **absent
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"MODEL must be a pipeline that diffusers loads, but {source} failed: {first_line(error)}"
        ) from error
    pipeline.save_pretrained(out, variant=dtype if variant else None)
    forget_origins(out)


def _what_is_there(source: Path, out: Path) -> Any:
    """For `copytree`: leaves out the components, and files, that are in `out` already."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == source and (out / name).exists()]

    return ignored
