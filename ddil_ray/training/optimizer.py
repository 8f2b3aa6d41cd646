"""How the parameters of one network are moved: AdamW with warm-up, decay, gradient clipping and loss scaling.

To add an optimizer: a function in `OPTIMIZERS`, and its name in `trainer.optimizer`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ddil_ray.errors import ConfigError
from ddil_ray.shards import part_of, whole

__all__ = [
    "DECAYS",
    "OPTIMIZERS",
    "PRECISIONS",
    "NetworkOptimizer",
    "OptimizerSettings",
    "check_optimizer",
    "reserve_moments",
]

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


def _adamw_8bit(parameters: list[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Moments in 8 bits by blocks of 256, float32 where a parameter has fewer than 4096 entries.

    Source: Dettmers et al. 2022, arXiv:2110.02861.
    """
    check_optimizer("adamw_8bit")
    from bitsandbytes.optim import AdamW8bit

    adam: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return adam


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw_8bit": _adamw_8bit,
}
"""Builders by name, called with parameters, lr, betas and weight_decay."""


def check_optimizer(name: str) -> None:
    """Check that what an optimizer needs is installed.

    Raises:
        ConfigError: it is not.
    """
    if name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "`trainer.optimizer` must be adamw where bitsandbytes is not installed, but is 'adamw_8bit' instead. "
            "Install it with `pip install 'ddil-ray[bitsandbytes]'` on every node that trains."
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """How a network is optimised; restarted at every phase."""

    steps: int
    name: str = "adamw"
    """A key of `OPTIMIZERS`."""
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: str = "constant"
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    ema_offload: bool = False
    """Keep the averaged weights in the CPU's memory."""
    accumulate: int = 1
    precision: str = "fp32"
    max_skipped: int = 0
    """Steps in a row that may be left out because something is not finite."""

    def factor(self, step: int) -> float:
        """Learning-rate factor at `step` of a phase: linear warm-up times the decay."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warm * DECAYS[self.decay](min(1.0, step / self.steps))


class NetworkOptimizer:
    """Optimizer of one network for one phase. Its schedule runs with the trainer's steps, also where it rests."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], settings: OptimizerSettings) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.clip_norm = settings.clip_norm
        self.adam = OPTIMIZERS[settings.name](
            self.parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        self.schedule = LambdaLR(self.adam, settings.factor)
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=settings.precision == "fp16")

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        return float(self.schedule.get_last_lr()[0])

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.adam.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        self.scaler.scale(loss).backward()

    def norm(self) -> Tensor:
        """Norm () of the gradients, which are made ready to move along; to be called once before `step`."""
        self.scaler.unscale_(self.adam)
        return whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def step(self, norm: Tensor) -> float:
        """Move along the gradients of that norm, clipped; returns the norm before clipping."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self.scaler.step(self.adam)
        self.scaler.update()
        return float(norm)

    def leave_out(self, *, lower: bool = False) -> bool:
        """Do not move along the gradients whose norm was asked for; whether the scale of losses was lowered for it.

        Args:
            lower: halve that scale, down to 1: the gradients are beyond what fp16 holds.
        """
        scale = self.scaler.get_scale()  # 1 where there is none
        lowered = lower and scale > 1
        self.scaler.update(scale)
        if lowered:  # alike in all processes; its own rule looks at the gradients of one
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale / 2, "_growth_tracker": 0})
        return lowered

    def advance(self) -> None:
        """One step of the trainer is done."""
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs."""
        return {name: getattr(self, name).state_dict() for name in ("adam", "schedule", "scaler")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, whole or in parts; learning rate, betas and weight decay stay this one's."""
        schedule, epoch = self.schedule, state["schedule"]["last_epoch"]
        rates = [base * factor(epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict({**state["schedule"], "base_lrs": schedule.base_lrs, "_last_lr": rates})
        moments = {i: self._like_parameter(i, kept) for i, kept in state["adam"]["state"].items()}
        groups = [
            {**kept, **{name: mine[name] for name in ("initial_lr", "betas", "weight_decay")}, "lr": rate}
            for kept, mine, rate in zip(state["adam"]["param_groups"], self.adam.param_groups, rates, strict=True)
        ]
        self.adam.load_state_dict({**state["adam"], "state": moments, "param_groups": groups})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _like_parameter(self, index: int, kept: dict[str, Any]) -> dict[str, Any]:
        """What is as large as a parameter, cut as it is."""
        parameter = self.parameters[index]
        return {
            name: part_of(value, parameter) if getattr(value, "shape", None) == parameter.shape else value
            for name, value in kept.items()
        }


def reserve_moments(optimizer: NetworkOptimizer) -> None:
    """Make the state that `optimizer` has after its first step; for estimates of memory, on tensors without any.

    What computes in 8 bits takes no such tensors: a stand-in moves parameters in place, beside moments of that size.
    """
    if isinstance(optimizer.adam, torch.optim.AdamW):
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.adam.step()
        optimizer.zero_grad()
        return
    optimizer.adam = torch.optim.SGD(optimizer.parameters, lr=0.0)
    optimizer.schedule = LambdaLR(optimizer.adam, optimizer.schedule.lr_lambdas)
    for parameter in optimizer.parameters:
        optimizer.adam.state[parameter] = _moments_in_8_bits(parameter)


def _moments_in_8_bits(parameter: Tensor) -> dict[str, Tensor]:
    """As bitsandbytes keeps them: one byte per entry and a float32 maximum per block, float32 where there are few."""
    if parameter.numel() < 4096:
        return {f"state{i}": torch.zeros_like(parameter, dtype=torch.float32) for i in (1, 2)}
    blocks = -(-parameter.numel() // 256)
    moments = {f"state{i}": torch.zeros_like(parameter, dtype=torch.uint8) for i in (1, 2)}
    return moments | {f"absmax{i}": torch.zeros(blocks) for i in (1, 2)}
