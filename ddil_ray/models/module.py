"""Family `module`: any torch network, given as `module.path:factory`.

The factory takes no argument and returns a `DiffusionModel`. Such students are exported as safetensors, since diffusers
has no pipeline for them.
"""

from __future__ import annotations

import importlib

from safetensors import SafetensorError
from safetensors.torch import load_file

from ddil_ray.errors import ConfigError
from ddil_ray.models.model import DiffusionModel

__all__ = ["load_module"]


def load_module(spec: str, *, weights: str | None = None) -> DiffusionModel:
    """Call the factory that `spec` names, and load `weights` (a local .safetensors file) into its network.

    Raises:
        ConfigError: the module, the factory or the weights cannot be loaded, or the result is no `DiffusionModel`.
    """
    module_name, _, factory_name = spec.partition(":")
    try:
        model = getattr(importlib.import_module(module_name), factory_name)()
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"`teacher.model` must name an importable factory without arguments as `module.path:factory`, but "
            f"{spec!r} failed: {error}. Check the spelling, and that the module is on PYTHONPATH."
        ) from error
    if not isinstance(model, DiffusionModel):
        raise ConfigError(
            f"`teacher.model` factory {spec!r} must return a ddil_ray.models.DiffusionModel, but returned "
            f"{type(model).__name__} instead."
        )
    if weights is not None:
        try:
            model.network.load_state_dict(load_file(weights))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"`teacher.weights` must be a safetensors file that fits {spec!r}, but {weights!r} failed: {error}."
            ) from error
    model.network.eval()
    return model
