"""Pins estimates of memory to what torch's allocator reports of the same work, on tiny networks."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from latent import latent_data, latent_model, learner_of, maker_of, request_of, rows_of
from peak import peak_bytes
from runs import DMD2, PD, THREE_SOURCES, small_run

from ddil_ray.evaluation.samplers import teacher_sampler
from ddil_ray.models import load_model
from ddil_ray.models.latents import LatentCodec
from ddil_ray.states.batch import Origin
from ddil_ray.training.memory import ImaginedRole, estimate, imagined_learner, shared_bytes
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.shift import ShiftMeter

ROWS = 256
COPIES_HALVES = torch.backends.cpu.get_cpu_capability() != "AVX512"
WHY = "without AVX-512 torch computes in halves by way of float32 copies, which are not counted"
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
    batch, seed = rows_of(recipe, made, recipe.config.trainer.batch_size), torch.Generator().manual_seed(0)

    def prepare():
        learner, copied = learner_of(recipe, made), batch[torch.arange(len(batch))]
        learner.update(copied, seed)
        return learner, copied

    return peak_bytes(prepare, lambda ready: ready[0].update(ready[1], seed))


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


@pytest.mark.parametrize(
    "objective", ["lcm", *(pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES if name != "lcm")]
)
@pytest.mark.parametrize("name", ["latent", pytest.param("digits", marks=pytest.mark.slow)])
def test_every_role_takes_what_was_estimated(given, name, objective):
    recipe, made = made_of(given, name, objective)
    found = estimate(recipe, made)
    assert_close(found["trainer"], measured_update(recipe, made))
    assert_close(found["student_rollouts"], measured_states(recipe, made, Origin.STUDENT, acts=True, asked=False))
    assert_close(found["teacher_rollouts"], measured_states(recipe, made, Origin.TEACHER, acts=False))
    if not made.objective.asks_in_trainer:  # else labels are empty
        assert_close(found["labels (forward)"], measured_labels(recipe, made))


@pytest.mark.parametrize(
    "trainer",
    [
        {"gradient_checkpointing": True},
        {"batch_size": 1},
        {"batch_size": 1, "optimizer": "adamw_8bit"},
        pytest.param({"accumulate": 4}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, marks=[pytest.mark.slow, pytest.mark.skipif(COPIES_HALVES, reason=WHY)]),
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_estimates_follow_the_switches(given, trainer):
    """Of one row the weights' part is the larger one: gradients, moments, what a step of Adam needs beside them."""
    if "optimizer" in trainer:
        pytest.importorskip("bitsandbytes")
    recipe, made = made_of(given, "digits", "pd", states={"forward": 1.0}, trainer=trainer)
    assert_close(estimate(recipe, made)["trainer"], measured_update(recipe, made))


def test_workers_that_keep_parts_are_estimated_so(given):
    """Of what grows with the network; the batch is theirs to share in either way."""
    ways = {"trainer": {"num_workers": 4}}, {"trainer": {"num_workers": 4, "parallel": "fsdp"}}
    whole, parts = (estimate(*made_of(given, "digits", "dmd2", **way))["trainer"].parts for way in ways)
    assert whole.keys() == parts.keys()
    for name in ("student", "teacher", "critic", "average", "optimizer"):
        assert parts[name] == pytest.approx(whole[name] / 4, rel=1e-3)
    for name in ("activations", "states"):
        assert parts[name] == whole[name]


def test_a_teacher_in_halves_is_estimated_so(given):
    recipe, made = made_of(given, "latent", "lcm", states={"forward": 1.0}, teacher={"dtype": "bf16"})
    found = estimate(recipe, made)["labels (forward)"]
    weights = sum(p.numel() * p.element_size() for p in made.teacher.network.parameters())
    assert found.parts["teacher"] == weights / 2
    if COPIES_HALVES:
        pytest.skip(WHY)
    assert_close(found, measured_labels(recipe, made))


@pytest.mark.slow
def test_measuring_and_sampling_take_what_was_estimated(given):
    shift, evaluation = {"enabled": True, "num_samples": ROWS}, {"num_samples": ROWS, "batch_size": ROWS, "steps": [2]}
    recipe, made = made_of(
        given, "latent", "lcm", states={"forward": 1.0}, shift=shift, evaluation={"enabled": True, **evaluation}
    )
    found = estimate(recipe, made)

    def meter():
        maker = maker_of(recipe, made)
        return ShiftMeter(
            recipe, made.objective, maker.student, images=made.data.images, conditions=maker.conditions
        ), maker.expert.denoiser

    assert_close(found["shift"], peak_bytes(meter, lambda m: m[0].probe.start(made.objective.phases[0], m[1])))

    def sampler():
        model = made.teacher.copy()
        codec = LatentCodec(copy.deepcopy(model.codec.vae))
        kept = made.teacher.copy()  # the student, which waits its turn
        return replace(teacher_sampler(model.expert(guided=True), model, 2, w=1.0), codec=codec), kept

    noise, cond = torch.randn(ROWS, *made.teacher.sample_shape), made.data.labels[:ROWS]
    assert_close(found["evaluation"], peak_bytes(sampler, lambda s: s[0](noise, cond)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_is_told_from_the_memory_beside_it(given, checkpointing):
    """Autocast keeps norms in float32 there, and buffers of states and prompts stay with the CPU."""
    trainer = {"precision": "bf16", "gradient_checkpointing": checkpointing}
    recipe, made = made_of(given, "latent", "pd", states={"forward": 1.0}, trainer=trainer)
    cpu, gpu = (estimate(recipe, made, on_gpu=names)["trainer"] for names in ((), ("trainer",)))
    assert gpu.parts["activations"] > 1.2 * cpu.parts["activations"]
    assert (gpu.device_bytes, gpu.host_bytes) == (sum(gpu.parts.values()), sum(gpu.host.values()))
    assert (cpu.device_bytes, cpu.host_bytes) == (sum({**cpu.parts, **cpu.host}.values()), 0)
    assert set(gpu.host) == {"replay", "prompts", "publications"}
    weights = sum(p.numel() for p in made.teacher.network.parameters()) * 4
    assert (cpu.host["publications"], gpu.host["publications"], gpu.parts["publication"]) == (
        2 * weights,
        weights,
        weights,
    )


@pytest.mark.parametrize(("objective", "teachers"), [("pd", 2), ("lcm", 0)])
def test_the_object_store_holds_data_versions_of_what_is_trained_and_blocks(given, objective, teachers):
    """Of one source: those that its actor and a labeller are at, those that may lie ready, and one that is taken."""
    settings = {"states": {"forward": 1.0}, "replay": {"ahead": 3}, "sync": {"dtype": "bf16"}}
    recipe, made = made_of(given, "latent", objective, **settings)
    generator = torch.get_rng_state()
    shared = shared_bytes(recipe, made)
    weights = sum(p.numel() for p in made.teacher.network.parameters())
    assert shared == {
        "data": 2 * ROWS * (4 * 8 * 8 * 4 + 8),
        "published weights": 4 * 2 * weights + teachers * 4 * weights,
        "blocks": (2 + 3 + 1) * ROWS * (2 * 4 * 8 * 8 * 4 + 50),
    }
    assert torch.equal(torch.get_rng_state(), generator)


def test_adapters_alone_take_room_in_the_object_store(given):
    student = {"lora": {"rank": 2}}
    whole, adapters = (
        shared_bytes(*made_of(given, "latent", "lcm", **changes))["published weights"]
        for changes in ({}, {"student": student})
    )
    assert adapters < whole / 5


def test_an_estimate_leaves_the_run_as_it_was(given):
    recipe, made = made_of(given, "digits", "dmd2")
    before, state = dict(vars(made.objective)), torch.get_rng_state()
    estimate(recipe, made)
    assert vars(made.objective) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(type(p) is torch.nn.Parameter for p in made.teacher.network.parameters())


def test_a_threshold_is_calibrated_on_samples_that_are_real(given):
    """Distribution matching asks the thresholded teacher in the trainer, of which no other tensor is."""
    recipe, made = made_of(given, "digits", "dmd2", threshold={"mode": "per_channel"})
    learner, batch = imagined_learner(ImaginedRole(recipe, made, gpu=False))
    assert len(batch) == recipe.config.trainer.batch_size
    assert learner.objective.critic is not None
