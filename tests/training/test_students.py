"""Pins students that are not the teacher's copy through every objective, in one process: adapters on it, and models of
their own."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from runs import DMD2, PD, small_run
from worlds import asked, tiny_data, tiny_teacher

from ddil_ray.errors import ConfigError
from ddil_ray.testing import tiny_model
from ddil_ray.trained import trained_parameters, trained_state
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.learner import Learner
from ddil_ray.training.recipe import Recipe
from ddil_ray.training.wire import flatten_weights

LCM = {"type": "lcm", "solver_steps": 10, "student_steps": 2}
OBJECTIVES = {"pd": PD, "lcm": LCM, "dmd2": DMD2}
LORA = {"lora": {"rank": 2, "alpha": 4, "target_modules": ["inside", "outside"]}}
STATES = {"forward": 0.25, "student": 0.25, "teacher": 0.25, "mixed": 0.25}
ADAPTERS = 4 * (2 * (65 + 32) + 2 * (32 + 64))
"""Bytes of the adapters of rank 2 on the tiny model's two linear layers."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_adapters_are_all_that_training_moves(name):
    config = small_run(objective=OBJECTIVES[name], states=STATES, student=LORA, shift={"enabled": True, "every": 8})
    teacher = tiny_model()
    result = distill_inline(Recipe(config), teacher=teacher)
    losses = [r["loss"] for r in result.records if "loss" in r]
    assert all(torch.isfinite(torch.tensor(losses)))
    before = tiny_model().network.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.network.state_dict().items())
    for model in result.rounds.values():
        assert not any(p.requires_grad for p in model.network.parameters())
        assert all(float(p.abs().sum()) > 0 for p in trained_parameters(model.network))
        assert model.network.inside.base_layer.weight is teacher.network.inside.weight


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_published_and_checkpointed_is_adapters(name):
    recipe = Recipe(small_run(objective=OBJECTIVES[name], student=LORA))
    made = recipe.ingredients()
    recipe.equip(made.objective, made.teacher, made.data.images, made.data.labels)
    learner = Learner(recipe.student_of(made.teacher), made.objective, recipe.optimizer_settings())
    learner.finish()
    assert sum(part.nbytes for part in flatten_weights(learner.student.network).values()) == ADAPTERS
    state = learner.state_dict()
    assert _bytes(state["student"]) == _bytes(state["rounds"][made.objective.phases[0].student_steps]) == ADAPTERS
    assert _bytes(state["ema"]) == ADAPTERS + 8  # and the number of updates
    moved = [p for group in learner.optimizers["student"].adam.param_groups for p in group["params"]]
    assert sum(p.numel() * p.element_size() for p in moved) == ADAPTERS
    critic = made.objective.critic
    head = 0 if critic is None else _bytes(critic.head.state_dict())
    assert _bytes(state["objective"]) == {"pd": 0, "lcm": ADAPTERS, "dmd2": ADAPTERS + head}[name]


def _bytes(state):
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(_bytes, state.values())) if isinstance(state, dict) else 0


def test_a_restored_learner_of_adapters_goes_on_as_it_was():
    recipe = Recipe(small_run(objective=PD, student=LORA))
    made = recipe.ingredients()
    a, b = (Learner(recipe.student_of(made.teacher), made.objective, recipe.optimizer_settings()) for _ in range(2))
    for parameter in trained_parameters(a.student.network):
        torch.nn.init.normal_(parameter)
    a.ema.update()
    a.finish()
    b.load_state_dict(a.state_dict())
    for one, other in zip(trained_parameters(a.student.network), trained_parameters(b.student.network), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(b.rounds[4]["inside.lora_B.default.weight"], a.student.network.inside.lora_B.default.weight)


def test_a_round_starts_from_the_averaged_adapters():
    recipe = Recipe(small_run(objective=PD, student=LORA, trainer={"ema_decay": 0.5}))
    made = recipe.ingredients()
    learner = Learner(recipe.student_of(made.teacher), made.objective, recipe.optimizer_settings())
    (first, *_) = trained_parameters(learner.student.network)
    for value in (0.0, 1.0):
        first.data.fill_(value)
        learner.ema.update()
    learner.start(made.objective.phases[1])
    torch.testing.assert_close(first.detach(), torch.full_like(first, 0.5))


def test_an_average_on_the_cpu_is_the_same_average():
    runs = [small_run(trainer={"ema_offload": offload}) for offload in (False, True)]
    kept, offloaded = (trained_state(distill_inline(Recipe(run)).rounds[2].network) for run in runs)
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


@pytest.mark.parametrize("lora", [None, LORA["lora"]], ids=["full", "lora"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_smaller_student_learns_from_its_teacher(name, lora):
    student = {"model": "worlds:narrow_model", "lora": lora}
    config = small_run(objective=OBJECTIVES[name], states=STATES, student=student)
    result = distill_inline(Recipe(config))
    assert all(torch.isfinite(torch.tensor([r["loss"] for r in result.records])))
    for model in result.rounds.values():
        assert model.network.outside.in_features == 16


def test_a_small_latent_student_of_another_prediction_learns_from_prompts(tmp_path):
    """Adapters on a network without a middle block, that predicts v where the teacher predicts epsilon."""
    for part in ("teacher", "student"):
        (tmp_path / part).mkdir()
    teacher = tiny_teacher("stable_diffusion", tmp_path / "teacher")
    folder = tiny_teacher("stable_diffusion", tmp_path / "student", prediction_type="v_prediction").folder
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config({**config, "mid_block_type": None}).save_pretrained(folder / "unet")
    run = small_run(
        teacher={"model": str(teacher.folder), "guidance": 1.0},
        student={"model": str(folder), "lora": {"rank": 2}},
        objective={**DMD2, "gan_layer": None},
        states=STATES,
        trainer={"steps": 3, "batch_size": 8},
        **{role: {"batch_size": 8} for role in ("forward_states", "student_rollouts", "teacher_rollouts")},
        tracking={"log_every": 3},
    )
    data = tiny_data(teacher)
    result = distill_inline(Recipe(run), teacher=teacher, data=data)
    assert all(torch.isfinite(torch.tensor([r["loss"] for r in result.records])))
    (student,) = result.rounds.values()
    assert (student.prediction.value, student.bottleneck) == ("v_prediction", "denoiser.down_blocks.1")
    assert not torch.equal(asked(student), asked(Recipe(run).student_of(teacher)))


def test_a_discriminator_reads_a_layer_of_the_student():
    from_teacher = small_run(objective={**DMD2, "gan_layer": "denoiser.mid_block"})
    with pytest.raises(ConfigError, match=r"submodule of the student's network, but is 'denoiser.mid_block' instead"):
        Recipe(from_teacher).ingredients()


def test_a_student_of_another_world_is_refused_before_anything_starts():
    config = small_run(student={"model": "ddil_ray.models.perceptron:new_model"}, teacher={"model": "builtin:digits"})
    with pytest.raises(ConfigError, match=r"`student.model` must have the teacher's noise schedule"):
        Recipe(config).ingredients()


def test_adapters_are_not_told_guidance():
    objective = {**LCM, "guidance_embedding": True}
    config = small_run(teacher={"model": "builtin:digits"}, student={"lora": {"rank": 2}}, objective=objective)
    with pytest.raises(ConfigError, match=r"`student.lora` must be null for a student that is to be told guidance"):
        Recipe(config).ingredients()
