"""Measuring on Ray: the blocks of a benchmark are made by the actors of the `evaluation` role.

Samplers and instruments cross to the actors as one object, which keeps networks that samplers share one. What comes
back of a block is rows of features and errors, and the first few images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from ddil_ray.config.groups import Evaluation
from ddil_ray.errors import DdilError, RunFailedError, last_line
from ddil_ray.evaluation import Benchmark, Measurements
from ddil_ray.evaluation.maker import BlockMaker, BlockRows, Samplers
from ddil_ray.runtime.requests import answers
from ddil_ray.runtime.stages import best_device

__all__ = ["BlockStage", "measure_on_ray"]

_DATA, _SAMPLES = "data", "samples"


class BlockStage:
    """The actor: makes blocks of samples, and features of blocks of the data.

    Args:
        work: references to (maker, samplers) and to the (M, C, H, W) float32 data; in a list, so that Ray passes them
            on unresolved, which an actor that may be started again needs.
    """

    def __init__(self, work: list[Any]) -> None:
        torch.set_num_threads(1)
        maker: BlockMaker
        (maker, samplers), self._images = ray.get(work)
        device = best_device()
        self._maker = maker.to(device)
        self._samplers = {
            model: {n: sampler.to(device) for n, sampler in by_steps.items()} for model, by_steps in samplers.items()
        }

    def __call__(self, request: tuple[str, int]) -> BlockRows | Tensor:
        """What is made of a request (part, block)."""
        part, block = request
        return self._data_features(block) if part == _DATA else self._maker.block(block, self._samplers)

    def _data_features(self, block: int) -> Tensor:
        size = self._maker.blocks.batch_size
        images = np.array(self._images[block * size : (block + 1) * size])  # what Ray hands out is read-only
        return self._maker.of_data(torch.from_numpy(images))


def measure_on_ray(benchmark: Benchmark, samplers: Samplers, role: Evaluation) -> Measurements:
    """Measure every sampler with the actors of `role`, whose `num_gpus` is a number, on the connected Ray.

    The same figures as `benchmark.measure`, whatever the number of actors; blocks of one that dies are made again.

    Raises:
        RunFailedError: an actor failed at its work.
    """
    images, size = benchmark.data.images, benchmark.maker.blocks.batch_size
    requests = [(_SAMPLES, b) for b in range(len(benchmark.maker.blocks))]
    requests += [(_DATA, b) for b in range(-(-len(images) // size))]
    try:
        work = [ray.put((benchmark.maker, samplers)), ray.put(images.numpy())]
        made = dict(answers("evaluation", "ddil_ray.runtime.evaluation:BlockStage", [work], requests, role))
    except (DdilError, RayError) as error:
        reason = str(error) if isinstance(error, DdilError) else last_line(error)
        raise RunFailedError(
            f"Measuring failed: {reason.rstrip('.')}. Students are exported before they are measured: mend "
            "`evaluation`, and measure them with `ddil-ray evaluate`."
        ) from error
    blocks: list[BlockRows] = [made[request] for request in requests if request[0] == _SAMPLES]
    features: list[Tensor] = [made[request] for request in requests if request[0] == _DATA]
    return benchmark.collect(blocks, features)
