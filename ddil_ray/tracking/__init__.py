"""Where metrics go: a journal in the run folder first, from it to the live view and to trackers in the background.

To add a tracker: a module with a class that satisfies `Tracker`, a row in `TRACKERS`, and its name in the config group
`Tracking`.
"""

from __future__ import annotations

from collections.abc import Callable

from ddil_ray.tracking.background import BackgroundTracker
from ddil_ray.tracking.journal import Journal, read_journal
from ddil_ray.tracking.tracker import NullTracker, RunInfo, Tracker
from ddil_ray.tracking.view import View

__all__ = ["TRACKERS", "BackgroundTracker", "Journal", "RunInfo", "Tracker", "View", "read_journal"]


def _mlflow(**settings: object) -> Tracker:
    from ddil_ray.tracking.mlflow import MlflowTracker

    return MlflowTracker(**settings)  # type: ignore[arg-type]


TRACKERS: dict[str, Callable[..., Tracker]] = {"mlflow": _mlflow, "none": lambda **_: NullTracker()}
"""Builder of each tracker by name: called with `uri`, `experiment` and `timeout_s`."""
