"""A run whose Ray writes logs as JSON, in a folder for temporary files that a test gives."""

from __future__ import annotations

import sys

import ray
from runs import small_run

from ddil_ray.runtime.run import distill

if __name__ == "__main__":
    output, temporary = sys.argv[1:]
    ray.init(
        address="local",
        num_cpus=8,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=temporary,
    )
    distill(small_run(output=output, shift={"enabled": True}))
