"""Waits until the Ray of RAY_ADDRESS has as many nodes as told: a run that begins earlier is refused.

    python cluster/wait_nodes.py NODES [SECONDS]

Exits with 0 once there are NODES, the head among them, or with 1 after SECONDS (900).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

__all__ = ["wait"]


def wait(nodes: int, *, seconds: float, alive: Callable[[], int], pause_s: float = 5.0) -> int:
    """Print what is missing until `alive` gives `nodes`; the exit code."""
    deadline = time.monotonic() + seconds
    while (there := alive()) < nodes:
        print(f"{there} of {nodes} nodes", file=sys.stderr)
        if time.monotonic() + pause_s > deadline:
            print(f"The cluster must have {nodes} nodes within {seconds:g} s, but has {there}.", file=sys.stderr)
            return 1
        time.sleep(pause_s)
    return 0


def main(nodes: int, seconds: float) -> int:
    """Ask the cluster."""
    import ray

    ray.init(log_to_driver=False)
    return wait(nodes, seconds=seconds, alive=lambda: sum(node["Alive"] for node in ray.nodes()))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("NODES must be given. Usage: python cluster/wait_nodes.py NODES [SECONDS]")
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 900.0))
