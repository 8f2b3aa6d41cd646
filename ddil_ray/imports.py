"""Imports of large libraries."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

__all__ = ["import_large"]


def import_large(module: str) -> ModuleType:
    """`importlib.import_module` of what brings torch, diffusers or transformers.

    The garbage collector rests meanwhile: as modules are made of hundreds of thousands of objects that stay, it would
    look through all of them again and again, and find nothing. That is a fifth of the time: for torch, the stages of
    the runtime and a UNet of diffusers 5.0 CPU-seconds in place of 6.5, medians of five.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if collects:
            gc.enable()
