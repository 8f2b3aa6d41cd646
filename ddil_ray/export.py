"""Students and teachers as folders that others can load: diffusers pipelines where diffusers has one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import save_model

from ddil_ray.card import PLACE, Base, write_card
from ddil_ray.models import DiffusionModel, Family

__all__ = ["consistency_scheduler", "ddim_scheduler", "forget_origins", "save_model_folder"]

_PIPELINE_USAGE = """```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{place}")
images = pipeline({arguments}, generator=torch.manual_seed(0)).images
```

{guidance}The scheduler in this folder visits the timesteps {timesteps}
for `num_inference_steps={steps}` by itself: pass no `timesteps`, and keep the scheduler.
"""

_GUIDANCE_INSIDE = """**Always pass `guidance_scale=1`.** Guidance is in the weights already; told nothing, this
pipeline guides a second time.

"""

_GUIDANCE_TOLD = """**Always pass `guidance_scale`.** The network reads it: `guidance_scale` is w + 1, so that {scale:g}
is w = {w:g}.

"""

_MODULE_USAGE = """The network's weights are in `model.safetensors`; load them as `teacher.weights` beside
`teacher.model` = the factory the teacher came from, or with `safetensors.torch.load_model`.
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


def save_model_folder(
    folder: Path,
    model: DiffusionModel,
    *,
    scheduler: Any = None,
    name: str,
    description: str,
    steps: int,
    w: float = 0.0,
    base: Base | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write `model` with a model card.

    Args:
        folder: made if it is not there.
        model: becomes a pipeline of its family; one without a family becomes safetensors.
        scheduler: of the pipeline; DDIM on the trailing grid by default.
        name, description, base, facts: for the card, see `write_card`.
        steps: number of steps in the card's example.
        w: guidance to bake in, where the network is told of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library, usage, tag = "safetensors", _MODULE_USAGE, None
    if model.family is not None:
        pipeline = model.family.pipeline(model, scheduler or ddim_scheduler(model), w=w)
        pipeline.save_pretrained(folder)
        forget_origins(folder)
        library, usage = "diffusers", _usage(model, model.family, pipeline.scheduler, steps=steps, w=w)
        tag = "text-to-image" if model.prompted else "unconditional-image-generation"
    else:
        save_model(model.network, str(folder / "model.safetensors"))
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


def _usage(model: DiffusionModel, family: Family, scheduler: Any, *, steps: int, w: float) -> str:
    """The exact call of the pipeline, and what to heed."""
    scale, arguments, guidance = family.guidance_scale(model, w), family.example(model, steps=steps), ""
    if scale is not None:
        arguments += f", guidance_scale={scale:g}"
        guidance = _GUIDANCE_TOLD.format(scale=scale, w=w) if model.reads_guidance else _GUIDANCE_INSIDE
    scheduler.set_timesteps(steps)
    timesteps = ", ".join(f"{t:g}" for t in scheduler.timesteps.tolist())
    return _PIPELINE_USAGE.format(place=PLACE, arguments=arguments, guidance=guidance, timesteps=timesteps, steps=steps)


def forget_origins(folder: Path) -> None:
    """Take out of every config where on this machine diffusers read the component."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
