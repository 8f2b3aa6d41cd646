"""Students and teachers as folders that others can load: diffusers pipelines where diffusers has one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import save_model
from torch import Tensor

from ddil_ray.card import PLACE, Base, write_card
from ddil_ray.diffusion.schedule import RectifiedFlow
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.models import DiffusionModel, Family
from ddil_ray.models.family import absent_components
from ddil_ray.models.flow import flow_note, flow_scheduler
from ddil_ray.models.lora import fused, save_lora

__all__ = ["consistency_scheduler", "ddim_scheduler", "forget_origins", "save_model_folder", "student_scheduler"]

_PIPELINE_USAGE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{place}"{absent})
images = pipeline({arguments}, generator=torch.manual_seed(0)).images
```

{guidance}{grid}
"""

_GRID_KNOWN = """The scheduler in this folder visits the timesteps {timesteps}
for `num_inference_steps={steps}` by itself: pass no `timesteps`, and keep the scheduler."""

_GUIDANCE_INSIDE = """**Always pass `guidance_scale=1`.** Guidance is in the weights already; told nothing, this
pipeline guides a second time.

"""

_GUIDANCE_TOLD = """**Always pass `guidance_scale`.** The network reads it: `guidance_scale` is w + 1, so that {scale:g}
is w = {w:g}.

"""

_MODULE_USAGE = """The network's weights are in `model.safetensors`; load them as `teacher.weights` beside
`teacher.model` = the factory the teacher came from, or with `safetensors.torch.load_model`.
"""

_LORA_USAGE = """
The adapters that were trained are fused into the network here, and alone in `lora/`:
`pipeline.load_lora_weights("path/to/this/folder/lora")` puts them onto the pipeline that training started from. Take
this folder's scheduler then.
"""

_FUSED_USAGE = """
The adapters that were trained are fused into the network; there is no file of them alone, since diffusers loads none
into this kind of pipeline.
"""


def ddim_scheduler(teacher: DiffusionModel) -> DDIMScheduler:
    """DDIM on the trailing grid, whose N timesteps are the times n / N of this library; clips nothing."""
    return DDIMScheduler(**{**_unclipped(teacher, DDIMScheduler), "timestep_spacing": "trailing"})


def consistency_scheduler(teacher: DiffusionModel, **grid: Any) -> LCMScheduler:
    """LCMScheduler on the `grid` (settings of it) that a renoising student was trained on."""
    return LCMScheduler(**{**_unclipped(teacher, LCMScheduler), **grid})


def _unclipped(teacher: DiffusionModel, kind: Any) -> dict[str, Any]:
    """The teacher's schedule without clipping, as far as a scheduler of class `kind` has it; with `steps_offset` 1,
    which neither grid reads, since diffusers' pipelines warn of another."""
    known = inspect.signature(kind).parameters
    config = {key: value for key, value in teacher.scheduler_config.items() if key in known}
    return {**config, "clip_sample": False, "thresholding": False, "steps_offset": 1}


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
    teacher: bool = False,
    base: Base | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write `model` with a model card.

    Args:
        folder: made if it is not there.
        model: becomes a pipeline of its family; one without a family becomes safetensors. Adapters are fused into the
            network, and written alone to `folder`/lora where diffusers can load them.
        scheduler: of the pipeline; by default one that takes `times` without new noise.
        name, description, base, facts: for the card, see `write_card`.
        steps: number of steps in the card's example.
        times: (steps + 1,) from 1 to 0, at which it samples; n / steps by default.
        w: guidance to bake in, where the network is told of it.
        teacher: whether it is one, which is guided like any pipeline, and not a student.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained, model = model, fused(model)
    library, usage, tag = "safetensors", _MODULE_USAGE, None
    if model.family is not None:
        times = uniform_grid(steps) if times is None else times
        pipeline = model.family.pipeline(model, scheduler or student_scheduler(model, times, None), w=w)
        pipeline.save_pretrained(folder)
        forget_origins(folder)
        library, usage = "diffusers", _usage(model, model.family, pipeline, folder, times, w, teacher=teacher)
        tag = "text-to-image" if model.prompted else "unconditional-image-generation"
    else:
        save_model(model.network, str(folder / "model.safetensors"))
    if trained is not model:
        usage += _LORA_USAGE if save_lora(folder, trained) else _FUSED_USAGE
    write_card(
        folder,
        title=name,
        description=description,
        usage=usage.rstrip(),
        library=library,
        pipeline_tag=tag,
        base=base,
        facts=facts,
    )


def _usage(
    model: DiffusionModel, family: Family, pipeline: Any, folder: Path, times: Tensor, w: float, *, teacher: bool
) -> str:
    """How to load and call the `pipeline` in `folder`, and what to heed."""
    scale, arguments, guidance = family.guidance_scale(model, w), family.example(model, times=times), ""
    if scale is not None and not teacher:
        arguments += f", guidance_scale={scale:g}"
        guidance = _GUIDANCE_TOLD.format(scale=scale, w=w) if model.reads_guidance else _GUIDANCE_INSIDE
    if isinstance(model.schedule, RectifiedFlow):
        grid = flow_note(pipeline.scheduler, times)
    else:
        timesteps = ", ".join(f"{t:g}" for t in model.schedule.network_time(times[:-1]).tolist())
        grid = _GRID_KNOWN.format(timesteps=timesteps, steps=len(times) - 1)
    absent = [name for name in absent_components(folder) if name not in pipeline._optional_components]
    return _PIPELINE_USAGE.format(
        place=PLACE,
        arguments=arguments,
        absent="".join(f", {name}=None" for name in absent),
        guidance=guidance,
        grid=grid,
    )


def forget_origins(folder: Path) -> None:
    """Take out of every config where on this machine diffusers read the component."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
