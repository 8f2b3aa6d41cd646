"""The update of a student under any objective: loss, backward, clip, step, averages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_ray.errors import RunFailedError
from ddil_ray.models.model import DiffusionModel
from ddil_ray.objectives.objective import Objective
from ddil_ray.states.batch import Origin, StateBatch
from ddil_ray.states.source import Phase

__all__ = ["DECAYS", "PRECISIONS", "Learner", "OptimizerSettings", "round_models"]

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Autocast dtype of the networks by name; states, conversions and losses stay in float32 and float64."""

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""Learning-rate factor by progress through a phase, in [0, 1]."""


@dataclass(frozen=True)
class OptimizerSettings:
    """How a student is optimised; restarted at every phase."""

    steps: int
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    accumulate: int = 1
    precision: str = "fp32"

    def factor(self, step: int) -> float:
        """Learning-rate factor at `step` of a phase: linear warm-up times the decay."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warm * DECAYS[self.decay](min(1.0, step / self.steps))


class Learner:
    """Updates one student; knows no objective by name.

    Args:
        student: model whose network is trained, already on its device.
        objective: the method.
        settings: optimizer settings.
        parallel: wraps the network for data parallelism (Ray Train's `prepare_model`); identity by default.
    """

    def __init__(
        self,
        student: DiffusionModel,
        objective: Objective,
        settings: OptimizerSettings,
        *,
        parallel: Callable[[nn.Module], nn.Module] = lambda network: network,
    ) -> None:
        self.student, self.objective, self.settings = student, objective, settings
        self._forward_network = parallel(student.network)
        self._trainable = [p for p in student.network.parameters() if p.requires_grad]
        self.phase = objective.phases[0]
        self.rounds: dict[int, dict[str, torch.Tensor]] = {}
        self.device = self._trainable[0].device
        self._restart()

    def start(self, phase: Phase) -> None:
        """Begin `phase` from the student as it is: fresh optimizer, averages and method state."""
        self.phase = phase
        if phase.index > 0:
            # A round's result is its averaged student; it is what the next round starts from and is taught by.
            self.student.network.load_state_dict(self.ema.module.state_dict())
        self._restart()

    def finish(self) -> None:
        """Keep the averaged weights as the result of this phase, by its number of student steps."""
        weights = self.ema.module.state_dict()
        self.rounds[self.phase.student_steps] = {k: v.detach().cpu().clone() for k, v in weights.items()}

    def _restart(self) -> None:
        settings = self.settings
        self.objective.start(self.student.network, self.phase)
        self.ema = AveragedModel(
            self.student.network,
            multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay),
            use_buffers=True,
        )
        self.optimizer = torch.optim.AdamW(
            self._trainable, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.scheduler = LambdaLR(self.optimizer, settings.factor)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

    def update(self, batch: StateBatch) -> dict[str, float]:
        """One optimizer step on labelled states; returns metrics.

        Raises:
            RunFailedError: the loss is not finite.
        """
        batch = batch.to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        per_row: list[torch.Tensor] = []
        metrics: dict[str, float] = {}
        parts = torch.arange(len(batch)).chunk(self.settings.accumulate)
        for i, rows in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self._no_sync():
                output = self.objective.loss(self._denoiser(), batch[rows], self.phase)
                self.scaler.scale(output.loss * (len(rows) / len(batch))).backward()
            per_row.append(output.per_row)
            metrics = output.metrics
        losses = torch.cat(per_row)
        if not bool(losses.isfinite().all()):
            raise RunFailedError(
                f"The loss must stay finite, but {int((~losses.isfinite()).sum())} of {len(losses)} rows gave NaN or "
                "infinity. Lower `trainer.lr`, or use precision fp32; the last checkpoint is unharmed."
            )
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._trainable, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        lr = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        self.ema.update_parameters(self.student.network)
        self.objective.after_update(self.student.network)
        return {**metrics, **_losses_by_origin(losses, batch), "grad_norm": float(norm), "lr": lr}

    def _denoiser(self) -> Any:
        precision = PRECISIONS[self.settings.precision]
        return replace(self.student.denoiser(autocast=precision), network=self._forward_network)

    def _no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Leave out the gradient exchange of all but the last micro-batch, where there is one to leave out."""
        no_sync = getattr(self._forward_network, "no_sync", contextlib.nullcontext)
        context: contextlib.AbstractContextManager[None] = no_sync()
        return context

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs."""
        return {
            "phase": self.phase.index,
            "student": self.student.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "objective": self.objective.state_dict(),
            "rounds": self.rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.phase = self.objective.phases[state["phase"]]
        self.student.network.load_state_dict(state["student"])
        self._restart()
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.objective.load_state_dict(state["objective"])
        self.rounds = state["rounds"]


def round_models(student: DiffusionModel, rounds: Mapping[int, dict[str, torch.Tensor]]) -> dict[int, DiffusionModel]:
    """The frozen student of every phase by its number of steps, from `Learner.rounds` and a student of that kind."""
    models = {}
    for steps, weights in rounds.items():
        models[steps] = student.copy()
        models[steps].network.load_state_dict(weights)
        models[steps].network.eval().requires_grad_(False)
    return models


def _losses_by_origin(losses: torch.Tensor, batch: StateBatch) -> dict[str, float]:
    metrics = {"loss": float(losses.mean())}
    for origin in Origin:
        rows = batch.origin == origin
        if bool(rows.any()):
            metrics[f"loss/{origin.label}"] = float(losses[rows].mean())
            metrics[f"states/share_{origin.label}"] = float(rows.float().mean())
            for quarter, share in enumerate(torch.histc(batch.t[rows].float(), 4, 0, 1) / int(rows.sum())):
                metrics[f"states/t_{origin.label}/quarter_{quarter + 1}"] = float(share)
    return metrics
