"""What flow-matching families share: a shift that depends on the samples' size, and the schedulers of their students.

A student is exported with the shift it was trained with as a constant, whatever size it is asked for: it knows no other
times. Beside diffusers' own settings its scheduler_config.json holds the private entry `_ddil_ray` (diffusers keeps and
ignores names that start with an underscore), from which `load_model` and `ddil-ray evaluate` know the student's times.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor, nn

from ddil_ray.diffusion.prediction import Prediction
from ddil_ray.diffusion.schedule import RectifiedFlow, schedule_from_diffusers
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.errors import ConfigError
from ddil_ray.models.family import Family, load_component, read_config
from ddil_ray.models.latents import vae_scale
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.network import FamilyNetwork
from ddil_ray.prompts import NEGATIVE

__all__ = ["FlowFamily", "denoiser_of", "flow_note", "flow_scheduler", "refused_size"]

_STUDENT = "_ddil_ray"


class FlowFamily(Family):
    """Pipelines with a flow-matching transformer over patches of latents."""

    component = "transformer"
    trailing: ClassVar[bool]
    """Whether the pipeline, called without `sigmas`, takes the times n / N before the shift."""
    kind: ClassVar[Any]
    """The transformer's diffusers class."""
    network: ClassVar[type[FamilyNetwork]]

    @abstractmethod
    def channels(self, transformer: Any) -> int:
        """Of latents.

        Raises:
            ConfigError: the transformer reads more than the latents.
        """

    @abstractmethod
    def size(self, transformer: Any, folder: Path) -> int:
        """Height and width of latents that the pipeline in `folder` makes by itself."""

    @abstractmethod
    def patch(self, transformer: Any) -> int:
        """Side of the square of latents that becomes one token."""

    def reads_guidance(self, transformer: Any) -> bool:
        """Whether `transformer` is told the guidance, and guides itself."""
        return False

    def load(self, folder: Path) -> DiffusionModel:
        """See `Family.load`."""
        transformer = load_component(self.kind, folder, self.component)
        config = read_config(folder, "scheduler")
        config |= config.get(_STUDENT, {})
        told = self.reads_guidance(transformer)
        square = self.size(transformer, folder)
        size = config.get("sample_size") or (square, square)
        model = DiffusionModel(
            network=self.network(transformer),
            prediction=Prediction.FLOW,
            schedule=RectifiedFlow(),
            sample_shape=(self.channels(transformer), square, square),
            null_cond=None if told else NEGATIVE,
            prompted=True,
            reads_guidance=told,
            bottleneck=f"denoiser.transformer_blocks.{len(transformer.transformer_blocks) // 2}.ff",
            family=self,
            folder=folder,
            scheduler_config=config,
        )
        return self.resized(model, (size[0], size[1]))

    def resized(self, model: DiffusionModel, size: tuple[int, int]) -> DiffusionModel:
        """See `Family.resized`; a dynamic shift becomes the one of this size.

        Raises:
            ConfigError: no whole number of patches, or a scheduler that is not of flow matching.
        """
        patch = self.patch(denoiser_of(model))
        if any(side % patch for side in size):
            raise refused_size(size, f"a multiple of the transformer's patches of {patch} x {patch} latents")
        tokens = size[0] // patch * (size[1] // patch)
        schedule = schedule_from_diffusers(model.scheduler_config, image_seq_len=tokens)
        if not isinstance(schedule, RectifiedFlow):
            raise ConfigError(
                f"`teacher.model` must have a scheduler of flow matching, but has "
                f"{model.scheduler_config.get('_class_name')} instead. Save the pipeline with diffusers' "
                "FlowMatchEulerDiscreteScheduler."
            )
        return replace(super().resized(model, size), schedule=schedule)

    def example(self, model: DiffusionModel, *, times: Tensor) -> str:
        """See `Family.example`; with the times where the pipeline would take others, and the size it was trained at."""
        called = super().example(model, times=times)
        if not _uniform(times):
            called = called.replace(f"num_inference_steps={len(times) - 1}", f"sigmas={_sigmas(times)}")
        assert model.folder is not None
        height, width = (side * vae_scale(model.folder) for side in model.sample_shape[1:])
        return f"{called}, height={height}, width={width}"

    def plain(self, network: nn.Module, w: float) -> nn.Module:
        """The transformer itself; its pipeline tells it w where it reads it."""
        assert isinstance(network, FamilyNetwork)
        return network.denoiser


def flow_scheduler(
    model: DiffusionModel, times: Tensor, lcm: Mapping[str, Any] | None
) -> FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler:
    """The scheduler with which a pipeline of `model`'s family samples at `times` by itself, where that can be.

    It cannot where `times` are not n / N: a call must then say `sigmas=times[:-1]`, as `FlowFamily.example` does.

    Args:
        model: a student or its teacher.
        times: (N + 1,) from 1 to 0, before the shift.
        lcm: see `Objective.lcm_scheduler`; with it every step renoises, without it is a step along the flow.
    """
    assert isinstance(model.schedule, RectifiedFlow)
    assert isinstance(model.family, FlowFamily)
    shift = model.schedule.shift
    student: dict[str, Any] = {
        "use_dynamic_shifting": False,
        "shift": shift,
        "sample_size": list(model.sample_shape[1:]),
    }
    if lcm is not None:
        student["original_inference_steps"] = lcm["original_inference_steps"]
    settings: dict[str, Any] = {"shift": shift}
    if not model.family.trailing and _uniform(times):
        settings |= _made_for(len(times) - 1, model.schedule)
    scheduler = (FlowMatchEulerDiscreteScheduler if lcm is None else FlowMatchLCMScheduler)(**settings)
    scheduler.register_to_config(**{_STUDENT: student})
    return scheduler


def _made_for(steps: int, schedule: RectifiedFlow) -> dict[str, Any]:
    """Settings with which a scheduler that is told no `sigmas` takes `steps` = N times n / N, shifted by m.

    Left alone it starts from the times 1 - x with x = .999 i / (N - 1), i = 0 .. N - 1. It can shift them by another
    m' and then stretch 1 - sigma, so that the last sigma is a given one: 1 - sigma = c x / (m' - (m' - 1) x). Wanted
    are the times 1 - i / N = 1 - k x with k = (N - 1) / (.999 N), so 1 - sigma = k x / (m - (m - 1) k x). The two are
    equal for every x where m' = m / (m - (m - 1) k) and where they are for the last.
    """
    if steps == 1:
        return {}  # the one time is 1, which nothing moves
    m, k = schedule.shift, (steps - 1) / (0.999 * steps)
    other = m / (m - (m - 1) * k)
    last = float(schedule.sigma(torch.tensor([1 / steps], dtype=torch.float64)))
    return {
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",  # by exactly what the pipeline interpolates between the next two
        "base_shift": other,
        "max_shift": other,
        "shift_terminal": last,
    }


def flow_note(scheduler: FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler, times: Tensor) -> str:
    """What to heed in a call of a pipeline with a `scheduler` of `flow_scheduler`, for the model card."""
    steps = len(times) - 1
    if not _uniform(times):
        return (
            "**Always pass `sigmas`.** They are the times that the student was trained at, before the shift of the "
            "scheduler; told `num_inference_steps` alone, this pipeline takes others."
        )
    if scheduler.config.shift_terminal is None:
        return f"`num_inference_steps={steps}` takes the times that the student was trained at by itself."
    shift = scheduler.config[_STUDENT]["shift"]
    return (
        f"The scheduler in this folder is set for `num_inference_steps={steps}` of this pipeline: pass no `sigmas`. "
        f"For other steps put `diffusers.{type(scheduler).__name__}(shift={shift:g})` in its place, and pass the times "
        "they are to take, such as `sigmas=[1.0, 0.5]`."
    )


def _sigmas(times: Tensor) -> list[float]:
    return [round(t, 6) for t in times[:-1].tolist()]


def _uniform(times: Tensor) -> bool:
    return torch.allclose(times, uniform_grid(len(times) - 1), rtol=0, atol=1e-9)


def denoiser_of(model: DiffusionModel) -> Any:
    """The diffusers network inside `model`."""
    assert isinstance(model.network, FamilyNetwork)
    return model.network.denoiser


def refused_size(size: tuple[int, int], rule: str) -> ConfigError:
    """What to raise for latents of `size` that break a `rule`."""
    return ConfigError(
        f"`teacher.sample_size` must be {rule}, but is {list(size)} instead. Choose another height and width."
    )
