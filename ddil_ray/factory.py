"""Objects of the user's own code, given as `module.path:factory`."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ddil_ray.errors import ConfigError

__all__ = ["call_factory", "is_factory"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_factory(spec: str) -> bool:
    """Whether `spec` has the form `module.path:factory`."""
    return _FACTORY.fullmatch(spec) is not None


def call_factory(spec: str, *, field: str) -> Any:
    """What the factory that setting `field` names returns.

    Raises:
        ConfigError: the module or the factory cannot be imported, or the factory wants arguments.
    """
    module_name, _, factory_name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module_name), factory_name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"`{field}` must name an importable factory without arguments as `module.path:factory`, but "
            f"{spec!r} failed: {error}. Check the spelling, and that the module is on PYTHONPATH."
        ) from error
