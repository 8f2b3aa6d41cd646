"""Pins the whole way of every family: a pipeline of diffusers, distilled on prepared data, is one again.

What plain diffusers then samples, with nothing set but what the model card says, is what our own sampler gives.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from preparing import prepared
from prompted import walked
from tiny import PIPELINES, PROMPTS, save_pipeline

from ddil_ray.config import RunConfig
from ddil_ray.diffusion.denoiser import guidance_scale_from_w
from ddil_ray.diffusion.threshold import NoThreshold
from ddil_ray.evaluation import exported_sampler, student_samplers
from ddil_ray.models import Family, load_model
from ddil_ray.results import export_students
from ddil_ray.runtime.run import distill
from ddil_ray.states.batch import Origin
from ddil_ray.states.source import StateRequest
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.producer import Expert, StateMaker
from ddil_ray.training.recipe import Recipe

OBJECTIVES = {
    "pd": {"type": "pd", "teacher_steps": 16, "student_steps": [8, 4]},
    "lcm": {"type": "lcm", "solver_steps": 20, "student_steps": 4},
    "dmd2": {"type": "dmd2", "student_steps": 4, "student_every": 2},
}
STEPS = 4
CONDITIONS = [0, 3, 1]


@pytest.fixture(scope="module", params=PIPELINES)
def family(request, tmp_path_factory):
    """A teacher's folder, and data prepared for it."""
    return _made(request.param, tmp_path_factory.mktemp(request.param))


def _made(name, folder):
    teacher = save_pipeline(name, folder)
    return str(teacher), prepared(teacher, folder / "data")


def _config(family, objective, *, output="runs"):
    """A run of a few updates; students of consistency distillation are told guidance wherever their family can be."""
    teacher, data = family
    model = load_model(teacher)
    told = objective == "lcm" and type(model.family).with_guidance_embedding is not Family.with_guidance_embedding
    role = {"batch_size": 8}
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "output": str(output),
            "teacher": {"model": teacher, "guidance": [1.0, 3.0] if told else 2.0},
            "data": {"source": data},
            "objective": OBJECTIVES[objective] | ({"guidance_embedding": True} if told else {}),
            "states": {"forward": 0.5, "student": 0.25, "teacher": 0.25},
            "trainer": {"steps": 4, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.0},
            "forward_states": role,
            "student_rollouts": role,
            "teacher_rollouts": role,
            "sync": {"every": 2},
            "tracking": {"tracker": "none", "log_every": 2},
            "evaluation": {"enabled": False},
            "shift": {"enabled": False},
        }
    )


def _theirs(folder, student, w):
    """Images (B, 3, H, W) in [0, 1] by plain diffusers, called as the model card says, and the timesteps it took."""
    (arguments,) = re.findall(r"pipeline\((.*), generator=", (folder / "README.md").read_text())
    call = eval(f"dict({arguments})")
    assert call["num_inference_steps"] == STEPS
    asked = {"prompt": [PROMPTS[i] for i in CONDITIONS], "class_labels": CONDITIONS}
    call |= {name: value for name, value in asked.items() if name in call}
    if student.reads_guidance:
        call["guidance_scale"] = guidance_scale_from_w(w)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(5)  # not every pipeline hands its generator on to the scheduler
    return pipeline(**call, output_type="pt").images, pipeline.scheduler.timesteps


def _ours(sampler, model):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(len(CONDITIONS), *model.sample_shape, generator=generator)
    packed = model.family.name == "flux"
    latents = walked(sampler, noise, torch.tensor(CONDITIONS), generator, packed=packed)
    return (sampler.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


def _check_student(recipe, made, folder, rounds=None):
    """The exported student is not the teacher any more, and samples in plain diffusers as it does here."""
    exported, w = load_model(str(folder)), recipe.student_guidance
    exported.bind(made.prompts.bank() if made.prompts else None)
    images, timesteps = _theirs(folder, exported, w)
    times = made.objective.sampling_times(STEPS)[:-1]
    torch.testing.assert_close(timesteps.float(), made.teacher.schedule.network_time(times), rtol=0, atol=1e-3)
    samplers = [exported_sampler(exported, STEPS, w=w if exported.reads_guidance else 0.0)]
    if rounds is not None:
        samplers.append(student_samplers(made.objective, rounds, [STEPS], w=w)[STEPS])
    for sampler in samplers:
        ours = _ours(sampler, made.teacher)
        torch.testing.assert_close(ours, images, rtol=0, atol=1e-5)
    student = exported.network.state_dict()
    moved = [not torch.equal(student[name], before) for name, before in made.teacher.network.state_dict().items()]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_distilled_pipeline_samples_in_plain_diffusers_as_here(tmp_path, family, objective):
    recipe = Recipe(_config(family, objective))
    made = recipe.ingredients()
    result = distill_inline(recipe, teacher=made.teacher, data=made.data)
    export_students(recipe, made, result.rounds, tmp_path)
    _check_student(recipe, made, tmp_path / "student", result.rounds)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_pipeline_distilled_on_ray_samples_in_plain_diffusers_as_here(run_dir, family, objective):
    recipe = Recipe(_config(family, objective, output=run_dir))
    result = distill(recipe.config)
    _check_student(recipe, recipe.ingredients(), Path(result.folder) / "student")


def test_a_state_is_its_latents_and_less_than_200_bytes(tmp_path):
    """Of float32 latents and label each; the prompt is an id, whose embeddings would be more."""
    recipe = Recipe(_config(_made("sdxl", tmp_path), "lcm"))
    made = recipe.ingredients()
    teacher, objective = made.teacher, made.objective
    expert = Expert(teacher, teacher.copy(), NoThreshold())
    conditions = recipe.conditions(made.data)
    maker = StateMaker(objective, teacher, conditions, student=recipe.student_of(teacher), expert=expert)
    states = expert.label(objective, maker.make(StateRequest(Origin.STUDENT, 0, 0, 8, 0)), "cpu")
    sizes = {name: column.nbytes / len(states) for name, column in states.to_columns().items()}
    assert sizes.pop("x_t") == sizes.pop("label") == 4 * math.prod(teacher.sample_shape)
    assert sum(sizes.values()) < 200
    embedded = made.data.prompts.rows([0])
    assert sum(rows.nbytes for rows in embedded.values()) > 1000
