"""Students and teachers as folders that others can load: diffusers pipelines where diffusers has one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import save_model

from ddil_ray.models import DiffusionModel
from ddil_ray.models.lora import fused, save_lora

__all__ = ["consistency_scheduler", "ddim_scheduler", "save_model_folder"]

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

pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")
images = pipeline({example}, generator=torch.manual_seed(0)).images
```
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
    changes = {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}
    return DDIMScheduler.from_config({**_unclipped(teacher), **changes})


def consistency_scheduler(teacher: DiffusionModel, **grid: Any) -> LCMScheduler:
    """LCMScheduler on the `grid` (settings of it) that a renoising student was trained on."""
    return LCMScheduler.from_config({**_unclipped(teacher), **grid})


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
    w: float = 0.0,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write `model` with a model card.

    Args:
        folder: made if it is not there.
        model: becomes a pipeline of its family; one without a family becomes safetensors. Adapters are fused into the
            network, and written alone to `folder`/lora where diffusers can load them.
        scheduler: of the pipeline; DDIM on the trailing grid by default.
        name, description, facts: for the card.
        steps: number of steps in the card's example.
        w: guidance to bake in, where the network is told of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained, model = model, fused(model)
    if model.family is not None:
        model.family.pipeline(model, scheduler or ddim_scheduler(model), w=w).save_pretrained(folder)
        example = model.family.example(model, steps=steps)
        library, usage = "diffusers", _PIPELINE_USAGE.format(example=example)
    else:
        save_model(model.network, str(folder / "model.safetensors"))
        library, usage = "safetensors", _MODULE_USAGE
    if trained is not model:
        usage += _LORA_USAGE if save_lora(folder, trained) else _FUSED_USAGE
    table = "\n".join(f"- {key}: {value}" for key, value in (facts or {}).items())
    (folder / "README.md").write_text(
        _CARD.format(name=name, description=description, library=library, usage=usage, facts=table)
    )
