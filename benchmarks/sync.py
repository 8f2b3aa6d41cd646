"""Weight publication: how long from a trainer's publication until a rollout actor has the weights loaded.

Beside it the copy of the same bytes, in a process of its own and in turn: into memory that is there (`memcpy`), and
into memory that is new. A publication is counted from the call in the trainer; `stall` is how long that call takes,
which is all that training waits for. The publisher, the hub and the loading are the library's own. The object store
holds `COPIES` of the largest size in shared memory: what does not fit goes to files, which are slower.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from measuring import Goal, Outcome, Table

from ddil_ray.runtime.cluster import ray_session

SIZES_MB = (10, 100, 1000)
TENSORS = 200
WARM = 4
"""First publications of a size touch new memory of the object store, which takes seconds at a gigabyte."""
COPIES = 4
"""Publications of a size that the object store must hold: the new one, the last, and what is not yet freed."""
_STREAM = "student"


def layers(nbytes: int) -> nn.ParameterList:
    """Weights of that many bytes, as a network has them: in many tensors."""
    each = nbytes // 4 // TENSORS
    return nn.ParameterList(nn.Parameter(torch.ones(each), requires_grad=True) for _ in range(TENSORS))


class Trainer:
    """Publishes."""

    def __init__(self, hub: Any, nbytes: int, versions: int) -> None:
        from ddil_ray.runtime.admission import Stream, StreamPlan
        from ddil_ray.runtime.publisher import Publisher

        zeros = np.zeros(versions, dtype=np.int64)
        plan = StreamPlan(zeros, zeros, np.arange(versions), np.arange(versions), zeros.astype(float))
        self._network = layers(nbytes)
        self._publisher = Publisher(hub, 0, {_STREAM: Stream(plan, actors=1, ready=versions)})

    def publish(self, version: int) -> tuple[float, float]:
        """When the publication of changed weights began, and how long training waited."""
        from ddil_ray.trained import trained_state

        with torch.no_grad():
            for part in self._network.parameters():
                part.fill_(version)
        state = trained_state(self._network).values()
        started = time.monotonic()
        self._publisher.publish(0, version, state)
        stall = time.monotonic() - started
        self._publisher.settle()
        return started, stall


class Reader:
    """Has a network that follows."""

    def __init__(self, hub: Any, nbytes: int) -> None:
        self._hub, self._network = hub, layers(nbytes).requires_grad_(False)

    def load(self, version: int) -> tuple[float, float]:
        """When the network had the weights of `version`, and seconds to read them all once then."""
        import ray

        from ddil_ray.runtime.admission import Ask
        from ddil_ray.training.wire import load_weights

        grant = ray.get(self._hub.admit.remote(Ask(_STREAM, 0, version, (0, version - 1))))
        load_weights(self._network, ray.get(grant.student[0]))
        loaded = time.monotonic()
        assert all(float(part.max()) == version for part in self._network.parameters())
        return loaded, time.monotonic() - loaded


class Copier:
    """Copies the same bytes."""

    def __init__(self, nbytes: int) -> None:
        self._source, self._target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self) -> tuple[float, float]:
        """Seconds into memory that is there, and into new memory."""
        torch.set_num_threads(1)
        return measuring.timed(lambda: self._target.copy_(self._source)), measuring.timed(self._source.clone)


def publications(nbytes: int, *, repeats: int) -> Iterator[dict[str, float]]:
    """Seconds of each publication and of the copies beside it."""
    import ray

    from ddil_ray.runtime.hub import Hub

    remote = ray.remote(num_cpus=1)
    hub = Hub.remote()
    trainer = remote(Trainer).options(max_concurrency=4).remote(hub, nbytes, WARM + repeats)
    reader, copier = remote(Reader).remote(hub, nbytes), remote(Copier).remote(nbytes)
    ray.get(trainer.publish.remote(0))
    try:
        for version in range(1, WARM + repeats):
            loading = reader.load.remote(version)
            started, stall = ray.get(trainer.publish.remote(version))
            loaded, read = ray.get(loading)
            memcpy, fresh = ray.get(copier.copy.remote())
            if version >= WARM:
                found = {"publish_to_loaded": loaded - started, "stall": stall, "read": read}
                yield found | {"memcpy": memcpy, "memcpy_new_memory": fresh}
    finally:
        for actor in (trainer, reader, copier, hub):
            ray.kill(actor)


def store_bytes(sizes_mb: Sequence[int], free: int) -> int:
    """Of an object store for `COPIES` of the largest size and a tenth more, in `free` bytes of shared memory."""
    return min(max(sizes_mb) * COPIES * 11 * 10**5, free)


def sizes_that_fit(sizes_mb: Sequence[int], store: float) -> list[int]:
    """Those of which `COPIES` fit an object store of so many bytes; says which do not."""
    for size in sizes_mb:
        if size * COPIES * 10**6 > store:
            print(f"{size} MB left out: {COPIES} copies do not fit an object store of {store / 1e6:,.0f} MB.")
    return [size for size in sizes_mb if size * COPIES * 10**6 <= store]


def measure(quick: bool) -> Outcome:
    """All sizes that shared memory holds."""
    import ray

    rows, figures, ratios = [], {}, {}
    sizes = SIZES_MB[:2] if quick else SIZES_MB
    with ray_session(cpus=4, store=lambda: store_bytes(sizes, shutil.disk_usage("/dev/shm").free)):
        for size in sizes_that_fit(sizes, min(node["Resources"]["object_store_memory"] for node in ray.nodes())):
            found = list(publications(size * 10**6, repeats=3 if quick else 8))
            figures[f"{size} MB"] = found
            medians = measuring.medians({name: [f[name] for f in found] for name in found[0]})
            ratios[size] = medians["publish_to_loaded"] / medians["memcpy"]
            milliseconds = [f"{medians[name] * 1e3:.1f}" for name in ("publish_to_loaded", "stall", "read")]
            floors = [f"{medians[name] * 1e3:.1f}" for name in ("memcpy", "memcpy_new_memory")]
            new = medians["publish_to_loaded"] / medians["memcpy_new_memory"]
            rows.append([f"{size} MB", *milliseconds, *floors, f"{ratios[size]:.2f}", f"{new:.2f}"])
    largest = max(ratios)
    goals = [Goal(f"publish-to-loaded / memcpy, {largest} MB, same node", ratios[largest], 2.0)]
    heading = ["weights", "publish to loaded, ms", "trainer stalls, ms", "first read of all, ms"]
    heading += ["memcpy, ms", "memcpy, new memory, ms", "ratio", "ratio, new memory"]
    return Outcome([Table("sync", heading, rows)], goals, figures)


if __name__ == "__main__":
    measuring.main(__doc__, __file__, measure)
