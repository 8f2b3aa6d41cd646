"""Measuring on Ray: the blocks of a benchmark are made by the actors of the `evaluation` role.

Samplers and instruments cross to the actors as one object, which keeps networks that samplers share one. What comes
back of a block is rows of features and errors, and the first few images.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import Dataset
from ray.data.read_api import from_blocks
from torch import Tensor

from ddil_ray.config.groups import Evaluation
from ddil_ray.errors import RunFailedError, first_line
from ddil_ray.evaluation import Benchmark, Measurements
from ddil_ray.evaluation.maker import BlockMaker, BlockRows, Samplers
from ddil_ray.runtime.context import Columns, StageCall
from ddil_ray.runtime.stages import best_device
from ddil_ray.runtime.streams import actor_pool

__all__ = ["BlockStage", "measure_on_ray"]

_DATA, _SAMPLES = "data", "samples"


@dataclass(frozen=True)
class _Failure:
    """In place of a result: the error that an actor met."""

    error: str


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

    def __call__(self, batch: Columns) -> Columns:
        """One row for a request (part, block): the result, pickled, since its parts differ in length."""
        ((part,), (block,)) = batch["part"].tolist(), batch["block"].tolist()
        made: BlockRows | Tensor | _Failure
        try:
            made = self._data_features(block) if part == _DATA else self._maker.block(block, self._samplers)
        except Exception as error:  # told as a result: of a raised one Ray passes on its own wrapping only
            logging.getLogger(__name__).exception("Block %d of the %s cannot be made.", block, part)
            made = _Failure(repr(error))
        return {"part": batch["part"], "block": batch["block"], "made": np.array([pickle.dumps(made)], dtype=object)}

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
    work = [ray.put((benchmark.maker, samplers)), ray.put(images.numpy())]
    try:
        made = dict(_rows(_dataset(requests, work, role)))
    except ray.exceptions.RayError as error:
        raise _failed(first_line(error)) from error
    blocks: list[BlockRows] = [made[request] for request in requests if request[0] == _SAMPLES]
    features: list[Tensor] = [made[request] for request in requests if request[0] == _DATA]
    return benchmark.collect(blocks, torch.cat(features))


def _failed(error: str) -> RunFailedError:
    return RunFailedError(
        f"Measuring failed: {error}. Students are exported before they are measured: mend `evaluation`, and measure "
        "them with `ddil-ray evaluate`."
    )


def _dataset(requests: list[tuple[str, int]], work: list[Any], role: Evaluation) -> Dataset:
    dataset = from_blocks([pa.table({"part": [part], "block": [b]}) for part, b in requests]).map_batches(
        StageCall,
        fn_constructor_args=("ddil_ray.runtime.evaluation:BlockStage", work),
        batch_size=1,
        **actor_pool(role),
    )
    dataset.set_name("evaluation")
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.wait_for_min_actors_s = 300
    return dataset


def _rows(dataset: Dataset) -> Iterator[tuple[tuple[str, int], Any]]:
    """(request, what was made of it), as they come."""
    # A process of Ray's runs the stream: from this one its errors would reach the terminal that Ray recovers from.
    (stream,) = dataset.streaming_split(1)
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        for part, block, pickled in zip(batch["part"], batch["block"], batch["made"], strict=True):
            made = pickle.loads(pickled)
            if isinstance(made, _Failure):
                raise _failed(made.error)
            yield (str(part), int(block)), made
