"""Imports of libraries that are large, in a fifth less time."""

from __future__ import annotations

import gc
import importlib
from types import ModuleType

__all__ = ["import_large"]


def import_large(module: str) -> ModuleType:
    """`importlib.import_module` of what brings torch, diffusers or transformers.

    The garbage collector rests meanwhile: as modules are made of hundreds of thousands of objects that stay, it would
    look through all of them again and again, and find nothing.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        if collects:
            gc.enable()
