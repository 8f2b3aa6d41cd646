"""Processes that train together, as tests start them: gloo on this machine, without Ray."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

__all__ = ["spread"]

_LONGEST_S = 200
"""After which a process that hangs tells where, and ends."""


def spread(ranks: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `act(*arguments)` returns on each of `ranks` processes of one group; `act` is a module's function.

    The processes are forks of one that has imported this module's and `act`'s imports, which takes longest.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([act.__module__])
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=_rank, args=(folder, rank, ranks, act, arguments)) for rank in range(ranks)]
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where what forks finds its imports
            for process in started:
                process.start()
        waiting = {process.sentinel for process in started}
        while waiting and not any(process.exitcode for process in started):  # the others would wait for one that failed
            waiting -= set(wait(waiting))
        for process in started:
            process.kill()
            process.join()
        assert [process.exitcode for process in started] == [0] * ranks
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(ranks)]


def _rank(folder: str, rank: int, ranks: int, act: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(_LONGEST_S, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    torch.save(act(*arguments), Path(folder, f"result-{rank}"))
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
