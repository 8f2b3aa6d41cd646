"""The average of a network's trained weights.

Which they are is said by `ddil_ray.trained`: all of them, or the adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_ray.shards import local, part_of
from ddil_ray.trained import load_trained_state, named_trained, trained_state

__all__ = ["WeightAverage", "load_trained_state", "trained_state"]


class WeightAverage(AveragedModel):
    """The exponential moving average of what is trained of a network.

    Args:
        network: whose weights are averaged; the first update takes them as they are then.
        decay: per update.
        device: where the average is kept; with the network by default.
    """

    def __init__(self, network: nn.Module, *, decay: float, device: torch.device | str | None = None) -> None:
        super().__init__(
            _Trained((name, _without_gradient(tensor)) for name, tensor in named_trained(network)),
            device=None if device is None else torch.device(device),
            multi_avg_fn=_of_parts(get_ema_multi_avg_fn(decay)),
            use_buffers=True,
        )
        self._followed = (_Trained(named_trained(network)),)  # a tuple, so that it is no part of this module

    def update(self) -> None:
        """Move the average towards the network as it is now."""
        self.update_parameters(*self._followed)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore what `state_dict` gave, whole or in parts."""
        mine = self.state_dict()
        parts = {name: part_of(tensor, mine[name]) for name, tensor in state.items()}
        return super().load_state_dict(parts, strict, assign)

    def weights(self) -> dict[str, Tensor]:
        """The average, as `trained_state`."""
        return {name.replace(_DOT, "."): tensor for name, tensor in self.module.state_dict().items()}


def _of_parts(average: Callable[..., None]) -> Callable[..., None]:
    """`average` of what this process keeps of the tensors."""
    return lambda averaged, current, count: average([*map(local, averaged)], [*map(local, current)], count)


_DOT = "/"
"""Stands for the dots of a name: torch lets no parameter have any."""


class _Trained(nn.Module):
    """What is trained of a network, without the rest of it: the tensors that are given by name."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()
        for name, tensor in tensors:
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", _DOT), tensor)
            else:
                self.register_buffer(name.replace(".", _DOT), tensor)


def _without_gradient(tensor: Tensor) -> Tensor:
    """On the same memory; copying a parameter in parts would copy its gradient too."""
    return nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
