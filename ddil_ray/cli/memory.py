"""The memory of a run in its plan: what each role holds at its peak, and whether this machine's GPUs hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ddil_ray.cli.options import print_lines, print_table

__all__ = ["memory_of", "memory_plan", "print_memory"]

_GIB = 2**30


def memory_of(recipe: Any, made: Any) -> dict[str, Any]:
    """What the run would hold, GPUs that torch sees here given to the roles that ask for some."""
    import torch

    from ddil_ray.runtime.demands import demands, evaluation_demand
    from ddil_ray.training.memory import estimate, shared_bytes

    visible = range(torch.cuda.device_count())
    rows = [*demands(recipe.config), *([evaluation_demand(recipe.config)] if recipe.config.evaluation.enabled else [])]
    on_gpu = {d.role for d in rows if (bool(visible) if d.gpus == "auto" else float(d.gpus) > 0)}
    return memory_plan(
        estimate(recipe, made, on_gpu=on_gpu),
        {d.role: d.count for d in rows},
        shared_bytes(recipe, made),
        [torch.cuda.get_device_properties(i).total_memory for i in visible],
    )


def memory_plan(
    roles: Mapping[str, Any], actors: Mapping[str, int], shared: Mapping[str, int], devices: Sequence[int]
) -> dict[str, Any]:
    """The estimate as the plan tells it.

    Args:
        roles: `RoleMemory` by role.
        actors: their numbers.
        shared: bytes by part that a node holds once.
        devices: bytes of every GPU here.
    """
    rows = [
        {
            "role": name,
            "actors": actors[name],
            "device": "GPU" if role.gpu else "CPU",
            "bytes_each": role.device_bytes,
            "parts": role.parts if role.gpu else {**role.parts, **role.host},
            "host_bytes_each": role.host_bytes,
        }
        for name, role in roles.items()
    ]
    training = [row for row in rows if row["role"] != "evaluation"]
    alone = [row for row in rows if row["role"] == "evaluation"]  # when training has ended
    node = {
        "cpu_bytes": max(map(_on_cpu, (training, alone))) + sum(shared.values()),
        "gpu_bytes": max(map(_on_gpu, (training, alone))),
    }
    return {"roles": rows, "shared": dict(shared), "node": node, "warnings": _warnings(rows, node, devices)}


def _on_gpu(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(row["actors"] * row["bytes_each"] for row in rows if row["device"] == "GPU")


def _on_cpu(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(row["actors"] * row["bytes_each" if row["device"] == "CPU" else "host_bytes_each"] for row in rows)


def _warnings(rows: Sequence[Mapping[str, Any]], node: Mapping[str, int], devices: Sequence[int]) -> list[str]:
    """One line per role that no GPU here holds, or one for all of them together."""
    if not devices:
        return []
    found = [
        f"{row['role']} needs about {_gib(row['bytes_each'])} GiB, but the largest GPU here has {_gib(max(devices))}: "
        "see docs/memory.md for what makes it less."
        for row in rows
        if row["device"] == "GPU" and row["bytes_each"] > max(devices)
    ]
    if not found and node["gpu_bytes"] > sum(devices):
        found.append(
            f"All actors need about {_gib(node['gpu_bytes'])} GiB, but the GPUs here have {_gib(sum(devices))}: start "
            "fewer, or see docs/memory.md."
        )
    return found


def print_memory(plan: Mapping[str, Any]) -> None:
    """Print what `memory_of` gave."""
    print_table(
        "Memory of an actor at its peak",
        ["role", "actors", "on", "GiB each"],
        [[row["role"], row["actors"], row["device"], _gib(row["bytes_each"])] for row in plan["roles"]],
    )
    print_lines(*(f"{row['role']}: {_named(row['parts'])}" for row in plan["roles"]))
    node, shared = plan["node"], _named(plan["shared"])
    on_gpu = f", {_gib(node['gpu_bytes'])} GiB of GPUs" if node["gpu_bytes"] else ""
    print_lines(f"memory    {_gib(node['cpu_bytes'])} GiB on one node{on_gpu}; shared by its actors: {shared}")
    print_lines(*(f"Warning: {line}" for line in plan["warnings"]))


def _named(parts: Mapping[str, int]) -> str:
    """The parts, largest first."""
    return ", ".join(f"{name} {_gib(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size)


def _gib(size: float) -> str:
    return f"{size / _GIB:.2g}" if size < 10 * _GIB else f"{size / _GIB:.0f}"
