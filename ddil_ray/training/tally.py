"""Counts the memory of tensors that code makes, without having it: networks and samples are fake, and only their
shapes are computed; times, conditions and other small tensors are real, so that code which branches on them runs.

What fake tensors cannot answer is assumed: conditions hold, masks choose one entry per row.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["REST", "TensorTally"]

REST = "activations"
"""The part of whatever has no other name: activations, batches and temporary tensors."""
_aten = torch.ops.aten


class TensorTally(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end; enter it around the code that is counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.now: Counter[str] = Counter()
        """Bytes by part."""
        self.peak: Counter[str] = Counter()
        """Bytes by part when the sum was largest since `restart`."""
        self._sizes: dict[int, tuple[str, int]] = {}

    @contextmanager
    def building(self) -> Iterator[None]:
        """Count what is done here, where all that is made has no memory."""
        with self.fake, _Clones(), self:
            yield

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = Counter(self.now)

    def name(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count `tensors` as `part`, where they have no name yet."""
        for tensor in tensors:
            key = self._follow(tensor)
            if key is not None and self._sizes[key][0] == REST:
                _, size = self._sizes[key]
                self._sizes[key] = part, size
                self.now.update({part: size, REST: -size})

    def name_rest(self, part: str) -> None:
        """Count as `part` all that lives and has no name."""
        self._sizes = {key: (part if name == REST else name, size) for key, (name, size) in self._sizes.items()}
        self.now[part] += self.now.pop(REST, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, on shapes alone where a tensor is fake, and follow what it gives."""
        kwargs = kwargs or {}
        fakes = any(isinstance(tensor, FakeTensor) for tensor in _tensors((args, *kwargs.values())))
        if fakes and func in _ASSUMED:
            return _ASSUMED[func](*args, **kwargs)
        if fakes and func.overloadpacket in _COMPARISONS and args[0].ndim == 1:
            return torch.ones(args[0].shape, dtype=torch.bool)
        if fakes and func is _aten.index.Tensor:
            args = args[0], [_places(index) for index in args[1]]
        if not fakes and _makes_samples(func, args):
            with self.fake:
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        # Weak references of the fake mode's own would keep the tensors of modules from being moved or cast.
        self.fake.fake_tensor_converter.tensor_memo.clear()
        for tensor in _tensors(result):
            self._follow(tensor)
        inside = _layouts(result, *args[:2]) if func is _aten.convolution.default else 0
        if sum(self.now.values()) + inside > sum(self.peak.values()):
            self.peak = self.now + Counter({REST: inside})
        return result

    def _follow(self, tensor: Tensor) -> int | None:
        """The key of the storage of `tensor`, followed from now on if it was not; None where it takes no memory."""
        if tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = REST, storage.nbytes()
            self.now[REST] += storage.nbytes()
            weakref.finalize(storage, self._freed, key).atexit = False  # at exit there is nothing to count
        return key

    def _freed(self, key: int) -> None:
        part, size = self._sizes.pop(key)
        self.now[part] -= size


class _Clones(TorchFunctionMode):
    """Deep copies of fake tensors, which torch's own way gives two storages each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """`func`, or a clone where it is a deep copy."""
        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            copied = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
        return memo[id(tensor)]


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among `values`, a tensor or nested sequences of anything."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


def _layouts(*tensors: Tensor) -> int:
    """What a convolution needs while it runs: oneDNN brings all it reads and gives into a layout of its own."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _makes_samples(func: Any, args: Any) -> bool:
    """Whether `func` makes a batch of samples or embeddings from nothing, which has three axes or more."""
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return len(shape) >= 3 and all(isinstance(axis, int) for axis in shape)


def _scalar(tensor: Tensor) -> bool | int | float:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _one_per_row(mask: Tensor) -> Tensor:
    return torch.arange(len(mask))[:, None].repeat(1, mask.ndim) % torch.tensor(mask.shape)


def _places(index: Any) -> Any:
    """A mask of rows as the numbers of the rows."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return index
    return torch.arange(len(index)) if isinstance(index, FakeTensor) else index.nonzero()[:, 0]


_ASSUMED = {_aten._local_scalar_dense.default: _scalar, _aten.nonzero.default: _one_per_row}
"""What operations give on fake tensors whose values they would need."""
_COMPARISONS = {_aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge}
"""Of one number per row they hold."""
