"""Types of settings that are paths or URLs."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from pydantic import AfterValidator

from ddil_ray.places import TRACKING_SCHEMES, allowed

__all__ = ["Place", "TrackingPlace"]

Place = Annotated[str, AfterValidator(allowed)]
"""A path, a URL that is followed, or another name."""
TrackingPlace = Annotated[str, AfterValidator(partial(allowed, schemes=TRACKING_SCHEMES))]
