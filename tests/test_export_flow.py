"""Pins exported students of flow matching: plain diffusers, called as the model card says, samples what we sample."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from prompted import WORDS, walked
from tiny import LATENT, save_pipeline

from ddil_ray.config import RunConfig
from ddil_ray.data import ImageData
from ddil_ray.diffusion.schedule import RectifiedFlow
from ddil_ray.diffusion.timegrid import consistency_grid, uniform_grid
from ddil_ray.evaluation import exported_sampler, student_samplers
from ddil_ray.models import load_model
from ddil_ray.models.flow import flow_scheduler
from ddil_ray.models.flux import pack, unpack
from ddil_ray.prompts import HeldEmbeddings
from ddil_ray.results import export_students
from ddil_ray.training.inline import distill_inline
from ddil_ray.training.recipe import Recipe

SIGMAS = [1.0, 0.76, 0.5, 0.26]
OBJECTIVES = {
    "pd": {"type": "pd", "teacher_steps": 8, "student_steps": [4, 2]},
    "lcm": {"type": "lcm"},
    "lcm-48": {"type": "lcm", "solver_steps": 48},
    "dmd2": {"type": "dmd2", "student_every": 2},
}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {family: save_pipeline(family, root / family) for family in ("sd3", "flux", "flux_schnell")}


def distilled(folder, objective, out, *, guidance=2.5):
    """A student of a few updates, exported to `out`; returns (recipe's ingredients, rounds)."""
    config = RunConfig.model_validate({
        "name": "tiny", "teacher": {"model": str(folder), "guidance": guidance}, "data": {"source": "given"},
        "objective": OBJECTIVES[objective], "states": {"forward": 0.5, "student": 0.5}, "sync": {"every": 2},
        "trainer": {"steps": 2, "batch_size": 4, "lr": 1e-3}, "student_rollouts": {"batch_size": 4},
        "forward_states": {"batch_size": 4}, "tracking": {"tracker": "none"}, "evaluation": {"enabled": False},
        "shift": {"enabled": False},
    })  # fmt: skip
    recipe, teacher = Recipe(config), load_model(str(folder))
    encoder = teacher.family.text_encoder(teacher.folder)
    latents = torch.randn(8, *teacher.sample_shape, generator=torch.Generator().manual_seed(1))
    data = ImageData(
        latents, torch.arange(8) % 3, "latents", HeldEmbeddings(encoder(WORDS)), prepared_for=teacher.family.name
    )
    rounds = distill_inline(recipe, teacher=teacher, data=data).rounds
    made = recipe.ingredients(teacher=teacher, data=data)
    export_students(recipe, made, rounds, out)
    return made, rounds


def card_call(folder):
    """Arguments of the call in the model card, and those of `from_pretrained`."""
    lines = (folder / "README.md").read_text().splitlines()
    call = next(line for line in lines if line.startswith("images = "))
    load = next(line for line in lines if line.startswith("pipeline = "))
    arguments = call.removeprefix("images = pipeline(").removesuffix(", generator=torch.manual_seed(0)).images")
    return eval(f"dict({arguments})"), eval(load.replace("DiffusionPipeline.from_pretrained(", "dict(folder=")[11:])


def theirs(folder, noise):
    call, load = card_call(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, **{k: v for k, v in load.items() if k != "folder"})
    pipeline.set_progress_bar_config(disable=True)
    packed = isinstance(pipeline, FluxPipeline)
    torch.manual_seed(5)  # the pipelines give their schedulers no generator
    samples = pipeline(
        **{**call, "prompt": WORDS}, latents=pack(noise) if packed else noise, output_type="latent"
    ).images  # fmt: skip
    return unpack(samples, *noise.shape[2:]) if packed else samples


@pytest.mark.parametrize("family", ["sd3", "flux", "flux_schnell"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_diffusers_samples_what_we_sample(tmp_path, teachers, family, objective, caplog):
    made, rounds = distilled(teachers[family], objective, tmp_path)
    noise = torch.randn(3, 16, LATENT, LATENT, generator=torch.Generator().manual_seed(3))
    for steps, model in rounds.items():
        folder = tmp_path / ("student" if steps == list(rounds)[-1] else f"rounds/{steps}-steps")
        caplog.clear()
        expected = theirs(folder, noise)
        assert "not expected" not in caplog.text
        exported = load_model(str(folder))
        exported.bind(made.prompts.bank())
        assert exported.schedule == made.teacher.schedule
        told = 2.5 if exported.reads_guidance else 0.0
        samplers = (
            student_samplers(made.objective, {steps: model}, [steps], w=told)[steps],
            exported_sampler(exported, steps, w=told),
        )
        for sampler in samplers:
            assert len(sampler.times) == steps + 1
            generator = torch.Generator().manual_seed(5)
            found = walked(sampler, noise, torch.arange(3), generator, packed=family != "sd3")
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "objective", "said", "note"),
    [
        ("sd3", "pd", "num_inference_steps=2, height=16, width=16, guidance_scale=1", "pass no `sigmas`"),
        ("sd3", "lcm", f"sigmas={SIGMAS}, height=16, width=16, guidance_scale=1", "Always pass `sigmas`"),
        ("flux", "lcm", f"sigmas={SIGMAS}, height=16, width=16, guidance_scale=3.5", "Always pass `sigmas`"),
        ("flux", "dmd2", "num_inference_steps=4, height=16, width=16, guidance_scale=3.5", "by itself"),
    ],
)
def test_a_card_says_how_to_call_the_pipeline(tmp_path, teachers, family, objective, said, note):
    distilled(teachers[family], objective, tmp_path)
    card = (tmp_path / "student" / "README.md").read_text()
    assert f'pipeline(prompt="a photo", {said}, ' in card
    assert note in card


def test_a_student_without_t5_is_loaded_as_its_card_says(tmp_path):
    folder = save_pipeline("sd3", tmp_path, t5=False)
    distilled(folder, "pd", tmp_path / "out", guidance=0.0)
    _, load = card_call(tmp_path / "out" / "student")
    assert {k for k, v in load.items() if v is None} == {"text_encoder_3", "tokenizer_3"}
    assert theirs(tmp_path / "out" / "student", torch.zeros(3, 16, LATENT, LATENT)).shape == (3, 16, LATENT, LATENT)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 32])
def test_stable_diffusion_3_left_alone_samples_at_even_times(teachers, shift, steps):
    model = load_model(str(teachers["sd3"]))
    model.schedule = RectifiedFlow(shift)
    scheduler = flow_scheduler(model, uniform_grid(steps), None)
    mu = None
    if scheduler.config.use_dynamic_shifting:
        mu = calculate_shift(4096, base_shift=scheduler.config.base_shift, max_shift=scheduler.config.max_shift)
    scheduler.set_timesteps(steps, mu=mu)
    times = uniform_grid(steps)
    torch.testing.assert_close(scheduler.sigmas.double(), model.schedule.sigma(times), rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps, model.schedule.network_time(times[:-1]), rtol=0, atol=1e-3)


def test_a_students_folder_keeps_what_it_was_trained_for(tmp_path, teachers):
    model = load_model(str(teachers["flux"])).resized((4, 16))
    scheduler = flow_scheduler(model, consistency_grid(50, 4), {"original_inference_steps": 50})
    model.family.pipeline(model, scheduler, w=0.0).save_pretrained(tmp_path)
    student = load_model(str(tmp_path))
    assert student.sample_shape == (16, 4, 16)
    assert student.schedule == model.schedule
    assert student.resized((8, 8)).schedule == model.schedule
    torch.testing.assert_close(exported_sampler(student, 2).times, torch.tensor([1, 0.5, 0]).double())
    assert exported_sampler(student, 2).transition == "renoise"


def test_a_student_of_someone_else_is_sampled_at_even_times(tmp_path, teachers):
    pipeline = StableDiffusion3Pipeline.from_pretrained(teachers["sd3"])
    pipeline.save_pretrained(tmp_path)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "FlowMatchLCMScheduler"}))
    sampler = exported_sampler(load_model(str(tmp_path)), 3)
    assert sampler.transition == "renoise"
    torch.testing.assert_close(sampler.times, uniform_grid(3))
