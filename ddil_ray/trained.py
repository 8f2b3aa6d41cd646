"""What of a network is trained, and therefore copied, averaged, published, checkpointed and exported; pure torch.

All of it, or the adapters alone where peft has put any into it. What adapters sit on is the base: frozen, and shared by
all copies of a network, so that a rollout student, a target network, a critic or an average costs adapters only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ddil_ray.shards import part_of

__all__ = [
    "copy_network",
    "is_adapted",
    "load_trained_state",
    "named_trained",
    "set_trainable",
    "share_network",
    "trained_parameters",
    "trained_state",
]

_ADAPTER = "lora_"
"""Begins the names of the submodules that peft adds to an adapted one."""


def is_adapted(network: nn.Module) -> bool:
    """Whether `network`, or a part of it, has adapters."""
    return any(True for _ in _roots(network))


def named_trained(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of what is trained, the parameters themselves and the persistent buffers, in a fixed order."""
    roots = tuple(_roots(network))
    for name, tensor in network.state_dict(keep_vars=True).items():
        if not _is_base(name, roots):
            yield name, tensor


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """What is trained, by name, sharing memory with `network`; `state_dict` where it has no adapters."""
    return {name: tensor.detach() for name, tensor in named_trained(network)}


@torch.no_grad()
def load_trained_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state`, which `trained_state` gave for such a network, into `network`, which may keep parts of it.

    Raises:
        KeyError: `state` is of another kind of network, or of other adapters.
    """
    trained = trained_state(network)
    differing = trained.keys() ^ state.keys()
    if differing:
        raise KeyError(f"The state must be of the same kind of network, but {sorted(differing)[:3]} differ.")
    for name, tensor in trained.items():
        tensor.copy_(part_of(state[name], tensor))


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The parameters among what is trained, each once."""
    roots = tuple(_roots(network))
    return [parameter for name, parameter in network.named_parameters() if not _is_base(name, roots)]


def set_trainable(network: nn.Module, trainable: bool = True) -> nn.Module:
    """Let gradients reach what is trained, or nothing; returns `network`."""
    network.requires_grad_(False)
    for parameter in trained_parameters(network):
        parameter.requires_grad_(trainable)
    return network


def copy_network(network: nn.Module) -> nn.Module:
    """A copy with trained weights of its own; the base, where there is one, is shared."""
    roots = tuple(_roots(network))
    return _copied(network, (tensor for name, tensor in _named_tensors(network) if _is_base(name, roots)))


def share_network(network: nn.Module) -> nn.Module:
    """A copy of the modules on the very same tensors."""
    return _copied(network, (tensor for _, tensor in _named_tensors(network)))


def _copied(network: nn.Module, shared: Iterator[Tensor]) -> nn.Module:
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def _named_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _roots(network: nn.Module) -> Iterator[str]:
    """Prefixes of the parts that adapters were injected into; peft leaves its config there."""
    for name, part in network.named_modules():
        if hasattr(part, "peft_config"):
            yield f"{name}." if name else ""


def _is_base(name: str, roots: tuple[str, ...]) -> bool:
    return name.startswith(roots) and not any(part.startswith(_ADAPTER) for part in name.split("."))
