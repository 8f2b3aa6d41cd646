"""What tests of prompted pipelines share: the model of a folder, with its own embeddings of three prompts."""

from __future__ import annotations

import itertools

import torch
from diffusers import DiffusionPipeline

from ddil_ray.diffusion.denoiser import w_from_guidance_scale
from ddil_ray.diffusion.schedule import add_noise
from ddil_ray.diffusion.solver import ddim_step, sample
from ddil_ray.diffusion.timegrid import uniform_grid
from ddil_ray.models import load_model
from ddil_ray.models.flux import pack, unpack
from ddil_ray.prompts import HeldEmbeddings, Prompts

__all__ = ["WORDS", "bound", "noise_of", "ours", "theirs", "walked"]

WORDS = ["a red bird", "two boats", "rain"]


def bound(folder, prompts=WORDS, negative=None):
    """The model of a pipeline folder, with its own embeddings of `prompts`."""
    model = load_model(str(folder))
    encoder = model.family.text_encoder(model.folder)
    if encoder is not None:
        model.bind(Prompts(HeldEmbeddings(encoder(prompts)), encoder.negative(negative)).bank())
    return model


def noise_of(model):
    return torch.randn(len(WORDS), *model.sample_shape, generator=torch.Generator().manual_seed(3))


def ours(model, noise, *, steps, guidance_scale, guidance_rescale=0.0):
    """Samples of this library, with the step that is a pipeline's own."""
    w = torch.full((len(noise),), w_from_guidance_scale(guidance_scale))
    model.guidance_rescale = guidance_rescale
    denoiser = model.expert(guided=guidance_scale > 1)
    return sample(
        denoiser, noise, times=uniform_grid(steps), cond=torch.arange(len(noise)), w=w, schedule=model.schedule
    )


def theirs(folder, noise, *, parts=None, **call):
    """Samples of the pipeline in `folder`, loaded with `parts`."""
    pipeline = DiffusionPipeline.from_pretrained(folder, **(parts or {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=WORDS, latents=noise, output_type="latent", **call).images


@torch.no_grad()
def walked(sampler, noise, cond, generator, *, packed):
    """Samples, not decoded, of `sampler`, with noise drawn in the order in which pipelines of packed latents do."""
    x = noise
    for now, following in itertools.pairwise(sampler.times.tolist()):
        t, s = (torch.full((len(x),), u, dtype=torch.float64) for u in (now, following))
        x_0 = sampler.denoiser(x, t, cond, torch.full((len(x),), sampler.w))
        if sampler.transition == "ddim":
            x = ddim_step(x, x_0, t, s, sampler.schedule)
        else:
            drawn = torch.randn((pack(x) if packed else x).shape, generator=generator)
            x = add_noise(x_0, unpack(drawn, *x.shape[2:]) if packed else drawn, s, sampler.schedule)
    return x
