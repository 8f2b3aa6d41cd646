"""Distillation methods, one module each; the map is `OBJECTIVES`.

To add a method: write a module with a class that satisfies `Objective`, a config class with its settings and `type`,
and a row here. Trainer, states and runtime stay as they are.

| type | module | source |
| --- | --- | --- |
| pd | `pd.ProgressiveDistillation` | Salimans and Ho 2022, arXiv:2202.00512 |
| lcm | `lcm.LatentConsistency` | Luo et al. 2023, arXiv:2310.04378 |
| dmd2 | `dmd2.DistributionMatching` | Yin et al. 2024, arXiv:2405.14867 |
"""

from __future__ import annotations

from collections.abc import Callable

from ddil_ray.objectives.dmd2 import DistributionMatching
from ddil_ray.objectives.lcm import LatentConsistency
from ddil_ray.objectives.objective import LossOutput, Objective, RealData
from ddil_ray.objectives.pd import ProgressiveDistillation

__all__ = [
    "OBJECTIVES",
    "DistributionMatching",
    "LatentConsistency",
    "LossOutput",
    "Objective",
    "ProgressiveDistillation",
    "RealData",
]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "pd": ProgressiveDistillation,
    "lcm": LatentConsistency,
    "dmd2": DistributionMatching,
}
"""Builder of each method by its `type`: called with the schedule and the method's settings as keywords."""
