"""Students and teachers as folders that others can load: diffusers pipelines where diffusers has one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import save_model
from torch import Tensor

from ddil_ray.diffusion.schedule import RectifiedFlow
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.models import DiffusionModel, Family
from ddil_ray.models.family import absent_components
from ddil_ray.models.flow import flow_note, flow_scheduler

__all__ = ["consistency_scheduler", "ddim_scheduler", "save_model_folder", "student_scheduler"]

_CARD = """---
library_name: {library}
tags: [diffusion, distillation, ddil]
license: other
---
# {name}

{description}

{usage}
{facts}
"""

_PIPELINE_USAGE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{absent})
images = pipeline({example}, generator=torch.manual_seed(0)).images
```
{note}
"""

_MODULE_USAGE = """The network's weights are in `model.safetensors`; load them as `teacher.weights` beside
`teacher.model` = the factory the teacher came from, or with `safetensors.torch.load_model`.
"""


def ddim_scheduler(teacher: DiffusionModel) -> DDIMScheduler:
    """DDIM on the trailing grid, whose N timesteps are the times n / N of this library; clips nothing."""
    changes = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    return DDIMScheduler.from_config({**_unclipped(teacher), **changes})


def consistency_scheduler(teacher: DiffusionModel, **grid: Any) -> LCMScheduler:
    """LCMScheduler on the `grid` (settings of it) that a renoising student was trained on."""
    return LCMScheduler.from_config({**_unclipped(teacher), **grid})


def student_scheduler(teacher: DiffusionModel, times: Tensor, lcm: Mapping[str, Any] | None) -> Any:
    """The diffusers scheduler that samples a student of `teacher`; None for models from a factory.

    Args:
        teacher: or the student itself.
        times: (N + 1,) from 1 to 0, at which it samples.
        lcm: see `Objective.lcm_scheduler`.
    """
    if not teacher.scheduler_config:
        return None
    if isinstance(teacher.schedule, RectifiedFlow):
        return flow_scheduler(teacher, times, lcm)
    return ddim_scheduler(teacher) if lcm is None else consistency_scheduler(teacher, **lcm)


def _unclipped(teacher: DiffusionModel) -> dict[str, Any]:
    """The teacher's schedule without clipping. diffusers' own `_` entries would make it ignore what is set here."""
    config = {key: value for key, value in teacher.scheduler_config.items() if not key.startswith("_")}
    return {**config, "clip_sample": False, "thresholding": False}


def save_model_folder(
    folder: Path,
    model: DiffusionModel,
    *,
    scheduler: Any = None,
    name: str,
    description: str,
    steps: int,
    times: Tensor | None = None,
    w: float = 0.0,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write `model` with a model card.

    Args:
        folder: made if it is not there.
        model: becomes a pipeline of its family; one without a family becomes safetensors.
        scheduler: of the pipeline; by default one that takes `times` without new noise.
        name, description, facts: for the card.
        steps: number of steps in the card's example.
        times: (steps + 1,) from 1 to 0, at which it samples; n / steps by default.
        w: guidance to bake in, where the network is told of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.family is not None:
        times = uniform_grid(steps) if times is None else times
        scheduler = scheduler or student_scheduler(model, times, None)
        pipeline = model.family.pipeline(model, scheduler, w=w)
        pipeline.save_pretrained(folder)
        library, usage = "diffusers", _usage(model, model.family, pipeline, folder, times, w)
    else:
        save_model(model.network, str(folder / "model.safetensors"))
        library, usage = "safetensors", _MODULE_USAGE
    table = "\n".join(f"- {key}: {value}" for key, value in (facts or {}).items())
    (folder / "README.md").write_text(
        _CARD.format(name=name, description=description, library=library, usage=usage, facts=table)
    )


def _usage(model: DiffusionModel, family: Family, pipeline: Any, folder: Path, times: Tensor, w: float) -> str:
    """How to load and call the `pipeline` in `folder`."""
    scale = family.guidance_scale(model, w)
    absent = [name for name in absent_components(folder) if name not in pipeline._optional_components]
    return _PIPELINE_USAGE.format(
        absent="".join(f", {name}=None" for name in absent),
        example=family.example(model, times=times) + ("" if scale is None else f", guidance_scale={scale:g}"),
        note=f"\n{flow_note(pipeline.scheduler, times)}\n" if isinstance(model.schedule, RectifiedFlow) else "",
    )
