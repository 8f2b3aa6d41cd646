"""The folder of a finished run of `ddil-ray distill`, as whoever compares or registers runs reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ddil_ray.config import RunConfig, deciding, load_config
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.places import check_url
from ddil_ray.redact import redact
from ddil_ray.storage import open_url

__all__ = ["REFLECTED", "FinishedRun", "decides_scores", "read_finished"]

_REFERENCE = ("evaluation.", "teacher.", "data.", "student.guidance")
_FREE = ("evaluation.steps",)
REFLECTED = ("threshold.",)
"""Settings, by their beginnings, that change a teacher's samples, and students' with them."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left."""

    url: str
    """Its folder, without secrets."""
    config: RunConfig
    metrics: dict[str, Any]
    """metrics.json."""

    @property
    def arm_settings(self) -> dict[str, str]:
        """Dotted settings that make what came out, apart from the seed."""
        return {key: value for key, value in deciding(self.config).items() if key != "seed"}


def decides_scores(setting: str) -> bool:
    """Whether a dotted setting says what scores are measured against, or with."""
    return setting.startswith(_REFERENCE) and not setting.startswith(_FREE)


def read_finished(url: str, field: str, *, evaluated: bool = True) -> FinishedRun:
    """The finished run in the folder or fsspec URL `url`, which was given as `field`.

    Args:
        url: without a slash at its end.
        field: for messages.
        evaluated: refuse a run without scores.

    Raises:
        ConfigError: there is none.
    """
    check_url(url, field)
    try:
        fs, root = open_url(url)
        begun, finished = (bool(fs.exists(f"{root}/{name}")) for name in ("config.yaml", "metrics.json"))
    except Exception as error:  # every filesystem has errors of its own
        raise ConfigError(f"{field} must be a folder that can be read, but {url} failed: {first_line(error)}") from None
    if not begun:
        raise ConfigError(f"{field} must be the folder of a run, but {url} has no config.yaml instead.")
    if not finished:
        raise ConfigError(
            f"{field} must be a finished run, but {url} has no metrics.json. Finish it with `ddil-ray distill "
            f"--resume {url}`."
        )
    try:
        metrics = json.loads(fs.cat_file(f"{root}/metrics.json"))
    except ValueError as error:
        raise ConfigError(
            f"{field} must be a run whose metrics.json is whole, but that of {url} is not ({first_line(error)}). Write "
            f"it anew with `ddil-ray distill --resume {url}`."
        ) from None
    if evaluated and not metrics["scores"]:
        raise ConfigError(f"{field} must be an evaluated run, but {url} was run with `evaluation.enabled=false`.")
    return FinishedRun(redact(url), load_config(f"{url}/config.yaml", kind=RunConfig), metrics)
