"""Pins the presets of the large teachers: each runs as it is on a tiny pipeline of the same family."""

from __future__ import annotations

import math

import pytest
from preparing import prepared
from tiny import save_pipeline

from ddil_ray.config import load_config, preset_names
from ddil_ray.states.batch import Origin
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

TINY = {"sd15": "stable_diffusion", "ssd1b": "ssd1b", "sdxl": "sdxl", "sd35-medium": "sd3", "flux": "flux"}
PRESETS = [name for name in preset_names() if name.partition("/")[0] in TINY]
SMALL = (
    "trainer.steps=2", "trainer.batch_size=4", "trainer.warmup_steps=0", "trainer.optimizer=adamw",
    "tracking.log_every=1", "shift.enabled=false", "evaluation.enabled=false", "forward_states.batch_size=4",
    "student_rollouts.batch_size=4", "teacher_rollouts.batch_size=4",
)  # fmt: skip
"""bitsandbytes computes on GPUs."""


@pytest.fixture(scope="module", params=TINY)
def settings(request, tmp_path_factory):
    """(preset folder, overrides with a tiny teacher and its data)."""
    folder = tmp_path_factory.mktemp(request.param)
    teacher = save_pipeline(TINY[request.param], folder)
    return request.param, [f"teacher.model={teacher}", f"data.source={prepared(teacher, folder / 'data')}"]


def test_every_teacher_has_a_preset_of_every_method():
    assert len(PRESETS) == 20
    assert sorted(PRESETS) == sorted(f"{t}/{m}" for t in TINY for m in ("pd", "lcm", "lcm-lora", "dmd2"))


@pytest.mark.parametrize("method", ["pd", "lcm", "lcm-lora", "dmd2"])
def test_a_preset_runs_on_a_tiny_teacher(settings, method):
    family, tiny = settings
    shorter = ["objective.teacher_steps=8", "objective.student_steps=[4, 2]"] if method == "pd" else []
    if method == "dmd2":
        shorter.append("tracking.log_every=10")
    recipe = Recipe(load_config(f"{family}/{method}", [*SMALL, *tiny, *shorter]))
    result = distill_inline(recipe)
    assert set(recipe.priors.origins) == {Origin.FORWARD, Origin.STUDENT, Origin.TEACHER}
    losses = [record["loss"] for record in result.records if "loss" in record]
    assert losses
    assert all(map(math.isfinite, losses))
    assert (recipe.config.student.lora is not None) == (method == "lcm-lora")
