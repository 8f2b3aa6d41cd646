"""Pins estimates of memory to what torch's allocator reports of the same work, on tiny networks."""

from __future__ import annotations

import pytest
import torch
from latent import latent_data, latent_model, learner_of, maker_of, request_of, rows_of
from peak import peak_bytes
from runs import DMD2, PD, THREE_SOURCES, small_run

from ddil_ray.models import load_model
from ddil_ray.states.batch import Origin
from ddil_ray.training.memory import estimate, shared_bytes
from ddil_ray.training.recipe import Recipe

ROWS = 256
OBJECTIVES = {
    "pd": PD,
    "lcm": {"type": "lcm", "solver_steps": 10, "student_steps": 2},
    "dmd2": DMD2 | {"gan_layer": None, "student_every": 1},
}
POOLS = {role: {"batch_size": ROWS} for role in ("forward_states", "student_rollouts", "teacher_rollouts")}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(teacher, data) by name; no data: the digits of the config."""
    model = latent_model(tmp_path_factory.mktemp("latent"))
    return {"latent": (model, latent_data(model, 2 * ROWS)), "digits": (load_model("builtin:digits"), None)}


def made_of(given, name, objective, **changes):
    """(recipe, ingredients) of a run with all roles apart, and blocks that outweigh the networks."""
    settings = {"objective": OBJECTIVES[objective], "states": THREE_SOURCES, **POOLS, **changes}
    settings["labels"] = {"placement": "pool", "batch_size": ROWS, **changes.get("labels", {})}
    settings["trainer"] = {"batch_size": ROWS, **changes.get("trainer", {})}
    recipe = Recipe(small_run(**settings))
    teacher, data = given[name]
    return recipe, recipe.ingredients(teacher=teacher.copy(), data=data)


def measured_update(recipe, made):
    """Of the second update, when all moments are there."""
    batch = rows_of(recipe, made, ROWS)

    def prepare():
        learner, copied = learner_of(recipe, made), batch[torch.arange(ROWS)]
        learner.update(copied, torch.Generator().manual_seed(0))
        return learner, copied

    return peak_bytes(prepare, lambda ready: ready[0].update(ready[1], torch.Generator().manual_seed(0)))


def measured_states(recipe, made, origin, **held):
    """Of a block of every phase."""

    def act(maker):
        for phase in range(len(made.objective.phases)):
            maker.expert.begin(phase, promoted=phase > 0 and maker.expert.student is not None)
            maker.make(request_of(origin, ROWS, phase))

    return peak_bytes(lambda: maker_of(recipe, made, **held), act)


def measured_labels(recipe, made):
    """Of a block of states in one part."""
    states = maker_of(recipe, made, acts=False).make(request_of(Origin.FORWARD, ROWS))

    def prepare():
        return maker_of(recipe, made, acts=False).expert, states[torch.arange(ROWS)]

    return peak_bytes(prepare, lambda ready: ready[0].label(made.objective, ready[1], "cpu"))


def assert_close(estimated, measured):
    assert sum(estimated.parts.values()) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", ["latent", "digits"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_role_takes_what_was_estimated(given, name, objective, capsys):
    recipe, made = made_of(given, name, objective)
    found = estimate(recipe, made)
    measured = {
        "trainer": measured_update(recipe, made),
        "student_rollouts": measured_states(recipe, made, Origin.STUDENT, acts=True, asked=False),
        "teacher_rollouts": measured_states(recipe, made, Origin.TEACHER, acts=False),
    }
    if made.objective.asks_in_trainer:
        assert "labels"
    else:
        measured["labels (forward)"] = measured_labels(recipe, made)
    for role, peak in measured.items():
        print("RATIO", name, objective, role, sum(found[role].parts.values())/ peak, peak/2**20, {k:round(v/2**20,2) for k,v in found[role].parts.items()})
    for role, peak in measured.items():
        assert_close(found[role], peak)
