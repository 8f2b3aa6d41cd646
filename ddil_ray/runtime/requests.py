"""Requests that any process can do, in any order: done by a pool of actors, or by tasks, through Ray Data.

A request that its process dies of is done again by another. Errors come back as results, since of a raised one Ray
passes on its own wrapping only.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ddil_ray.errors import DdilError, RunFailedError, first_line
from ddil_ray.runtime.context import Columns, StageCall, build_stage
from ddil_ray.runtime.rows import row_blocks
from ddil_ray.runtime.streams import actor_pool

if TYPE_CHECKING:
    from ddil_ray.config import Role

__all__ = ["Answering", "answers"]

_ANSWERING = "ddil_ray.runtime.requests:Answering"


class Answering:
    """Around a stage that takes a request and returns a result, both anything that can be pickled.

    Args:
        stage: `module.path:Class`.
        arguments: for it.
    """

    def __init__(self, stage: str, *arguments: Any) -> None:
        self._stage = build_stage(stage, *arguments)

    def __call__(self, batch: Columns) -> Columns:
        """The result of one request, or the error that was met."""
        (request,) = batch["request"]
        made: Any
        try:
            made = self._stage(pickle.loads(request))
        except DdilError as error:
            made = error
        except Exception as error:
            logging.getLogger(__name__).exception("A request failed.")
            made = RunFailedError(repr(error))
        return {"request": batch["request"], "made": np.array([pickle.dumps(made)], dtype=object)}


def answers(
    name: str, stage: str, arguments: Sequence[Any], requests: Sequence[Any], role: Role | None
) -> Iterator[tuple[Any, Any]]:
    """Requests with their results, as they are done on the connected Ray.

    Args:
        name: of this work, for Ray's dashboard.
        stage: `module.path:Class`, built in each process.
        arguments: for it.
        requests: at least one.
        role: the actors, whose `num_gpus` is a number; None for tasks, which build the stage for each request.

    Raises:
        DdilError: what a request met; `RunFailedError` for errors of any other kind.
    """
    dataset = row_blocks(pa.table({"request": [pickle.dumps(request) for request in requests]}))
    if role is None:
        dataset = dataset.map_batches(_answer, fn_args=(stage, *arguments), batch_size=1, batch_format="numpy")
    else:
        dataset = dataset.map_batches(
            StageCall, fn_constructor_args=(_ANSWERING, stage, *arguments), batch_size=1, **actor_pool(role)
        )
    dataset.set_name(name)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.wait_for_min_actors_s = -1  # models may be large, and their storage slow
    # A process of Ray's runs the stream: from this one its errors would reach the terminal that Ray recovers from.
    (stream,) = dataset.streaming_split(1)
    try:
        for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
            for request, pickled in zip(batch["request"], batch["made"], strict=True):
                made = pickle.loads(pickled)
                if isinstance(made, DdilError):
                    raise made
                yield pickle.loads(request), made
    except ray.exceptions.RayError as error:
        raise RunFailedError(first_line(error)) from error


def _answer(batch: Columns, stage: str, *arguments: Any) -> Columns:
    return Answering(stage, *arguments)(batch)
