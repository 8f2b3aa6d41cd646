"""Stages of `ddil_ray.runtime.requests` that processes die of, or hang at."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

__all__ = ["DeadlyStage", "HangingStage", "UnbuiltStage"]


class DeadlyStage:
    """Ends its process at each request that starts with "die", as often as `times`; others it returns."""

    def __init__(self, folder: str, times: int) -> None:
        self._folder, self._times = Path(folder), times

    def __call__(self, request: str) -> str:
        died = self._folder / request
        before = died.stat().st_size if died.exists() else 0
        if request.startswith("die") and before < self._times:
            died.write_bytes(bytes(before + 1))
            os._exit(1)
        return request


class UnbuiltStage:
    """Ends its process while it is built, as models do that find no memory."""

    def __init__(self, *arguments: Any) -> None:
        os._exit(1)


class HangingStage:
    """Answers nothing."""

    def __call__(self, request: Any) -> None:
        time.sleep(600)
