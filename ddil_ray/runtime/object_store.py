"""How large the object store is that a local Ray gets for a run; a cluster has its own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

__all__ = ["LEAST_STORE", "store_bytes"]

LEAST_STORE = 512 * 2**20
"""Bytes that a local Ray has whatever it is for."""
_SHARED_MEMORY = Path("/dev/shm")  # nosec B108 - its size is asked, nothing is written
_GIB = 2**30


def store_bytes(shared: Mapping[str, int], say: Callable[[str], None]) -> int:
    """Bytes for what a run shares: at least `LEAST_STORE`, at most what this machine's memory allows.

    Args:
        shared: bytes by part, see `ddil_ray.training.memory.shared_bytes`. Ray Data keeps blocks to half of a store.
        say: told where the run would have more.
    """
    needed, most = max(LEAST_STORE, sum(shared.values()), 2 * shared["blocks"]), max(LEAST_STORE, _allowed())
    if needed > most:
        parts = ", ".join(f"{name} {size / _GIB:.2g}" for name, size in shared.items())
        say(
            f"Ray's object store should have {needed / _GIB:.2g} GiB ({parts}), but 30 % of the memory and "
            f"{_SHARED_MEMORY} allow {most / _GIB:.2g}: the rest goes through the disk, which is slow. Enlarge "
            f"{_SHARED_MEMORY} (docker: --shm-size), or lower `replay.ahead` or roles' `num_actors` or `batch_size`, "
            "or set `sync.dtype=bf16`."
        )
    return min(needed, most)


def _allowed() -> int:
    """30 % of the memory, Ray's own default, within shared memory: a larger store is on the disk, or refused."""
    most = int(0.3 * psutil.virtual_memory().total)
    if _SHARED_MEMORY.is_dir():
        most = min(most, int(0.95 * shutil.disk_usage(_SHARED_MEMORY).free))
    return min(most, 2 * _GIB) if sys.platform == "darwin" else most  # Ray refuses more there
