"""Pins that every role's networks run in its own precision, wherever its work is done."""

from __future__ import annotations

import pytest
import torch
from runs import small_run

from ddil_ray.states.batch import Origin
from ddil_ray.states.source import StateRequest
from ddil_ray.training import inline
from ddil_ray.training.memory import estimate
from ddil_ray.training.recipe import Recipe

STATES = {"forward": 0.25, "student": 0.25, "teacher": 0.25, "mixed": 0.25}


def _recipe(**precision):
    roles = {name: {"precision": value} for name, value in precision.items()}
    return Recipe(small_run(states=STATES, **roles))


class _Seen:
    """What networks are asked in."""

    def __init__(self, recipe: Recipe):
        made = recipe.ingredients()
        self.maker = inline.state_maker(recipe, made, recipe.student_of(made.teacher), "cpu")
        self.student, self.teacher = set(), set()
        self.maker.student.network.register_forward_pre_hook(lambda *_: self.student.add(_autocast()))
        self.maker.expert.teacher.network.register_forward_pre_hook(lambda *_: self.teacher.add(_autocast()))

    def make(self, origin: Origin):
        self.student.clear()
        self.teacher.clear()
        return self.maker.make(StateRequest(origin, 0, 0, 16, seed=0))


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@pytest.mark.parametrize("trainer", ["fp32", "fp16"])
def test_rollouts_and_labels_run_in_the_precision_of_their_role(trainer):
    seen = _Seen(_recipe(trainer=trainer, student_rollouts="bf16", labels="fp32"))
    teachers_own = {None if trainer == "fp32" else torch.float16}
    for origin, student, teacher in (
        (Origin.STUDENT, {torch.bfloat16}, set()),
        (Origin.TEACHER, set(), teachers_own),
        (Origin.MIXED, {torch.bfloat16}, {torch.bfloat16}),
    ):
        states = seen.make(origin)
        assert (seen.student, seen.teacher) == (student, teacher)
        assert states.x_t.dtype == torch.float32
        seen.teacher.clear()
        seen.maker.expert.label(seen.maker.objective, states, "cpu")
        assert seen.teacher == {None}


def test_a_role_that_names_no_precision_has_the_trainers():
    seen = _Seen(_recipe(trainer="bf16"))
    seen.maker.expert.label(seen.maker.objective, seen.make(Origin.STUDENT), "cpu")
    assert seen.student == seen.teacher == {torch.bfloat16}


def test_the_memory_estimate_follows_the_precision_of_a_role():
    """And the trainer keeps its own."""
    peak = {}
    for precision in ("fp32", "bf16"):
        recipe = _recipe(student_rollouts=precision, labels=precision)
        peak[precision] = estimate(recipe, recipe.ingredients())
    for role in ("student_rollouts", "forward_states"):
        assert peak["bf16"][role].parts["activations"] < peak["fp32"][role].parts["activations"]
    assert peak["bf16"]["trainer"] == peak["fp32"]["trainer"]
