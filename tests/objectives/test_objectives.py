"""The table test of all methods: a new method is one more row of `METHODS`."""

from __future__ import annotations

import copy

import pytest
import torch

from ddil_ray.diffusion.schedule import CosineVP
from ddil_ray.objectives import OBJECTIVES, RealData
from ddil_ray.objectives.objective import spread
from ddil_ray.states.batch import Origin
from ddil_ray.states.source import Conditions, SourceContext, StateRequest, make_states
from ddil_ray.testing import tiny_model
from ddil_ray.training.learner import Learner
from ddil_ray.training.optimizer import OptimizerSettings
from ddil_ray.training.parallel import Alone

METHODS = {
    "pd": {"teacher_steps": 8, "student_steps": (4, 2)},
    "lcm": {"solver_steps": 10, "student_steps": 2, "teacher_substeps": 2},
    "dmd2": {"student_steps": 2, "student_every": 1, "gan_weight": 1e-2, "gan_layer": "inside"},
}
IMAGES = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def objective_of(name):
    objective = OBJECTIVES[name](CosineVP(), **METHODS[name])
    if objective.asks_in_trainer:
        teacher = tiny_model()
        teacher.network.requires_grad_(False)
        objective.equip(teacher.expert(guided=True), RealData(IMAGES, torch.arange(50) % 10))
    return objective


def labelled(objective, *, rows=16, origin=Origin.FORWARD, phase=0, images=None):
    model = tiny_model()
    context = SourceContext(
        schedule=CosineVP(),
        sample_shape=model.sample_shape,
        conditions=Conditions(torch.arange(50) % 10, (2.0, 2.0)),
        images=IMAGES if images is None else images,
        student=objective.student_denoiser(model.denoiser()),
        teacher=model.expert(guided=True),
    )
    chosen = objective.phases[phase]
    states = make_states(context, chosen, StateRequest(origin, phase, 0, rows, 0), version=0)
    with torch.no_grad():
        return states.labelled(objective.label(model.expert(guided=True), states, chosen))


def learner_of(objective, **settings):
    settings = {"steps": 20, "lr": 1e-3} | settings
    return Learner(tiny_model(), objective, OptimizerSettings(**settings))


def _generator():
    return torch.Generator().manual_seed(0)


def test_every_method_has_a_row():
    assert set(METHODS) == set(OBJECTIVES)


@pytest.mark.parametrize("name", METHODS)
def test_times_go_from_one_to_zero(name):
    objective = objective_of(name)
    for times in [phase.stages for phase in objective.phases] + [objective.sampling_times(n) for n in (1, 2)]:
        assert (float(times[0]), float(times[-1])) == (1.0, 0.0)
        assert bool((times.diff() < 0).all())


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_the_student_and_nothing_else(name):
    objective = objective_of(name)
    teacher = tiny_model()
    batch = labelled(objective)
    student = tiny_model()
    objective.start(student.network, objective.phases[0], Alone())
    objective.loss(student.denoiser(), batch, objective.phases[0]).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.network.parameters())
    assert all(p.grad is None for p in teacher.network.parameters())
    assert not batch.label.requires_grad


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_a_fixed_batch_lowers_the_loss(name, precision):
    objective = objective_of(name)
    learner = learner_of(objective, precision=precision, steps=200)
    batch = labelled(objective, rows=32)
    losses = [learner.update(batch)["loss"] for _ in range(200)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_learner_goes_on_bitwise(name):
    objective = objective_of(name)
    a = learner_of(objective)
    batch = labelled(objective)
    for _ in range(5):
        a.update(batch)
    b = learner_of(objective_of(name))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    after = [[learner.update(batch, _generator())["loss"] for _ in range(5)] for learner in (a, b)]
    assert after[0] == after[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("origin", [Origin.STUDENT, Origin.TEACHER, Origin.MIXED])
def test_rollouts_and_their_labels_do_not_depend_on_the_data(name, origin):
    """Oracle 23: clean images reach the loss through forward states only."""
    objective = objective_of(name)
    a = labelled(objective, origin=origin, images=torch.zeros(50, 1, 8, 8))
    b = labelled(objective, origin=origin, images=torch.ones(50, 1, 8, 8))
    assert torch.equal(a.x_t, b.x_t)
    assert torch.equal(a.label, b.label)


@pytest.mark.parametrize("name", ["pd", "lcm"])
def test_micro_batches_give_the_gradient_of_the_whole(name):
    whole, parts = (learner_of(objective_of(name), accumulate=n) for n in (1, 4))
    batch = labelled(objective_of(name))
    assert parts.update(batch)["grad_norm"] == pytest.approx(float(whole.update(batch)["grad_norm"]), rel=1e-4)


def test_the_spread_is_the_standard_deviation_over_rows():
    x = torch.randn(5, 2, 3, requires_grad=True)
    assert float(spread(x)) == pytest.approx(float(x.std(0).mean()))
    assert not spread(x).requires_grad
    assert float(spread(x[:1])) == 0
