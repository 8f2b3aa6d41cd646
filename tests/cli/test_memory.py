"""Pins what the plan says of memory: who needs how much, all of a node, and GPUs that are too small."""

from __future__ import annotations

import pytest

from ddil_ray.cli.memory import memory_plan
from ddil_ray.training.memory import RoleMemory

GIB = 2**30
ROLES = {
    "trainer": RoleMemory({"student": 10 * GIB, "activations": 20 * GIB}, {"replay": GIB}, gpu=True),
    "forward_states": RoleMemory({"teacher": 4 * GIB}, {"prompts": GIB}, gpu=False),
    "evaluation": RoleMemory({"teacher": 30 * GIB}, {"prompts": GIB}, gpu=True),
}
ACTORS = {"trainer": 2, "forward_states": 3, "evaluation": 1}


def test_a_node_holds_all_actors_and_once_what_they_share_and_evaluation_when_they_are_gone():
    plan = memory_plan(ROLES, ACTORS, {"data": 7 * GIB}, [])
    assert [row["bytes_each"] for row in plan["roles"]] == [30 * GIB, 5 * GIB, 30 * GIB]
    assert plan["node"] == {"cpu_bytes": (2 * 1 + 3 * 5 + 7) * GIB, "gpu_bytes": 60 * GIB}
    assert plan["warnings"] == []


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([80, 80], []),
        ([24, 80], []),
        ([40], ["All actors need about 60 GiB, but the GPUs here have 40"]),
        ([24, 24], ["trainer needs about 30 GiB, but the largest GPU here has 24", "evaluation needs about 30 GiB"]),
    ],
)
def test_gpus_that_are_too_small_are_warned_of(devices, expected):
    warnings = memory_plan(ROLES, ACTORS, {}, [size * GIB for size in devices])["warnings"]
    assert len(warnings) == len(expected)
    assert all(start in warning for warning, start in zip(warnings, expected, strict=True))
