"""Small latent text-to-image runs that tests share: a tiny pipeline, random latents, a labelled batch, a learner."""

from __future__ import annotations

import torch
from tiny import save_pipeline

from ddil_ray.data import ImageData
from ddil_ray.models import DiffusionModel, load_model
from ddil_ray.prompts import HeldEmbeddings
from ddil_ray.states.batch import Origin
from ddil_ray.states.source import StateRequest
from ddil_ray.training.learner import Learner
from ddil_ray.training.placement import actor_networks, teaching, trained
from ddil_ray.training.producer import StateMaker
from ddil_ray.training.recipe import Ingredients, Recipe

__all__ = ["latent_data", "latent_model", "learner_of", "maker_of", "request_of", "rows_of"]


def latent_model(folder) -> DiffusionModel:
    """A tiny `stable_diffusion` teacher."""
    return load_model(str(save_pipeline("stable_diffusion", folder)))


def latent_data(model: DiffusionModel, rows=256) -> ImageData:
    """Random latents, and three prompts."""
    prompts = HeldEmbeddings(model.family.text_encoder(model.folder)(["a red bird", "two boats", "rain"]))
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(rows, *model.sample_shape, generator=generator)
    return ImageData(images, torch.arange(rows) % 3, "latents", prompts, prepared_for=model.family.name)


def maker_of(recipe: Recipe, made: Ingredients, *, acts=True, asked=True) -> StateMaker:
    """What an actor of a role holds; fills the teacher of `made`."""
    expert, student = actor_networks(
        made.teacher.copy(),
        recipe.student_of(made.teacher),
        config=recipe.config,
        objective=made.objective,
        threshold=made.threshold,
        device="cpu",
        acts=acts,
        asked=asked,
    )
    return StateMaker(
        made.objective,
        made.teacher,
        recipe.conditions(made.data),
        images=made.data.images,
        student=student,
        expert=expert,
        mixing=recipe.mixing,
    )


def request_of(origin, rows, phase=0) -> StateRequest:
    """The first block of a source."""
    return StateRequest(origin, phase, 0, rows, seed=0)


def rows_of(recipe: Recipe, made: Ingredients, rows: int):
    """Labelled forward states."""
    maker = maker_of(recipe, made, acts=False)
    states = maker.make(request_of(Origin.FORWARD, rows))
    return maker.expert.label(made.objective, states, "cpu")


def learner_of(recipe: Recipe, made: Ingredients) -> Learner:
    """A learner as a worker makes it."""
    student = trained(recipe.student_of(made.teacher), recipe.config, "cpu")
    teacher = teaching(made.teacher.copy(), recipe.config, "cpu")
    recipe.equip(made.objective, teacher, made.data.images, made.data.labels)
    return Learner(student, made.objective, recipe.optimizer_settings())
