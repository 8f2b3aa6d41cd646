"""How the trainer's networks are spread over its processes: on one, copied to all (DDP), or cut up (FSDP2).

Pure torch: the process group is whoever's that started the processes, Ray Train's in a run. To add a way: a class here,
a row in `STRATEGIES`, and its name in `trainer.parallel`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddil_ray.shards import is_sharded, whole
from ddil_ray.trained import copy_network, named_trained
from ddil_ray.training.optimizer import PRECISIONS

__all__ = ["STRATEGIES", "Alone", "FullyShard", "Replicate", "strategy"]


class Alone:
    """One process: networks stay as they are. What the others share."""

    ends_early = True
    dtype: torch.dtype | None = None

    def ready_on(self, device: torch.device | str) -> torch.device | str:
        """Where a network that is to be on `device` is made ready before it is wrapped."""
        return device

    def wrap(self, network: nn.Module) -> nn.Module:
        """See `Parallel`."""
        return network

    def freeze(self, network: nn.Module) -> nn.Module:
        """`network`, which is only asked, kept as this strategy keeps networks; to be called in its place."""
        return network

    def twin(self, network: nn.Module) -> nn.Module:
        """See `Parallel`."""
        return copy_network(network)

    def empty(self, like: Tensor) -> Tensor:
        """A tensor of that shape and dtype, kept as those of wrapped networks are, on the CPU where it is whole."""
        return torch.zeros(like.shape, dtype=like.dtype)

    @contextlib.contextmanager
    def without_exchange(self, *networks: nn.Module | None) -> Iterator[None]:
        """Let gradients of wrapped `networks` add up here, to be exchanged with those of a later backward pass."""
        yield

    def gather(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors on rank 0, None elsewhere; every rank must call.

        Those that are whole here share their memory with `state`; those that are not come to the CPU one at a time, so
        that a device never holds more than one of them beside its parts.
        """
        return dict(state) if _rank() == 0 else None

    def agreed(self, holds: Tensor) -> Tensor:
        """Whether () bool what holds here holds in every process; every process must call. Nothing is waited for."""
        return holds


class Together(Alone):
    """Several processes, whichever way networks are spread over them."""

    def agreed(self, holds: Tensor) -> Tensor:
        """See `Alone`."""
        counted = holds.int()
        dist.all_reduce(counted, dist.ReduceOp.MIN)
        return counted.bool()


class Replicate(Together):
    """`DistributedDataParallel`: every process has whole networks, and gradients are averaged over all of them."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """See `Parallel`. Buffers are the same everywhere: nothing that is trained here changes them."""
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    @contextlib.contextmanager
    def without_exchange(self, *networks: nn.Module | None) -> Iterator[None]:
        """See `Alone`."""
        with contextlib.ExitStack() as stack:
            for network in networks:
                if isinstance(network, nn.parallel.DistributedDataParallel):
                    stack.enter_context(network.no_sync())
            yield


class FullyShard(Together):
    """`fully_shard` (FSDP2): every process keeps a part of each weight, gradient, moment and average.

    The weights of a block are gathered when it is called, and let go behind it. They travel, and are computed with, in
    the precision that networks run in; the parts stay float32, and gradients are summed in it.

    Args:
        precision: a key of `PRECISIONS`.
        device: where all networks are.
    """

    ends_early = False  # the exception would leave blocks gathered

    def __init__(self, precision: str = "fp32", device: str = "cpu") -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.dtype = PRECISIONS[precision]
        # Inputs stay as they are: times are no halves, and autocast brings the rest to where it is needed.
        self._policy = MixedPrecisionPolicy(self.dtype, self.dtype and torch.float32, cast_forward_inputs=False)
        self._mesh = init_device_mesh(device, (dist.get_world_size(),))
        self._blank: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def ready_on(self, device: torch.device | str) -> torch.device | str:
        """See `Alone`. The parts alone ever come to the device, block by block."""
        return "cpu"

    def wrap(self, network: nn.Module) -> nn.Module:
        """See `Parallel`; in place. What is inside and cut up already stays so, and the rest is cut beside it."""
        from torch.distributed.fsdp import FSDPModule

        if isinstance(network, FSDPModule):
            return network
        if any(isinstance(part, FSDPModule) for part in network.modules()):
            for part in network.children():
                self.wrap(part)
            return network
        self._blank[network] = _without_memory(network)
        return self._shard(network)

    def freeze(self, network: nn.Module) -> nn.Module:
        """See `Alone`."""
        return self.wrap(network)

    def twin(self, network: nn.Module) -> nn.Module:
        """See `Parallel`. What is cut up cannot be copied: a copy of what it was before, on no memory, is cut alike."""
        twin = self._shard(copy.deepcopy(self._blank[network]))
        trained = dict(named_trained(network))
        tensors = {n: t.detach().clone() if n in trained else t for n, t in network.state_dict(keep_vars=True).items()}
        twin.load_state_dict(tensors, assign=True)
        self._blank[twin] = self._blank[network]
        return _with_buffers_of(network, twin)

    def empty(self, like: Tensor) -> Tensor:
        """See `Alone`."""
        from torch.distributed.tensor import Shard, zeros

        return zeros(like.shape, dtype=like.dtype, device_mesh=self._mesh, placements=[Shard(0)])

    @contextlib.contextmanager
    def without_exchange(self, *networks: nn.Module | None) -> Iterator[None]:
        """See `Alone`; until then a process holds whole gradients."""
        from torch.distributed.fsdp import FSDPModule

        parts = [part for n in networks if n is not None for part in n.modules() if isinstance(part, FSDPModule)]
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def gather(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """See `Alone`."""
        gathered, first = {}, _rank() == 0
        for name, tensor in state.items():
            full = whole(tensor)
            if first:
                gathered[name] = full.cpu() if is_sharded(tensor) else full
        return gathered if first else None

    def _shard(self, network: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        for part in (*_blocks(network), network):
            # The last one too: a network that is only asked would keep whole weights, which nothing updates.
            fully_shard(part, mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=True)
        return network


STRATEGIES: dict[str, Callable[[str, str], Alone]] = {
    "ddp": lambda precision, device: Replicate(),
    "fsdp": FullyShard,
}
"""Builders by name, called with a key of `PRECISIONS` and the type of the networks' device; for several processes."""


def strategy(name: str, *, precision: str, device: torch.device | str) -> Alone:
    """The strategy of that name over the processes of torch's default group; `Alone` where there is one process.

    Args:
        name: a key of `STRATEGIES`.
        precision: a key of `PRECISIONS`.
        device: of the networks.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    return Alone() if alone else STRATEGIES[name](precision, torch.device(device).type)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The parts that are gathered one at a time, inner ones first.

    Those that a network of diffusers or transformers names as not to be split; in others the outermost members of lists
    of modules. Where there are none, the network is gathered at once.
    """
    names = {name for part in network.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    if names:
        blocks = [part for part in network.modules() if type(part).__name__ in names and part is not network]
    else:
        blocks = list(_members(network))
    return [block for block in reversed(blocks) if any(True for _ in block.parameters())]


def _members(network: nn.Module) -> Iterator[nn.Module]:
    for part in network.children():
        if isinstance(part, nn.ModuleList):
            yield from part
        else:
            yield from _members(part)


def _without_memory(network: nn.Module) -> nn.Module:
    """A copy of the modules of `network` on tensors that are shapes alone."""
    tensors: dict[int, Any] = {id(b): b.to("meta") for b in network.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, tensors)


def _with_buffers_of(network: nn.Module, twin: nn.Module) -> nn.Module:
    """`twin` with copies of the buffers that no state names."""
    for part, other in zip(network.modules(), twin.modules(), strict=True):
        for name, buffer in part.named_buffers(recurse=False):
            setattr(other, name, buffer.clone())
    return twin
