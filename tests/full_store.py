"""A run on a cluster of its own whose object store, and the disk behind it, somebody fills; writes found.json."""

from __future__ import annotations

import json
import sys
import time
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
PIECE = 2**20


def main(output: str) -> None:
    """Blocks are large enough to need the store."""
    role = {"batch_size": 4096}
    config = small_run(
        output=output,
        trainer={"steps": 5000, "max_failures": 1},
        forward_states=role,
        student_rollouts=role,
        replay={"capacity": 8192},
        checkpoint={"every": 20},
    )
    journal, held = Path(output, config.name, "metrics.jsonl"), []
    found: dict[str, Any] = {}

    def fill() -> None:
        try:
            while True:
                held.append(ray.put(np.random.default_rng(len(held)).bytes(PIECE)))
        except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
            found.update(full=type(error).__name__, step=furthest(journal), at=time.monotonic())

    with connected(4, object_store_memory=STORE, object_spilling_directory=sys.argv[2]):
        when(lambda: furthest(journal) >= 40, fill)
        try:
            distill(config)
        except RunFailedError as error:
            found.update(message=str(error), ended_s=time.monotonic() - found.pop("at"))
    Path(output, "found.json").write_text(json.dumps({**found, "held": len(held) * PIECE}))


if __name__ == "__main__":
    run_alone(main)
