"""Networks of the world as `DiffusionModel`s; the only importer of diffusers besides `ddil_ray.export`.

To add a family: see `family`, and a row in `FAMILIES`.

| family | module | reads pipelines (folders, URLs, hub ids) with |
| --- | --- | --- |
| unet | `unet` | UNet2DModel |
| sdxl | `sdxl` | UNet2DConditionModel with CLIPTextModelWithProjection |
| stable_diffusion | `stable_diffusion` | UNet2DConditionModel |
| dit | `dit` | DiTTransformer2DModel, or Transformer2DModel as it was called |
| sd3 | `sd3` | SD3Transformer2DModel |
| flux | `flux` | FluxTransformer2DModel |
| - | `module` | `module.path:factory` |
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ddil_ray.errors import ConfigError, DdilError
from ddil_ray.factory import is_factory
from ddil_ray.imports import import_large
from ddil_ray.models.contents import classes_in
from ddil_ray.models.family import Family, check_reads_latents, unreadable
from ddil_ray.models.fetch import fetch_hub, fetch_url
from ddil_ray.models.lora import Lora, adapted
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.module import load_module

__all__ = ["FAMILIES", "DiffusionModel", "Family", "Lora", "find_pipeline", "load_model", "local_folder", "student_of"]

FAMILIES: dict[tuple[str, ...], str] = {
    ("UNet2DModel",): "ddil_ray.models.unet",
    ("UNet2DConditionModel", "CLIPTextModelWithProjection"): "ddil_ray.models.sdxl",
    ("UNet2DConditionModel",): "ddil_ray.models.stable_diffusion",
    ("DiTTransformer2DModel",): "ddil_ray.models.dit",
    ("Transformer2DModel",): "ddil_ray.models.dit",
    ("SD3Transformer2DModel",): "ddil_ray.models.sd3",
    ("FluxTransformer2DModel",): "ddil_ray.models.flux",
}
"""Module of each family, imported when it is needed, by component classes of its pipelines. The first whose classes are
all in model_index.json is taken."""


def load_model(spec: str, *, weights: str | None = None) -> DiffusionModel:
    """The model that `teacher.model` names, in eval mode on the CPU.

    Args:
        spec: `builtin:NAME`, a pipeline folder, an fsspec URL of one, `module.path:factory`, or a hub id `owner/name`.
        weights: safetensors file for a factory's network.

    Raises:
        ConfigError: nothing of that name, or not a pipeline this library knows.
    """
    if is_factory(spec) and not spec.startswith("builtin:"):
        return load_module(spec, weights=weights)
    if weights is not None:
        raise ConfigError(
            f"`teacher.weights` must be left out for a pipeline, which has its own, but is {weights} beside "
            f"{spec!r}. It belongs to a factory (`module.path:factory`)."
        )
    family, folder = find_pipeline(spec)
    check_reads_latents(family, folder)
    try:
        return family.load(folder)
    except DdilError:
        raise
    except Exception as error:  # what diffusers meets in settings or weights that it did not write
        raise unreadable(folder, error) from error


def find_pipeline(spec: str) -> tuple[Family, Path]:
    """The family and the local folder of the pipeline that `spec` names; nothing of it is loaded.

    Raises:
        ConfigError: see `load_model`.
    """
    folder = local_folder(spec)
    return _family_of(folder), folder


def local_folder(spec: str) -> Path:
    """The folder of a pipeline that is named as in `load_model`, fetched where it is not on this machine.

    Raises:
        ConfigError: nothing of that name.
    """
    if spec.startswith("builtin:"):
        return _find_builtin(spec.removeprefix("builtin:"))
    if "://" in spec:
        return fetch_url(spec)
    try:
        here = Path(spec).exists()
    except (OSError, ValueError):  # a name that no file can have
        here = False
    return Path(spec) if here else fetch_hub(spec)


def student_of(
    teacher: DiffusionModel, *, guidance_embedding: bool = False, lora: Lora | None = None
) -> DiffusionModel:
    """A trainable copy of `teacher`, optionally told the guidance it is to imitate; with `lora`, adapters on `teacher`.

    Raises:
        ConfigError: the family has no guidance embedding, or the network does not take such adapters.
    """
    told = guidance_embedding and not teacher.reads_guidance
    if lora is not None:
        if told:
            raise ConfigError(
                "`student.lora` must be null for a student that is to be told guidance, but is set instead: there is "
                "no guidance embedding among diffusers' adapters. Train the whole network, or set "
                "`objective.guidance_embedding=false` and `teacher.guidance` to one number."
            )
        return adapted(teacher, lora)
    student = teacher.copy()
    student.network.train().requires_grad_(True)
    if not told:
        return student
    if student.family is None:
        raise ConfigError(
            "`objective.guidance_embedding` must be false for a model given as a factory: build the embedding into "
            "the factory's network, which is passed w."
        )
    return student.family.with_guidance_embedding(student)


def _find_builtin(name: str) -> Path:
    root = resources.files("ddil_ray.presets")
    known = sorted(p.name for p in root.iterdir() if (p / "model_index.json").is_file())
    if name not in known:
        raise ConfigError(
            f"`teacher.model` must be one of {', '.join('builtin:' + k for k in known)}, but is "
            f"'builtin:{name}' instead."
        )
    with resources.as_file(root / name) as folder:
        return folder


def _family_of(folder: Path) -> Family:
    classes = classes_in(folder)
    for needed, module in FAMILIES.items():
        if set(needed) <= set(classes):
            family: Family = import_large(module).FAMILY
            return family
    known = ", ".join(" with ".join(needed) for needed in FAMILIES)
    raise ConfigError(
        f"`teacher.model` must hold one of {known}, but {folder} holds "
        f"{', '.join(classes) or 'no component'} instead. Use another."
    )
