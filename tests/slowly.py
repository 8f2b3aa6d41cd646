"""A stage of `ddil_ray.runtime.requests` whose imports take long."""

from __future__ import annotations

import time

__all__ = ["EchoStage"]

IMPORT_S = 3.0

time.sleep(IMPORT_S)


class EchoStage:
    """Returns what it is asked."""

    def __call__(self, request: str) -> str:
        return request
