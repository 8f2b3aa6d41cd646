"""Types of settings that are paths or URLs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from ddil_ray.places import TRACKING_SCHEMES, allowed

__all__ = ["MODELS", "Place", "TrackingPlace", "anchored"]

Place = Annotated[str, AfterValidator(allowed)]
"""A path, a URL that is followed, or another name."""
TrackingPlace = Annotated[str, AfterValidator(partial(allowed, schemes=TRACKING_SCHEMES))]

MODELS = (("teacher", "model"), ("teacher", "weights"), ("student", "model"))
"""Settings (group, name) that are models, in files or not."""


def anchored(config: dict[str, Any], names: Sequence[tuple[str, str]] = MODELS) -> dict[str, Any]:
    """`config` with the local paths in it made absolute: Ray's workers have working directories of their own.

    Args:
        config: a whole config of a run, of plain values; it is changed.
        names: settings that may be paths.
    """
    for group, name in names:
        value = config[group][name]
        if value is not None and Path(value).exists():
            config[group][name] = str(Path(value).resolve())
    return config
