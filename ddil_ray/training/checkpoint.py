"""A checkpoint as files: what every process writes, and how any number of processes read it again; pure torch.

| file | by | holds |
| --- | --- | --- |
| learner.pt | rank 0 | step and learner; of tensors that are cut up the shape alone |
| __N_0.distcp, .metadata | every rank, rank 0 | their parts, where there are any: `torch.distributed.checkpoint` |
| rank-N.pt | every rank | generators, buffers of states |
| manifest-N-of-W.json | every rank | names and sizes of the files that rank N of W wrote |

A checkpoint is whole if all files of all manifests are there to their ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_ray.shards import is_sharded
from ddil_ray.training.parallel import Alone

__all__ = ["MANIFEST", "manifest_of", "read_checkpoint", "read_shared", "write_checkpoint"]

MANIFEST = re.compile(r"manifest-\d+-of-(\d+)\.json$")
"""Matches names of manifests; the group is the number of processes."""
_SHARED, _RANK = "learner.pt", "rank-{}.pt"


def manifest_of(rank: int, ranks: int) -> str:
    """Name of the manifest of one of `ranks` processes."""
    return f"manifest-{rank}-of-{ranks}.json"


def write_checkpoint(folder: Path, state: Mapping[str, Any], *, rank: int, ranks: int) -> None:
    """Write this process's share of `TrainingLoop.state_dict` to `folder`, which is its own; every rank must call."""
    parts: dict[str, Tensor] = {}

    def shape_of(path: str, leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        parts[path] = leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")

    shared = _mapped({name: part for name, part in state.items() if name != "rank"}, shape_of)
    torch.save(state["rank"], folder / _RANK.format(rank))
    if rank == 0:
        torch.save(shared, folder / _SHARED)
    if parts:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        save(parts, storage_writer=FileSystemWriter(folder, sync_files=False))
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / manifest_of(rank, ranks)).write_text(json.dumps(sizes))


def read_shared(folder: Path) -> dict[str, Any]:
    """What rank 0 wrote; tensors that were cut up are on the device "meta"."""
    shared: dict[str, Any] = torch.load(folder / _SHARED, weights_only=True, map_location="cpu")
    return shared


def read_checkpoint(folder: Path, parallel: Alone, *, rank: int, ranks: int) -> dict[str, Any]:
    """The state of a whole checkpoint of any number of processes; all of `parallel` must call.

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
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        together = any(is_sharded(part) for part in parts.values())
        load(parts, storage_reader=FileSystemReader(folder), no_dist=not together)
    if (folder / manifest_of(rank, ranks)).exists():
        state["rank"] = torch.load(folder / _RANK.format(rank), weights_only=False, map_location="cpu")
    return state


def _mapped(tree: Any, act: Callable[[str, Any], Any], path: str = "") -> Any:
    """`tree` of dicts and lists with every leaf replaced by what `act` gives for its path and itself."""
    if isinstance(tree, dict):
        return {name: _mapped(part, act, f"{path}/{name}") for name, part in tree.items()}
    if isinstance(tree, list):
        return [_mapped(part, act, f"{path}/{i}") for i, part in enumerate(tree)]
    return act(path, tree)
