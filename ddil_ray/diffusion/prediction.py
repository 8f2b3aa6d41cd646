"""What a network predicts, and the conversions between the four parameterisations.

With x = alpha x_0 + sigma eps: `epsilon` is eps, `sample` is x_0, `v_prediction` is alpha eps - sigma x_0 (for
alpha^2 + sigma^2 = 1) and `flow_prediction` is eps - x_0. All arithmetic is float64 and rounded once at the end: at
t = 1 of Stable Diffusion's schedule an error in eps is multiplied by 14.6 on its way to x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from torch import Tensor

from ddil_ray.diffusion.schedule import NoiseSchedule, levels

__all__ = ["Prediction", "convert", "from_x0", "to_eps", "to_x0"]


class Prediction(str, Enum):
    """The parameterisations, by diffusers' names of `prediction_type`."""

    EPSILON = "epsilon"
    SAMPLE = "sample"
    V = "v_prediction"
    FLOW = "flow_prediction"


_Convert = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_TO_X0: dict[Prediction, _Convert] = {
    Prediction.EPSILON: lambda e, x, a, s: (x - s * e) / a,
    Prediction.SAMPLE: lambda x_0, x, a, s: x_0,
    # Dividing by a^2 + s^2 makes the formula hold off the VP circle too; it is 1 on it.
    Prediction.V: lambda v, x, a, s: (a * x - s * v) / (a**2 + s**2),
    Prediction.FLOW: lambda v, x, a, s: (x - s * v) / (a + s),
}

_FROM_X0: dict[Prediction, _Convert] = {
    Prediction.EPSILON: lambda x_0, x, a, s: (x - a * x_0) / s,
    Prediction.SAMPLE: lambda x_0, x, a, s: x_0,
    Prediction.V: lambda x_0, x, a, s: (a * x - (a**2 + s**2) * x_0) / s,
    Prediction.FLOW: lambda x_0, x, a, s: (x - (a + s) * x_0) / s,
}


def to_x0(output: Tensor, x_t: Tensor, t: Tensor, *, prediction: Prediction, schedule: NoiseSchedule) -> Tensor:
    """The x_0 that `output` (B, ...) means at state `x_t` (B, ...) and time `t` (B,), in the dtype of `x_t`."""
    alpha, sigma = levels(schedule, t, x_t)
    return _TO_X0[prediction](output.double(), x_t.double(), alpha, sigma).to(x_t.dtype)


def from_x0(x_0: Tensor, x_t: Tensor, t: Tensor, *, prediction: Prediction, schedule: NoiseSchedule) -> Tensor:
    """The network output that means `x_0` (B, ...) at `x_t`; sigma(t) must be positive except for `sample`."""
    alpha, sigma = levels(schedule, t, x_t)
    return _FROM_X0[prediction](x_0.double(), x_t.double(), alpha, sigma).to(x_t.dtype)


def to_eps(x_0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The eps for which alpha x_0 + sigma eps = x_t exactly; sigma(t) must be positive."""
    return from_x0(x_0, x_t, t, prediction=Prediction.EPSILON, schedule=schedule)


def convert(
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    source: Prediction,
    target: Prediction,
    schedule: NoiseSchedule,
) -> Tensor:
    """Re-express a network output of kind `source` as one of kind `target`."""
    x_0 = to_x0(output.double(), x_t.double(), t, prediction=source, schedule=schedule)
    return from_x0(x_0, x_t.double(), t, prediction=target, schedule=schedule).to(x_t.dtype)
