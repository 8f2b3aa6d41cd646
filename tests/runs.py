"""Small runs that tests share."""

from __future__ import annotations

from typing import Any

from ddil_ray.config import RunConfig

__all__ = ["small_run"]

_SMALL: dict[str, Any] = {
    "name": "small",
    "teacher": {"model": "ddil_ray.testing:tiny_model", "guidance": 1.0},
    "data": {"source": "digits"},
    "objective": {"type": "lcm", "solver_steps": 10, "student_steps": 2},
    "states": {"forward": 0.5, "student": 0.5},
    "trainer": {"steps": 20, "batch_size": 16, "lr": 1e-3},
    "forward_states": {"batch_size": 16},
    "student_rollouts": {"batch_size": 16},
    "teacher_rollouts": {"batch_size": 16},
    "sync": {"every": 4},
    "checkpoint": {"every": 8},
    "tracking": {"tracker": "none", "log_every": 2},
    "evaluation": {"enabled": False},
    "shift": {"enabled": False},
}
PD = {"type": "pd", "teacher_steps": 8, "student_steps": [4, 2]}
DMD2 = {"type": "dmd2", "student_steps": 4, "student_every": 2, "gan_layer": "inside"}
THREE_SOURCES = {"forward": 0.4, "student": 0.3, "teacher": 0.3}


def small_run(**changes: Any) -> RunConfig:
    """A run of seconds on the tiny model; `changes` replace settings, group by group."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in _SMALL.items()}
    for key, value in changes.items():
        replace = not isinstance(value, dict) or key in ("objective", "states")
        tree[key] = value if replace else {**tree.get(key, {}), **value}
    return RunConfig.model_validate(tree)
