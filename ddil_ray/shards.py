"""Tensors of which every process of a training group keeps a part, and how whole ones come and go; pure torch.

A part is a `DTensor`. It is told by what it has, since its module takes seconds to import, and most processes of a run
never meet one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sharded", "local", "part_of", "start_of", "whole"]


def is_sharded(tensor: Any) -> bool:
    """Whether `tensor` is a part of one that several processes keep together."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this process keeps of `tensor`, on the same memory: all of it where it is no part."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def start_of(tensor: Tensor) -> int:
    """Row of the whole that the part of this process begins with; 0 where it is no part."""
    if not is_sharded(tensor):
        return 0
    kept: Any = tensor
    rows, ranks, rank = len(tensor), int(kept.device_mesh.size()), int(kept.device_mesh.get_local_rank())
    return min(rows, -(-rows // ranks) * rank)  # as `torch.chunk` cuts


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` cut as `like` is, where it is whole and `like` is not; else itself. Nothing is exchanged."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    kept: Any = like
    device = local(like).device
    part: Tensor = distribute_tensor(tensor.to(device), kept.device_mesh, kept.placements, src_data_rank=None)
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, gathered where the group exchanges; every process of the group must call."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    kept: Any = tensor
    with torch.no_grad():
        here = DTensor.from_local(
            local(tensor).detach().to(kept.device_mesh.device_type),
            kept.device_mesh,
            kept.placements,
            shape=kept.shape,
            stride=kept.stride(),
        )
        gathered: Tensor = here.full_tensor()
    return gathered
