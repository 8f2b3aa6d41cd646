"""The form in which weights travel: a flat buffer per dtype, several times faster to share than many arrays."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ddil_ray.trained import named_trained, trained_state

__all__ = ["WIRE_DTYPES", "FlatWeights", "Snapshot", "flatten_weights", "load_weights", "travelling_bytes"]

FlatWeights = dict[str, np.ndarray]
"""dtype name -> (n,) all trained tensors of that dtype, in state_dict order: their uint8 bytes, or int16 where float32
travels as bfloat16, whose bits those are."""

WIRE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What float32 weights travel as, by name."""


class Snapshot:
    """Tensors as they are now, copied into flat buffers where they lie; what computes on a GPU is not waited for.

    Args:
        tensors: to copy.
        float32_as: dtype that float32 travels in; others stay as they are.
        over: a snapshot of such tensors that is no longer needed, whose memory is used again: fresh memory is slower.
    """

    def __init__(
        self, tensors: Iterable[Tensor], *, float32_as: torch.dtype = torch.float32, over: Snapshot | None = None
    ) -> None:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
        self._buffers: dict[str, Tensor] = {}
        for dtype, parts in groups.items():
            size, wire = sum(len(part) for part in parts), float32_as if dtype == torch.float32 else dtype
            buffer = over._buffers[str(dtype)] if over else torch.empty(size, dtype=wire, device=parts[0].device)
            torch._foreach_copy_(list(buffer.split([len(part) for part in parts])), parts)
            self._buffers[str(dtype)] = buffer
        self._device = next(iter(self._buffers.values())).device
        self._copied = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

    @property
    def is_on_host(self) -> bool:
        """Whether the buffers lie in the CPU's memory, so that `on_host` copies nothing."""
        return self._copied is None

    def on_host(self) -> FlatWeights:
        """The buffers in the CPU's memory: views where they are there, else brought by a stream of their own.

        May be called in any thread.
        """
        host = self._buffers
        if self._copied is not None:
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(self._copied)
            with torch.cuda.stream(stream):
                host = {name: _pinned(buffer) for name, buffer in self._buffers.items()}
            stream.synchronize()
        return {name: _bits(buffer, name).numpy() for name, buffer in host.items()}


def _pinned(buffer: Tensor) -> Tensor:
    """A copy in page-locked memory, on its way."""
    return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True).copy_(buffer, non_blocking=True)


def _bits(buffer: Tensor, name: str) -> Tensor:
    halved = name == "torch.float32" and buffer.dtype == torch.bfloat16
    return buffer.view(torch.int16 if halved else torch.uint8)


def travelling_bytes(tensors: Iterable[Tensor], *, float32_as: torch.dtype = torch.float32) -> int:
    """Bytes of a snapshot of `tensors`."""
    return sum(t.numel() * (float32_as if t.dtype == torch.float32 else t.dtype).itemsize for t in tensors)


def flatten_weights(network: nn.Module, *, float32_as: torch.dtype = torch.float32) -> FlatWeights:
    """A copy of what is trained of `network`, in which float32 travels as another dtype."""
    return Snapshot(trained_state(network).values(), float32_as=float32_as).on_host()


@torch.no_grad()
def load_weights(network: nn.Module, flat: FlatWeights) -> None:
    """Give `network`, which must have the structure that `flat` was made from, these weights.

    Where that takes no conversion, nothing is copied: tensors on the CPU become views of `flat`, which Ray hands out as
    memory that all processes of a node share and none may write to. So `network` must not be trained afterwards.
    """
    offsets = dict.fromkeys(flat, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        buffers = {name: _tensor(part, name) for name, part in flat.items()}
    for _, tensor in named_trained(network):
        name, start = str(tensor.dtype), offsets[str(tensor.dtype)]
        piece = buffers[name][start : start + tensor.numel()].view(tensor.shape)
        if tensor.device.type == "cpu" and tensor.is_contiguous() and piece.dtype == tensor.dtype:
            tensor.data = piece
        else:
            tensor.copy_(piece)
        offsets[name] = start + tensor.numel()


def _tensor(part: np.ndarray, name: str) -> Tensor:
    dtype = torch.bfloat16 if part.dtype == np.int16 else getattr(torch, name.removeprefix("torch."))
    flat: Tensor = torch.from_numpy(part)
    return flat.view(dtype)
