"""Pins what parts of a run are taken to cost, against passes counted by hand."""

from __future__ import annotations

import pytest
from preparing import prepared
from runs import small_run
from tiny import save_pipeline

from ddil_ray.capacity.accelerators import ACCELERATORS, Accelerator
from ddil_ray.capacity.costs import _precisions, counted, declared, measured
from ddil_ray.capacity.counting import count_forward
from ddil_ray.config import load_config
from ddil_ray.simulation import MODELS
from ddil_ray.states.batch import Origin
from ddil_ray.training.recipe import Recipe

SD15 = MODELS["sd15"].times
ROLES = ("trainer", "forward_states", "student_rollouts", "teacher_rollouts", "labels")
TRAINED = SD15.forward + SD15.backward
TEACHER = {"forward": 0.5, "teacher": 0.5}
SIMULATED = {
    "teacher": {"model": "ddil_ray.simulation:sd15", "guidance": 1.0},
    "data": {"source": "ddil_ray.simulation:sd15_latents"},
    "states": {"forward": 0.4, "student": 0.3, "teacher": 0.2, "mixed": 0.1, "teacher_substeps": 4},
    "trainer": {"steps": 20, "batch_size": 8},
}


def declared_costs(**changes):
    recipe = Recipe(small_run(**{**SIMULATED, **changes}))
    return declared(recipe, recipe.ingredients())


def test_consistency_distillation_costs_what_its_passes_do():
    """Blocks of 16 rows are 4 trajectories of 4 stages; guidance doubles the teacher's passes."""
    costs = declared_costs(objective={"type": "lcm", "student_steps": 4})
    states, labels = costs.phases[0].state_s, costs.phases[0].label_s
    each = 16 * SD15.inference
    assert states[Origin.FORWARD] == pytest.approx([0.0] * 5)
    assert states[Origin.STUDENT] == pytest.approx([each] * 5)
    assert states[Origin.TEACHER] == pytest.approx([4 * 2 * each] * 5)
    assert states[Origin.MIXED] == pytest.approx([(1 + 8) / 2 * each] * 5, rel=0.1)  # half of the steps each, drawn
    assert labels == pytest.approx(dict.fromkeys(Origin, 2 * each))
    assert costs.update_s == pytest.approx(8 * (TRAINED + SD15.inference))  # and the target network
    assert costs.row_bytes == 2 * 4 * 64 * 64 * 4 + 8 + 8 + 4 + 1 + 8 + 8


def test_rounds_of_progressive_distillation_cost_what_their_passes_do():
    """At t = 1 nothing is asked, and the lowest state is not left: K - 1 stages for K states. A student is unguided."""
    pd = {"type": "pd", "teacher_steps": 16, "student_steps": [4, 2]}
    costs = declared_costs(objective=pd, states={"forward": 0.0, "student": 0.5, "teacher": 0.5})
    first, second = costs.phases
    each = 16 * SD15.inference
    assert first.state_s[Origin.STUDENT] == pytest.approx([3 / 4 * each] * 5)
    assert first.state_s[Origin.TEACHER] == pytest.approx([3 / 4 * 4 * 2 * each] * 5)
    assert second.state_s[Origin.TEACHER] == pytest.approx([1 / 2 * 2 * each] * 5)
    assert first.label_s[Origin.STUDENT] == pytest.approx(4 * 2 * each)
    assert second.label_s[Origin.STUDENT] == pytest.approx(2 * each)
    assert costs.update_s == pytest.approx(8 * TRAINED)


def test_distribution_matching_asks_in_the_trainer():
    """Always: the student's samples, generated rows through the critic, and real ones through half of it.

    Every fifth time, the student's: its way back, a guided teacher, the fake score, and half of the critic.
    """
    costs = declared_costs(
        objective={"type": "dmd2", "student_every": 5, "gan_weight": 1e-3}, tracking={"log_every": 10}
    )
    assert set(costs.phases[0].label_s.values()) == {0.0}
    critic = TRAINED + TRAINED / 2
    student_turn = TRAINED + 3 * SD15.inference + TRAINED / 2 + critic
    other_turn = SD15.inference + critic
    assert costs.update_s == pytest.approx(8 * (student_turn + 4 * other_turn) / 5)


def test_a_ramp_of_the_teachers_chance_moves_the_cost_of_mixed_blocks():
    states = {
        "forward": 0.0,
        "mixed": 1.0,
        "teacher_substeps": 4,
        "mixed_teacher_probability": {"start": 0.0, "end": 1.0},
    }
    mixed = declared_costs(objective={"type": "lcm"}, states=states).phases[0].state_s[Origin.MIXED]
    each = 16 * SD15.inference
    assert (mixed[0], mixed[-1]) == pytest.approx((each, 8 * each))
    assert sorted(mixed) == mixed.tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Overrides that give a preset of Stable Diffusion a tiny pipeline and data for it."""
    folder = tmp_path_factory.mktemp("sd")
    teacher = save_pipeline("stable_diffusion", folder)
    return [f"teacher.model={teacher}", f"data.source={prepared(teacher, folder / 'data')}", "trainer.batch_size=4",
            "trainer.optimizer=adamw", "evaluation.enabled=false", "tracking.log_every=10"]  # fmt: skip


def test_operations_of_real_networks_are_counted_without_computing_them(tiny):
    """LCM on a network of F operations: forward and back 3 F, once more forward for checkpointing, and the target's F.

    The way back has no gradient for what enters the network, so it is a little less.
    """
    recipe = Recipe(load_config("sd15/lcm", tiny))
    made = recipe.ingredients()
    of_teacher, of_student = count_forward(recipe, made)
    unit = Accelerator(half=1e-12, full=1e-12)  # an operation per second
    costs = counted(recipe, made, dict.fromkeys(ROLES, unit))
    assert of_student / of_teacher == pytest.approx(1.0, rel=0.01)  # told its guidance
    assert costs.phases[0].label_s[Origin.FORWARD] == pytest.approx(32 * 2 * of_teacher / 0.40)
    assert costs.phases[0].state_s[Origin.STUDENT] == pytest.approx([32 * of_student / 0.40] * 5)
    trained = (costs.update_s / (4 * of_student) - 1 / 0.40) * 0.28
    assert 3.4 < trained <= 4.0
    assert counted(recipe, made, dict.fromkeys(ROLES, ACCELERATORS["A100"])).update_s == pytest.approx(
        costs.update_s / 312e12
    )


def counted_on(accelerators, **changes):
    """(costs, operations of a row of the teacher, of the student) of a small run, half of teacher states."""
    plain = Recipe(small_run(states=TEACHER))
    made, recipe = plain.ingredients(), Recipe(small_run(**{"states": TEACHER, **changes}))
    return counted(recipe, made, accelerators), *count_forward(plain, made)


@pytest.mark.parametrize(
    ("changes", "rollouts", "labels"),
    [
        ({}, ("fp32", "fp32"), ("fp32", "fp32")),
        ({"teacher": {"dtype": "bf16"}}, ("bf16", "fp32"), ("bf16", "fp32")),
        ({"teacher": {"dtype": "bf16"}, "labels": {"precision": "fp16"}}, ("bf16", "fp32"), ("bf16", "fp16")),
        ({"teacher_rollouts": {"precision": "bf16"}}, ("bf16", "bf16"), ("fp32", "fp32")),
        ({"trainer": {"precision": "bf16"}, "labels": {"precision": "fp32"}}, ("bf16", "bf16"), ("fp32", "fp32")),
    ],
)
def test_a_teacher_runs_in_its_own_dtype_and_other_networks_in_the_precision_of_the_work(changes, rollouts, labels):
    config = small_run(**changes)
    assert _precisions(config, "teacher_rollouts") == rollouts
    assert _precisions(config, "labels") == labels


def test_what_half_precision_gains_is_counted_once():
    """It is 16 times as fast on an A100, whether the teacher's weights, its labels' precision, or both are halves."""
    a100 = dict.fromkeys(ROLES, ACCELERATORS["A100"])
    halves = {"teacher": {"dtype": "bf16"}, "labels": {"precision": "bf16"}}
    costs, of_teacher, _ = counted_on(a100, **halves)
    assert costs.phases[0].label_s[Origin.TEACHER] == pytest.approx(16 * 2 * of_teacher / (312e12 * 0.40))


def test_every_role_has_its_own_device_and_every_network_there_its_own_precision():
    """Rollouts are made and labelled on a device ten times as fast, by students of fp32 and a teacher of bf16."""
    slow, fast = Accelerator(half=2e-12, full=1e-12), Accelerator(half=20e-12, full=10e-12)
    on = {**dict.fromkeys(ROLES, slow), "student_rollouts": fast}
    costs, of_teacher, of_student = counted_on(
        on, states={"forward": 0.5, "student": 0.5}, teacher={"dtype": "bf16"}, labels={"precision": "fp32"}
    )
    (phase,) = costs.phases
    assert phase.state_s[Origin.STUDENT] == pytest.approx([16 * of_student / (10 * 0.40)] * 5)
    assert phase.label_s[Origin.STUDENT] == pytest.approx(16 * 2 * of_teacher / (20 * 0.40))
    assert phase.label_s[Origin.FORWARD] == pytest.approx(16 * 2 * of_teacher / (2 * 0.40))


def test_labels_of_a_pool_are_counted_on_its_device():
    slow, fast = Accelerator(half=2e-12, full=1e-12), Accelerator(half=20e-12, full=10e-12)
    costs, of_teacher, _ = counted_on({**dict.fromkeys(ROLES, slow), "labels": fast}, labels={"placement": "pool"})
    assert costs.phases[0].label_s[Origin.FORWARD] == pytest.approx(16 * 2 * of_teacher / (10 * 0.40))


def test_an_elastic_trainer_is_counted_with_as_many_workers_as_may_be():
    unit = dict.fromkeys(ROLES, Accelerator(half=1e-12, full=1e-12))
    two, elastic, one = (counted_on(unit, trainer={"num_workers": n})[0] for n in (2, (1, 2), 1))
    assert elastic.update_s == pytest.approx(two.update_s)
    assert one.update_s == pytest.approx(2 * two.update_s, rel=0.01)


def test_stages_are_timed_by_the_clock():
    """A simulated teacher at a speed of seconds sleeps, and the rest of the work comes on top."""
    recipe = Recipe(small_run(**{**SIMULATED, "states": {"forward": 0.0, "student": 1.0}}))
    made = recipe.ingredients()
    slept, found = declared(recipe, made), measured(recipe, made)
    assert found.update_s > slept.update_s
    assert found.phases[0].state_s[Origin.STUDENT][0] > slept.phases[0].state_s[Origin.STUDENT][0]
    assert found.phases[0].label_s[Origin.STUDENT] > slept.phases[0].label_s[Origin.STUDENT]
