"""Family `module`: any torch network, given as `module.path:factory`.

The factory takes no argument and returns a `DiffusionModel`. Such students are exported as safetensors, since diffusers
has no pipeline for them.
"""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load_file

from ddil_ray.errors import ConfigError
from ddil_ray.factory import call_factory
from ddil_ray.models.model import DiffusionModel

__all__ = ["load_module"]


def load_module(spec: str, *, weights: str | None = None) -> DiffusionModel:
    """Call the factory that `spec` names, and load `weights` (a local .safetensors file) into its network.

    Raises:
        ConfigError: the module, the factory or the weights cannot be loaded, or the result is no `DiffusionModel`.
    """
    model = call_factory(spec, field="teacher.model")
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
