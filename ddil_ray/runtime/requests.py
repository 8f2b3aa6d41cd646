"""Requests that any process can do, in any order: done by a pool of actors, or by tasks, through Ray Data.

A request whose process dies is done again by another, a bounded number of times: it may be what processes die of.
Errors come back as results, since of a raised one Ray passes on its own wrapping only.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, WorkerCrashedError

from ddil_ray.errors import DdilError, RunFailedError, last_line
from ddil_ray.runtime.context import Columns, StageCall, stage_class
from ddil_ray.runtime.rows import row_blocks
from ddil_ray.runtime.streams import actor_pool

if TYPE_CHECKING:
    from ddil_ray.config import Role

__all__ = ["Answering", "answers"]

_ANSWERING = "ddil_ray.runtime.requests:Answering"
_MAX_DEATHS = 5
"""Of processes at one request, as `faults.max_deaths` is by default; one more ends the work. However many die at others
is lived through."""
_PATIENCE_S = 7200.0
"""Longest time without an answer, as a trainer waits for a block by default."""


class Answering:
    """Around a stage that takes a request and returns a result, both anything that can be pickled.

    The stage is built with the first request: what goes wrong in that, as models that find no memory, is bounded and
    told like all that goes wrong with a request. What it imports is imported before: that takes longer than many a
    request, which processes that die meanwhile have not begun.

    Args:
        stage: `module.path:Class`.
        arguments: for it.
    """

    def __init__(self, stage: str, *arguments: Any) -> None:
        self._class, self._arguments = stage_class(stage), arguments

    @cached_property
    def _stage(self) -> Any:
        return self._class(*self._arguments)

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
        name: the config group of this work, for messages and Ray's dashboard.
        stage: `module.path:Class`, built in each process.
        arguments: for it.
        requests: at least one.
        role: the actors, whose `num_gpus` is a number; None for tasks, which build the stage for each request.

    Raises:
        DdilError: what a request met; `RunFailedError` for errors of any other kind, a request that process after
            process dies of, and answers that stay away for too long.
    """
    dataset = _answered(row_blocks(pa.table({"request": [pickle.dumps(r) for r in requests]})), stage, arguments, role)
    dataset.set_name(name)
    dataset.context.execution_no_progress_timeout_s = _PATIENCE_S
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    dataset.context.wait_for_min_actors_s = -1  # machines may come late
    # A process of Ray's runs the stream: from this one its errors would reach the terminal that Ray recovers from.
    (stream,) = dataset.streaming_split(1)
    try:
        for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
            for request, pickled in zip(batch["request"], batch["made"], strict=True):
                made = pickle.loads(pickled)
                if isinstance(made, DdilError):
                    raise made
                yield pickle.loads(request), made
    except RayError as error:
        raise RunFailedError(_reason(error, name, role)) from error


def _answered(dataset: Dataset, stage: str, arguments: Sequence[Any], role: Role | None) -> Dataset:
    with warnings.catch_warnings():  # Ray wants its options by name, and has no name for these
        warnings.simplefilter("ignore", DeprecationWarning)
        if role is None:
            return dataset.map_batches(
                _answer, fn_args=(stage, *arguments), batch_size=1, batch_format="numpy", max_retries=_MAX_DEATHS
            )
        return dataset.map_batches(
            StageCall,
            fn_constructor_args=(_ANSWERING, stage, *arguments),
            batch_size=1,
            max_task_retries=_MAX_DEATHS,
            # Ray counts an actor's death for all requests that wait in it; they would die of another one.
            **actor_pool(role, max_tasks_in_flight_per_actor=1),
        )


def _reason(error: RayError, name: str, role: Role | None) -> str:
    """Why there are no more answers, for the inside of a message."""
    smaller = f"lower `{name}.batch_size`" if role is not None else f"look at what `{name}` names"
    if isinstance(error, ExecutionTimeoutError):
        return (
            f"Requests of `{name}` must be answered, but for {_PATIENCE_S:g} s none was. See that its processes have "
            f"room in the cluster, and in their logs that they start; where they hang or are just slow, {smaller}"
        )
    cause = getattr(error, "cause", None)
    died = isinstance(cause, (RayActorError, WorkerCrashedError, OutOfMemoryError))
    if died and not getattr(cause, "actor_init_failed", False):
        return (
            f"Processes of `{name}` must answer requests, but {_MAX_DEATHS + 1} of them died at the same one. Where "
            f"memory is what lacks, {smaller}; else look in their logs for what they died of"
        )
    return last_line(error)


def _answer(batch: Columns, stage: str, *arguments: Any) -> Columns:
    return Answering(stage, *arguments)(batch)
