"""Pins how a config becomes the parts of a run."""

from __future__ import annotations

import pytest
import torch
from latent import latent_data, latent_model
from runs import DMD2, PD, small_run

from ddil_ray.diffusion.threshold import NoThreshold, StaticThreshold
from ddil_ray.errors import ConfigError
from ddil_ray.training.checks import check_threshold
from ddil_ray.training.parallel import Alone
from ddil_ray.training.recipe import Recipe

LCM = {"type": "lcm", "solver_steps": 10, "student_steps": 2}
NONE, CLIP = NoThreshold(), StaticThreshold(0.5)


@pytest.mark.parametrize(
    ("objective", "applies_to", "teacher", "target"),
    [
        (PD, None, CLIP, NONE),
        (LCM, None, CLIP, NONE),
        (DMD2, None, CLIP, CLIP),
        (PD, "target", NONE, CLIP),
        (LCM, "both", CLIP, CLIP),
        (DMD2, "teacher", CLIP, NONE),
    ],
)
def test_thresholds_go_where_they_are_said_to(objective, applies_to, teacher, target):
    threshold = {"mode": "static", "bound": 0.5, "applies_to": applies_to}
    made = Recipe(small_run(objective=objective, threshold=threshold)).ingredients()
    assert made.threshold == teacher
    assert made.objective.threshold == target


@pytest.mark.parametrize("objective", [PD, LCM])
def test_a_threshold_of_the_target_changes_what_the_student_learns(objective):
    """On the same states: PD's label, and LCM's target, come from clipped estimates."""
    from ddil_ray.states.batch import Origin
    from ddil_ray.states.source import SourceContext, StateRequest, make_states

    losses = []
    for mode in ("none", "static"):
        threshold = {"mode": mode, "bound": 0.05, "applies_to": "target"}
        recipe = Recipe(small_run(objective=objective, threshold=threshold))
        made = recipe.ingredients()
        phase, conditions = made.objective.phases[0], recipe.conditions(made.data)
        context = SourceContext(made.teacher.schedule, (1, 8, 8), conditions, images=made.data.images)
        states = make_states(context, phase, StateRequest(Origin.FORWARD, 0, 0, 16, 0), version=-1)
        with torch.no_grad():
            states = states.labelled(made.objective.label(made.expert(), states, phase))
        student = recipe.student_of(made.teacher)
        made.objective.start(student.network, phase, Alone())
        losses.append(float(made.objective.loss(student.denoiser(), states, phase).per_row.mean()))
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(None, "none is known for this student"), ("insid", r"but is 'insid' instead. The closest are inside")],
)
def test_a_discriminator_reads_a_layer_that_is_there(layer, expected):
    with pytest.raises(ConfigError, match=expected):
        Recipe(small_run(objective={**DMD2, "gan_layer": layer})).ingredients()


def test_the_bottleneck_of_a_known_family_needs_no_name():
    config = small_run(objective={**DMD2, "gan_layer": None}, teacher={"model": "builtin:digits"})
    assert Recipe(config).ingredients().objective.gan_layer == "denoiser.mid_block"


def test_no_discriminator_needs_no_layer():
    made = Recipe(small_run(objective={**DMD2, "gan_layer": None, "gan_weight": 0})).ingredients()
    assert made.objective.gan_layer is None


@pytest.mark.parametrize("layer", ["denoiser.down_blocks", "denoiser.mid_block.attentions"])
def test_a_submodule_without_features_is_refused_before_anything_starts(layer):
    config = small_run(objective={**DMD2, "gan_layer": layer}, teacher={"model": "builtin:digits"})
    with pytest.raises(ConfigError, match=f"called with every image .*'{layer}' does not"):
        Recipe(config).ingredients()


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (
            {**DMD2, "student_steps": 3, "gan_weight": 0},
            r"`objective.student_steps` must divide .*is 3 .*below is 2",
        ),
        (
            {**LCM, "sigma_data": 1.0},
            r"`objective.sigma_data` must be 0.5 .*LCMScheduler knows no other, but is 1 instead",
        ),
        ({**LCM, "solver_steps": 30}, r"`objective.solver_steps` must divide .*but is 30 instead.*below is 25"),
    ],
)
def test_grids_that_diffusers_would_round_are_refused(objective, expected):
    config = small_run(objective=objective, teacher={"model": "builtin:digits"}, evaluation={"steps": [1]})
    with pytest.raises(ConfigError, match=expected):
        Recipe(config).ingredients()


@pytest.mark.parametrize(
    ("teacher", "chosen", "expected"),
    [
        ({}, 0.0, (0.0, 0.0)),
        ({"guidance": 2.0}, 2.0, (2.0, 2.0)),
        ({"guidance": [1.0, 7.0], "guidance_convention": "scale"}, 3.0, (0.0, 6.0)),
    ],
)
def test_guidance_is_w_whatever_the_convention(teacher, chosen, expected):
    objective = {"type": "lcm", "guidance_embedding": True}
    config = small_run(teacher={"guidance": None, **teacher}, objective=objective, student={"guidance": chosen})
    assert Recipe(config).guidance == expected
    assert Recipe(config).student_guidance == chosen - ("guidance_convention" in teacher)


def test_a_scale_below_one_is_refused():
    with pytest.raises(ValueError, match=r"at least 1 where guidance_convention is scale, but is 0.5"):
        small_run(teacher={"guidance": 0.5, "guidance_convention": "scale"})


@pytest.mark.parametrize("guidance", [1.0, 4.0, 0.0])
def test_a_student_is_not_said_to_have_guidance_that_it_was_not_trained_at(guidance):
    objective = {"type": "lcm", "guidance_embedding": True}
    ranged = small_run(teacher={"guidance": [2.0, 3.0]}, objective=objective, student={"guidance": guidance})
    with pytest.raises(
        ConfigError, match=rf"`student.guidance` must be .*\(2.0, 3.0\), .* but is {guidance:g} instead"
    ):
        Recipe(ranged).ingredients()
    fixed = small_run(teacher={"guidance": 2.0}, student={"guidance": 3.0})
    with pytest.raises(ConfigError, match=r"`student.guidance` must be .* 2.0, .* but is 3 instead"):
        Recipe(fixed).ingredients()
    right = small_run(teacher={"guidance": 2.0, "guidance_convention": "scale"}, student={"guidance": 2.0})
    assert Recipe(right).ingredients()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"evaluation": {"enabled": True, "teacher_steps": 1001}},
            "`evaluation.teacher_steps` must be at most the",
        ),
        (
            {"evaluation": {"enabled": True, "steps": [2, 1001]}},
            "`evaluation.steps` must be at most the 1000",
        ),
        ({"objective": {**PD, "teacher_steps": 1024}}, "`objective.teacher_steps` must be at most the 1000 timesteps"),
    ],
)
def test_more_steps_than_the_teacher_has_timesteps_are_refused(changes, expected):
    config = small_run(**{"objective": PD, "teacher": {"model": "builtin:digits"}, **changes})
    with pytest.raises(ConfigError, match=expected):
        Recipe(config).ingredients()


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ({"weights": "/nowhere.safetensors"}, "`teacher.weights` must be left out for a pipeline.*nowhere"),
        ({"guidance": None, "guidance_rescale": 0.7}, "`teacher.guidance_rescale` must be 0 .* not guided, but is 0.7"),
        ({"negative_prompt": "rain"}, "`teacher.negative_prompt` must be left out .* not asked by text, but is 'rain'"),
    ],
)
def test_settings_that_would_not_be_heeded_are_refused(teacher, expected):
    with pytest.raises(ConfigError, match=expected):
        Recipe(small_run(teacher={"model": "builtin:digits", **teacher})).load_teacher()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_the_range_of_pixels_is_not_put_on_latents(tmp_path, mode):
    model = latent_model(tmp_path)
    threshold = {"mode": mode}
    with pytest.raises(ConfigError, match=rf"`threshold.bound` must be set where `threshold.mode` is {mode} and"):
        Recipe(small_run(threshold=threshold)).ingredients(teacher=model, data=latent_data(model))
    check_threshold(small_run(threshold={**threshold, "bound": 4.0}), model)
    check_threshold(small_run(threshold={"mode": "per_channel"}), model)
    Recipe(small_run(threshold=threshold)).ingredients()  # of pixels
