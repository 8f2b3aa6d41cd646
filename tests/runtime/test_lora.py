"""Pins that a run of adapters on Ray moves and keeps adapters alone, and learns what it learns without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import PD, small_run

from ddil_ray.models import load_model
from ddil_ray.runtime.run import distill
from ddil_ray.tracking import read_journal
from ddil_ray.training.checkpoint import read_shared
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

ADAPTERS = 4 * (2 * (65 + 32) + 2 * (32 + 64))
"""Bytes of the adapters of rank 2; the whole network has 18,304."""


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_of_adapters_publishes_and_checkpoints_adapters_alone(ray_cluster, run_dir):
    """Two rounds, the second taught by the adapters of the first, on states that do not depend on timing."""
    lora = {"rank": 2, "alpha": 4, "target_modules": ["inside", "outside"]}
    config = small_run(objective=PD, states={"forward": 0.5, "teacher": 0.5}, output=run_dir, student={"lora": lora})
    folder = Path(distill(config).folder)
    records = read_journal(folder / "metrics.jsonl")
    published = [r for r in records if "sync/bytes" in r]
    assert [r["step"] for r in published] == list(range(0, 40, 4))
    assert {r["sync/bytes"] for r in published} == {ADAPTERS}

    newest = sorted((folder / "checkpoints" / "attempt-1").glob("checkpoint_*"))[-1]
    learner = read_shared(newest)["learner"]
    kept = list(_tensors(learner))
    copies = 1 + 1 + 2 + 2  # student, average, moments of the optimizer, two rounds
    assert sum(t.numel() * t.element_size() for t in kept if t.ndim) == copies * ADAPTERS
    assert {t.ndim for t in kept if t.numel() > 1} == {2}

    inline = distill_inline(Recipe(config))
    assert [r["loss"] for r in records if "loss" in r] == pytest.approx([r["loss"] for r in inline.records], rel=1e-5)
    exported = load_model("ddil_ray.testing:tiny_model", weights=str(folder / "student" / "model.safetensors"))
    assert sum(p.numel() for p in exported.network.parameters()) * 4 == 18_304


def _tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)
