"""Stands around a stage in its actor: whatever ends the stage reaches the user as one message, and nothing hangs.

| what happens | what is done |
| --- | --- |
| models cannot be loaded, or a block meets an error | the hub is told, and the run ends |
| the device has not enough memory | once more with its cache emptied, then as any error |
| the device fails | the process ends, Ray starts another; the hub counts deaths |
| a process takes too long | `Watchdog` ends it, the same way |
| Ray loses an object or a process | nothing: Ray, or Ray Train, starts again what is missing |
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import torch

from ddil_ray.errors import DdilError, first_line, what_was_raised
from ddil_ray.runtime.context import Columns, RunContext, build_stage
from ddil_ray.runtime.demands import pool_roles
from ddil_ray.runtime.health import Newcomer
from ddil_ray.runtime.logs import name_logs
from ddil_ray.runtime.watchdog import Watchdog

__all__ = ["Guard"]

_TOLD_S = 30.0
_OF_THE_DEVICE = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "HIP error", "NCCL")
"""What is said where a device, or this process's hold on it, is broken: nothing works in this process any more."""


class Guard:
    """The stage of one pool.

    Args:
        stage: `module.path:Class`, called with the context and `arguments`.
        pool: as in `sizing.py`.
        incarnation: of the stream.
        context: the run.
        arguments: for the stage.
    """

    def __init__(self, stage: str, pool: str, incarnation: int, context: RunContext, *arguments: Any) -> None:
        me = ray.get_runtime_context()
        self._hub, self._pool, self._actor = context.hub, pool, me.get_actor_id()
        self._role = pool_roles(context.recipe.config)[pool]
        name_logs(context.recipe.config.name, self._role)
        newcomer = Newcomer(self._actor, me.get_worker_id(), pool, self._role, incarnation)
        ray.get(self._hub.joined.remote(newcomer))
        self._watchdog = Watchdog(self._hangs, timeout_s=context.recipe.config.faults.timeout_s)
        with self._told("loading its models"):
            self._watchdog.begin("loading models")
            self._stage = build_stage(stage, context, *arguments)
            self._watchdog.stop()
        self._stage.watchdog = self._watchdog
        logging.getLogger(__name__).info("Models are loaded: makes %s states.", pool)

    def __call__(self, batch: Columns) -> Columns:
        """One batch through the stage."""
        with self._told(f"making {self._pool} states"):
            columns: Columns | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                columns = self._stage(batch)
            if (
                columns is None
            ):  # no sooner: while the error is handled, it holds all that the failed pass had in memory
                self._watchdog.stop()
                gc.collect()
                torch.cuda.empty_cache()
                columns = self._stage(batch)
        return columns

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Tell the hub of an error in here that is not Ray's."""
        try:
            yield
        except ray.exceptions.RayError:
            self._watchdog.stop()
            raise
        except Exception as error:
            self._watchdog.stop()
            if any(sign in str(error) for sign in _OF_THE_DEVICE):
                self._last_words(f"{type(error).__name__} while {what}: {first_line(error)}", hung=False)
                os._exit(1)
            self._tell(self._hub.fail.remote(self._message(error, what)))
            raise

    def _message(self, error: Exception, what: str) -> str:
        if isinstance(error, DdilError):
            return str(error)
        lacks_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        advice = f" Lower `{self._role}.batch_size`." if lacks_memory else ""
        return (
            f"An actor of `{self._role}` failed {what}: {what_was_raised(error)}.{advice} What was saved is there: "
            "`--resume` goes on from it."
        )

    def _hangs(self, words: str) -> None:
        self._last_words(words, hung=True)

    def _last_words(self, words: str, *, hung: bool) -> None:
        self._tell(self._hub.last_words.remote(self._actor, words, hung))

    @staticmethod
    def _tell(call: Any) -> None:
        """Wait until the hub knows, unless there is none."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(call, timeout=_TOLD_S)
