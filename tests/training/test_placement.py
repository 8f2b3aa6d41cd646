"""Pins the switches of memory and speed: they change neither what is computed nor what weights are called."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from latent import latent_data, latent_model, learner_of, maker_of, request_of, rows_of
from runs import DMD2, PD, small_run

from ddil_ray.errors import ConfigError
from ddil_ray.models import load_model
from ddil_ray.models.perceptron import digits_teacher
from ddil_ray.states.batch import Origin
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.learner import Learner
from ddil_ray.training.optimizer import OptimizerSettings
from ddil_ray.training.placement import check_placement, trained
from ddil_ray.training.recipe import Recipe

LCM = {"type": "lcm", "solver_steps": 10, "student_steps": 2}
OBJECTIVES = {"pd": PD, "lcm": LCM, "dmd2": DMD2 | {"gan_layer": None}}
INNER = DMD2 | {"gan_layer": "denoiser.mid_block.resnets.1"}


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """(teacher, data) of a tiny latent pipeline."""
    model = latent_model(tmp_path_factory.mktemp("latent"))
    return model, latent_data(model)


def ingredients(latent, objective, **changes):
    recipe = Recipe(small_run(objective=objective, **changes))
    return recipe, recipe.ingredients(teacher=latent[0].copy(), data=latent[1])


def gradients(latent, objective, **trainer):
    """Of everything that is trained, after one update."""
    recipe, made = ingredients(latent, objective, trainer=trainer)
    learner = learner_of(recipe, made)
    learner.update(rows_of(recipe, made, 16), torch.Generator().manual_seed(0))
    networks = [learner.student.network, *([made.objective.critic] if made.objective.critic else [])]
    return {f"{i}.{n}": p.grad for i, network in enumerate(networks) for n, p in network.named_parameters()}


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), INNER], ids=[*OBJECTIVES, "layer inside a block"])
def test_gradient_checkpointing_gives_the_same_gradients(latent, objective):
    plain, checkpointed = (gradients(latent, objective, gradient_checkpointing=on) for on in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        *((name, {"channels_last": True}) for name in OBJECTIVES),
        pytest.param("lcm", {"compile": "eager"}, marks=pytest.mark.slow),
    ],
)
def test_layout_and_compilation_change_neither_losses_nor_names(latent, name, switch):
    """Adam's first updates are signs of gradients, which rounding may turn: a small rate keeps that out of losses."""
    settings = {"objective": OBJECTIVES[name], "states": {"forward": 0.5, "student": 0.5}, "tracking": {"log_every": 2}}
    teacher, data = latent
    plain, switched = (
        distill_inline(
            Recipe(small_run(**settings, trainer={"steps": 4, "lr": 1e-4, **t})), teacher=teacher.copy(), data=data
        )
        for t in ({}, switch)
    )
    losses = [torch.tensor([r["loss"] for r in result.records]) for result in (plain, switched)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for steps, model in plain.rounds.items():
        found, expected = switched.rounds[steps].network.state_dict(), model.network.state_dict()
        assert list(found) == list(expected)
        assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_layout_changes_no_gradient(latent, objective):
    plain, switched = (gradients(latent, objective, channels_last=on) for on in (False, True))
    assert plain.keys() == switched.keys()
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(switched[name], gradient, rtol=0, atol=max(1e-4 * scale, 1e-6))


def test_convolutions_compute_with_channels_innermost(latent):
    recipe, made = ingredients(latent, PD, trainer={"channels_last": True})
    student = trained(recipe.student_of(made.teacher), recipe.config, "cpu")
    seen = []
    student.network.denoiser.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    student.network(torch.randn(2, 4, 8, 8), torch.zeros(2), torch.arange(2), torch.zeros(2))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("objective", [PD, LCM, DMD2 | {"gan_layer": "blocks.1"}], ids=OBJECTIVES)
def test_compiled_networks_learn_as_others_and_so_do_the_copies_that_a_method_makes(objective):
    """Torch's own copies are not compiled."""
    updates = []
    for compiled in (False, "eager"):
        recipe = Recipe(small_run(objective=objective, trainer={"compile": compiled}))
        made = recipe.ingredients(teacher=digits_teacher())
        learner = learner_of(recipe, made)
        metrics = learner.update(rows_of(recipe, made, 16), torch.Generator().manual_seed(0))
        updates.append({name: float(value) for name, value in metrics.items()})
        copied = getattr(made.objective.critic, "network", None) or getattr(made.objective, "_target", None)
        for network in (learner.student.network, *([copied] if copied else [])):
            assert (network._compiled_call_impl is not None) == bool(compiled)
    assert updates[1] == pytest.approx(updates[0], rel=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_a_teacher_in_halves_answers_nearly_the_same_from_half_the_memory(latent, dtype, tolerance):
    labels, sizes = [], []
    for kept in ("fp32", dtype):
        recipe, made = ingredients(latent, PD, teacher={"dtype": kept, "guidance": 1.0})
        maker = maker_of(recipe, made)
        states = maker.make(request_of(Origin.FORWARD, 32))
        labels.append(maker.expert.label(made.objective, states, "cpu").label)
        sizes.append(sum(p.numel() * p.element_size() for p in maker.expert.teacher.network.parameters()))
        assert all(p.dtype == torch.float32 for p in maker.student.network.parameters())
    assert sizes[0] == 2 * sizes[1]
    error, scale = (labels[1] - labels[0]).square().mean().sqrt(), labels[0].square().mean().sqrt()
    assert 0 < error < tolerance * scale


def test_a_teacher_in_halves_runs_through(latent):
    teacher, data = latent
    config = small_run(
        objective=OBJECTIVES["dmd2"], teacher={"dtype": "bf16"}, trainer={"steps": 4, "precision": "bf16"}
    )
    assert distill_inline(Recipe(config), teacher=teacher.copy(), data=data).records


def test_an_expert_that_nobody_asks_takes_no_memory(latent):
    recipe, made = ingredients(latent, PD)
    maker = maker_of(recipe, made, asked=False)
    for model in (maker.expert.teacher, maker.expert.student):
        assert {p.device.type for p in model.network.parameters()} == {"meta"}
    assert len(maker.make(request_of(Origin.STUDENT, 16))) == 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainer": {"gradient_checkpointing": True}}, "`trainer.gradient_checkpointing` must be false"),
        ({"trainer": {"channels_last": True}}, "`trainer.channels_last` must be false for a TinyNetwork"),
        ({"teacher": {"dtype": "bf16"}}, "`teacher.dtype` must be fp32"),
    ],
)
def test_what_a_network_cannot_do_is_refused(changes, expected):
    with pytest.raises(ConfigError, match=expected):
        Recipe(small_run(**changes)).ingredients()


def test_networks_of_diffusers_can_all_of_it():
    config = small_run(trainer={"gradient_checkpointing": True, "channels_last": True}, teacher={"dtype": "bf16"})
    check_placement(load_model("builtin:digits"), config)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_optimizer_that_is_not_installed_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"`trainer.optimizer` must be adamw.*pip install"):
        Recipe(small_run(trainer={"optimizer": "adamw_8bit"})).ingredients()


def test_adam_in_8_bits_moves_as_adam_does_and_goes_on_from_its_state():
    pytest.importorskip("bitsandbytes")
    model = load_model("builtin:digits")
    recipe = Recipe(small_run(objective=PD, trainer={"optimizer": "adamw_8bit"}))
    made = recipe.ingredients(teacher=model)
    batch = rows_of(recipe, made, 16)
    runs = {}
    for name in ("adamw", "adamw_8bit"):
        learner = Learner(recipe.student_of(model), made.objective, OptimizerSettings(steps=10, name=name, lr=1e-3))
        runs[name] = [learner.update(batch)["loss"] for _ in range(6)]
    assert runs["adamw_8bit"] == pytest.approx(runs["adamw"], rel=0.05)
    states = learner.optimizers["student"].adam.state.values()
    assert {s["state1"].dtype for s in states if s["state1"].numel() >= 4096} == {torch.uint8}
    kept = copy.deepcopy(learner.state_dict())
    expected = learner.update(batch)["loss"]
    again = Learner(recipe.student_of(model), made.objective, OptimizerSettings(steps=10, name="adamw_8bit", lr=1e-3))
    again.load_state_dict(kept)
    assert again.update(batch)["loss"] == expected
