"""A run on a cluster of its own whose object store, and the disk behind it, somebody fills; writes found.json."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from own_cluster import connected, furthest, run_alone
from runs import small_run, when

from ddil_ray.errors import RunFailedError
from ddil_ray.runtime.run import distill

STORE = 80 * 2**20
"""Bytes; Ray takes no less than 75 MB."""
PIECES = (2**20, 2**17)
"""Bytes of what somebody keeps there: the second as soon as there is room again. Less than that is not kept there."""


def main(output: str, *, disk: Path, steps: int, most: float) -> None:
    """Blocks are large enough to need the store; somebody else keeps `most` pieces there."""
    role = {"batch_size": 4096}
    config = small_run(
        output=output,
        trainer={"steps": steps, "max_failures": 1},
        forward_states=role,
        student_rollouts=role,
        replay={"capacity": 8192},
        checkpoint={"every": 20},
    )
    journal, held = Path(output, config.name, "metrics.jsonl"), []
    found: dict[str, Any] = {}
    ended = threading.Event()

    @contextlib.contextmanager
    def keeping_on() -> Iterator[None]:
        try:
            yield
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
            found.setdefault("full", type(error).__name__)
            found.setdefault("at", time.monotonic())

    def fill() -> None:
        while len(held) < most and not ended.wait(0.02 if "full" in found else 0):
            with keeping_on():
                held.append(ray.put(np.random.default_rng(len(held)).bytes(PIECES["full" in found])))

    with connected(4, object_store_memory=STORE, object_spilling_directory=str(disk)):
        when(lambda: furthest(journal) >= 40, fill)
        try:
            distill(config)
        except RunFailedError as error:
            found.update(message=str(error), ended_s=time.monotonic() - found.get("at", math.nan))
        ended.set()
        found["kept"] = len(held)
        with contextlib.suppress(FileNotFoundError):  # Ray removes what nobody needs any more
            found["spilled"] = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    found["last"] = furthest(journal)
    Path(output, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    how = {"fills both": (5000, math.inf), "fills the store": (300, 2 * STORE // PIECES[0])}
    given_steps, given_most = how[sys.argv[3]]
    run_alone(partial(main, disk=Path(sys.argv[2]), steps=given_steps, most=given_most))
