"""A checkpoint as files: what every process writes, and how any number of processes read it again; pure torch.

| file | by | holds |
| --- | --- | --- |
| learner.safetensors | rank 0 | step and learner; of tensors that are cut up the shape alone |
| parts-N.safetensors | every rank | its parts of those, where there are any |
| rank-N.safetensors | every rank | generators, buffers of states |
| manifest-N-of-W.json | every rank | names, sizes and digests of the files that rank N of W wrote, see `manifest` |

Whatever is no tensor is JSON in the header of the file: nothing in a checkpoint is code, or can become any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddil_ray.shards import is_sharded, local, start_of
from ddil_ray.training.manifest import Manifest, manifest_of
from ddil_ray.training.parallel import Alone

__all__ = ["LEARNER", "read_checkpoint", "read_rounds", "read_shared", "write_checkpoint"]

LEARNER = "learner.safetensors"
_RANK, _PARTS = "rank-{}.safetensors", "parts-{}.safetensors"
_ROUNDS = "/learner/rounds/"


def write_checkpoint(folder: Path, state: Mapping[str, Any], *, rank: int, ranks: int) -> None:
    """Write this process's share of `TrainingLoop.state_dict` to `folder`, which is its own and empty."""
    parts: dict[str, Tensor] = {}

    def shape_of(path: str, leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        parts[path] = leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    shared = _mapped({name: part for name, part in state.items() if name != "rank"}, shape_of)
    _write(folder / _RANK.format(rank), state["rank"])
    if rank == 0:
        _write(folder / LEARNER, shared)
    if parts:
        rows = {path: [start_of(part), local(part).detach().contiguous()] for path, part in parts.items()}
        _write(folder / _PARTS.format(rank), rows)
    (folder / manifest_of(rank, ranks)).write_bytes(Manifest.of(folder, state["step"]).render())


def read_shared(folder: Path) -> dict[str, Any]:
    """What rank 0 wrote; tensors that were cut up are on the device "meta"."""
    shared: dict[str, Any] = _read(folder / LEARNER)
    return shared


def read_rounds(learner: Path) -> dict[int, dict[str, Tensor]]:
    """Weights of all finished phases, as `Learner.rounds`, from a file that is named `LEARNER` in its checkpoint."""
    rounds: dict[int, dict[str, Tensor]] = _read(learner, only=_ROUNDS)["learner"]["rounds"]
    return rounds


def read_checkpoint(folder: Path, parallel: Alone, *, rank: int, ranks: int) -> dict[str, Any]:
    """The state of a whole checkpoint of any number of processes, each of which reads what it needs.

    Tensors that were cut up are cut as `parallel` cuts them. What belongs to a rank is there where as many processes
    wrote it.
    """
    parts: dict[str, Tensor] = {}

    def room_for(path: str, leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_meta):
            return leaf
        parts[path] = parallel.empty(leaf)
        return parts[path]

    state: dict[str, Any] = _mapped(read_shared(folder), room_for)
    if parts:
        _fill(parts, sorted(folder.glob(_PARTS.format("*"))))
    if (folder / manifest_of(rank, ranks)).exists():
        state["rank"] = _read(folder / _RANK.format(rank))
    return state


def _fill(parts: Mapping[str, Tensor], files: list[Path]) -> None:
    """Copy the rows that this process keeps of every tensor out of the parts that lie in `files`."""
    missing = {path: len(local(part)) for path, part in parts.items()}
    for file in files:
        with safe_open(file, framework="pt") as reader:
            for path, (start, node) in json.loads(reader.metadata()["tree"])["dict"]:
                mine, here, theirs = local(parts[path]), start_of(parts[path]), reader.get_slice(node["tensor"])
                first = max(here, start)
                last = min(here + len(mine), start + theirs.get_shape()[0])
                if first < last:
                    mine[first - here : last - here] = theirs[first - start : last - start]
                    missing[path] -= last - first
    assert not any(missing.values()), "rows of tensors that were cut up are in no file"


def _mapped(tree: Any, act: Callable[[str, Any], Any], path: str = "") -> Any:
    """`tree` of dicts and lists with every leaf replaced by what `act` gives for its path and itself."""
    if isinstance(tree, dict):
        return {name: _mapped(part, act, f"{path}/{name}") for name, part in tree.items()}
    if isinstance(tree, list):
        return [_mapped(part, act, f"{path}/{i}") for i, part in enumerate(tree)]
    return act(path, tree)


def _write(path: Path, tree: Any) -> None:
    """A tree of dicts, lists, tuples, numbers, texts and tensors as one file."""
    packing = _Packing()
    text = json.dumps(packing.pack(tree, ""))
    save_file(packing.tensors, path, metadata={"tree": text})


def _read(path: Path, *, only: str = "") -> Any:
    """What `_write` wrote; of tensors those whose path begins with `only`, None in place of others."""
    with safe_open(path, framework="pt") as reader:
        return _unpack(json.loads(reader.metadata()["tree"]), reader, only, {})


class _Packing:
    """Makes JSON of a tree, and a dict of its tensors by path."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._storages: set[int] = set()

    def pack(self, tree: Any, path: str) -> Any:
        """The node that stands for `tree`."""
        if isinstance(tree, Tensor):
            return self._tensor(tree.detach(), path)
        if isinstance(tree, dict):  # whose keys may be numbers
            return {"dict": [[name, self.pack(part, f"{path}/{name}")] for name, part in tree.items()]}
        if isinstance(tree, (list, tuple)):
            parts = [self.pack(part, f"{path}/{i}") for i, part in enumerate(tree)]
            return parts if isinstance(tree, list) else {"tuple": parts}
        return tree

    def _tensor(self, tensor: Tensor, path: str) -> dict[str, Any]:
        if tensor.is_meta:
            return {"cut": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        node: dict[str, Any] = {"tensor": self._name(tensor, path)}
        if not tensor.is_contiguous():
            node["stride"] = list(tensor.stride())
        return node

    def _name(self, tensor: Tensor, path: str) -> str:
        """Under which `tensor` is written: once, if it is in several places. Files hold no memory that two share."""
        storage = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if storage and view in self._names:
            return self._names[view]
        shared = storage in self._storages
        assert path not in self.tensors
        self.tensors[path] = tensor.contiguous().clone() if shared else tensor.contiguous()
        if storage:
            self._storages.add(storage)
            self._names[view] = path
        return path


def _unpack(node: Any, reader: Any, only: str, tensors: dict[str, Tensor]) -> Any:
    """The tree that a node stands for."""
    if isinstance(node, list):
        return [_unpack(part, reader, only, tensors) for part in node]
    if not isinstance(node, dict):
        return node
    if "dict" in node:
        return {name: _unpack(part, reader, only, tensors) for name, part in node["dict"]}
    if "tuple" in node:
        return tuple(_unpack(part, reader, only, tensors) for part in node["tuple"])
    if "cut" in node:
        return torch.empty(node["cut"], dtype=getattr(torch, node["dtype"]), device="meta")
    name = node["tensor"]
    if not name.startswith(only):
        return None
    if name not in tensors:  # a copy: the file may be gone before the tensor is
        tensors[name] = _laid_out(reader.get_tensor(name).clone(), node.get("stride"))
    return tensors[name]


def _laid_out(tensor: Tensor, stride: list[int] | None) -> Tensor:
    return tensor if stride is None else torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
