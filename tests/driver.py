"""A run with a Ray of its own, whose process a test kills."""

from __future__ import annotations

import sys

from runs import small_run

from ddil_ray.runtime.run import distill

if __name__ == "__main__":
    model = {"model": "slow:slow_everywhere", "guidance": 1.0}
    distill(small_run(output=sys.argv[1], teacher=model, trainer={"steps": 150}, checkpoint={"every": 40}))
