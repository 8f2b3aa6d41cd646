"""Configs that were kept in a run folder, which has no secrets in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from ddil_ray.errors import ConfigError
from ddil_ray.redact import is_redacted

__all__ = ["check_complete"]


def check_complete(config: BaseModel) -> None:
    """See that no setting of a kept config lacks its secret.

    Raises:
        ConfigError: names those that do.
    """
    if missing := list(_missing(config.model_dump(mode="json"), "")):
        raise ConfigError(
            f"`{'`, `'.join(missing)}` must be given again, as secrets are not kept in the run folder. Add "
            f"`{missing[0]}=...` to the command, or give credentials by the environment (MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, PGPASSWORD, AWS_ACCESS_KEY_ID, ...) and a URL without them."
        )


def _missing(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, inner in node.items():
            yield from _missing(inner, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for inner in node:
            yield from _missing(inner, path)
    elif is_redacted(node):
        yield path
