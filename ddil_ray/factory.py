"""Objects of the user's own code, given as `module.path:factory`.

Importing a module runs it, and configs come from others: so code outside this package is off until whoever starts the
command allows it, by `--allow-code`, `allow_code()` or DDIL_RAY_ALLOW_CODE=1. No config can. Processes of Ray's that
work for a run may what its driver may: they are told.
"""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

from ddil_ray.errors import ConfigError, DdilError, first_line, what_was_raised

__all__ = ["ALLOW_CODE", "allow_code", "call_factory", "code_allowed", "is_factory"]

ALLOW_CODE = "DDIL_RAY_ALLOW_CODE"
"""The environment variable: 1 allows factories of any module."""
_OWN = ("ddil_ray.models.perceptron", "ddil_ray.simulation", "ddil_ray.testing")
"""Modules of this package with factories: always allowed."""
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_factory(spec: str) -> bool:
    """Whether `spec` has the form `module.path:factory`."""
    return _FACTORY.fullmatch(spec) is not None


def allow_code() -> None:
    """Let this process, and those it starts, call factories of any module."""
    os.environ[ALLOW_CODE] = "1"


def code_allowed() -> bool:
    """Whether factories of any module may be called."""
    return os.environ.get(ALLOW_CODE) == "1"


def call_factory(spec: str, *, field: str) -> Any:
    """What the factory that setting `field` names returns.

    Raises:
        ConfigError: code is not allowed, there is no such factory without arguments, its module cannot be imported, or
            it raises.
        DdilError: the code's own, which says what to do.
    """
    module_name, _, factory_name = spec.partition(":")
    if module_name not in _OWN and not code_allowed():
        raise ConfigError(
            f"`{field}` must name no code while code is not allowed, but is {spec!r}, which would import "
            f"`{module_name}` and run it. If you trust it, pass `--allow-code`, or set {ALLOW_CODE} to 1."
        )
    stage = "while its module was imported"
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
        stage = "while it was called"
        return factory()
    except DdilError:
        raise
    except Exception as error:  # whatever others' code raises
        if _is_no_factory(error, module_name):
            raise ConfigError(
                f"`{field}` must name an importable factory without arguments as `module.path:factory`, but "
                f"{spec!r} failed: {first_line(error)}. Check the spelling, and that the module is on PYTHONPATH."
            ) from error
        raise ConfigError(
            f"`{field}` must name a factory that works, but {spec!r} failed {stage}: {what_was_raised(error)}. Mend "
            "the code there, or give it what it needs."
        ) from error


def _is_no_factory(error: Exception, module_name: str) -> bool:
    """Whether the name is wrong, and no line of the code it names."""
    if isinstance(error, ModuleNotFoundError):
        return error.name is not None and f"{module_name}.".startswith(f"{error.name}.")
    own_line = error.__traceback__ is not None and error.__traceback__.tb_next is None
    return own_line and isinstance(error, (AttributeError, TypeError))
