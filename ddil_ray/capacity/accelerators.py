"""How fast networks run on accelerators: a vendor's peak times the share of it that diffusion networks reach.

The shares are those of Stable Diffusion 1.5's UNet in half precision; other networks, batches and kernels reach others,
so counted times are good for ratios. `ddil-ray plan --measure` takes times from the hardware in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddil_ray.errors import ConfigError

__all__ = ["ACCELERATORS", "INFERENCE_SHARE", "TRAINING_SHARE", "Accelerator", "accelerator"]

TRAINING_SHARE, INFERENCE_SHARE = 0.28, 0.40
"""Of the peak, forward and backward together, and forward alone."""


@dataclass(frozen=True)
class Accelerator:
    """Dense peak of one device, in TFLOP/s, from its data sheet."""

    half: float
    """bf16 (fp16 where there is none), accumulated in float32."""
    full: float
    """float32, as torch multiplies it by default: without TF32."""

    def peak(self, precision: str) -> float:
        """TFLOP/s in `precision`, which is fp32, bf16 or fp16."""
        return self.full if precision == "fp32" else self.half

    def seconds(self, *, training_flop: float, inference_flop: float, precision: str) -> float:
        """How long so much work takes in `precision`."""
        peak = self.peak(precision) * 1e12
        return training_flop / (peak * TRAINING_SHARE) + inference_flop / (peak * INFERENCE_SHARE)


ACCELERATORS = {
    "T4": Accelerator(65, 8.1),
    "V100": Accelerator(125, 15.7),
    "A10G": Accelerator(70, 31.5),
    "L4": Accelerator(121, 30.3),
    "L40S": Accelerator(362, 91.6),
    "A100": Accelerator(312, 19.5),
    "H100": Accelerator(989, 67),
    "H200": Accelerator(989, 67),
}
"""By the names that Ray has for them. To add one: a row."""


def accelerator(name: str, *, field: str) -> Accelerator:
    """The accelerator called `name`, which setting or option `field` gives.

    Raises:
        ConfigError: not known.
    """
    if name not in ACCELERATORS:
        raise ConfigError(
            f"`{field}` must be one of {', '.join(ACCELERATORS)} for an estimate, but is {name!r} instead. Use "
            "`--measure` on other hardware."
        )
    return ACCELERATORS[name]
