"""Training a small latent text-to-image teacher from nothing: autoencoder, tokenizer, text encoder and denoiser.

For demos, and for captioned images of one's own: minutes on a CPU for some thousand small images.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddil_ray.config.text_teacher import Text, TextTeacherConfig
from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.errors import ConfigError, first_line
from ddil_ray.models.family import checked_prediction
from ddil_ray.models.latents import LatentCodec
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.stable_diffusion import StableDiffusionNetwork
from ddil_ray.prompts import Embeddings
from ddil_ray.training.autoencoder import new_autoencoder, psnr, train_autoencoder
from ddil_ray.training.captions import CaptionedImages
from ddil_ray.training.fitting import OnRecord, fit
from ddil_ray.training.teacher import denoising_loss, scheduler_config

__all__ = ["train_text_teacher"]


def train_text_teacher(
    config: TextTeacherConfig, data: CaptionedImages, *, say: Callable[[str], None], on_record: OnRecord
) -> StableDiffusionPipeline:
    """A pipeline of Stable Diffusion's kind, trained on `data` in two stages: the autoencoder, then the rest.

    Args:
        config: the networks, and how long.
        data: what to train on.
        say: gets lines on what is done.
        on_record: gets metrics.

    Raises:
        ConfigError: networks that cannot be built.
    """
    torch.manual_seed(config.seed)
    vae = new_autoencoder(config.autoencoder, size=config.image_size)
    tokenizer = new_tokenizer(data.captions, config.text)
    encoder, unet = _new_text_encoder(tokenizer, config.text), _new_denoiser(config, vae)
    say(f"Training the autoencoder on {len(data)} images.")
    vae = train_autoencoder(vae, data.images, config.autoencoder, seed=config.seed, on_record=on_record)
    codec = LatentCodec(vae)
    say(f"The autoencoder keeps images to {psnr(codec, data.images):.1f} dB. Training the denoiser on latents.")
    latents = torch.cat([codec.encode(part) for part in data.images.split(128)])
    encoder, unet = _train(config, tokenizer, encoder, unet, latents, data.captions, on_record)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler.from_config(scheduler_config(config.schedule)),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def new_tokenizer(captions: Sequence[str], config: Text) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own: letters, merged for as long as `captions` repeat their pairs."""
    texts = [*captions, *string.ascii_lowercase, *string.digits]  # so that any word can be spelt to its last letter
    tokenizer: CLIPTokenizer = CLIPTokenizer().train_new_from_iterator(texts, config.vocabulary, show_progress=False)
    tokenizer.model_max_length = config.length
    return tokenizer


def without_words(caption: str, dropout: float, chance: random.Random) -> str:
    """`caption`, or with probability `dropout` what is left of it when each word goes with probability 1/2.

    Ours: so that a teacher of few captions heeds every word of a prompt, not its whole only.
    """
    if chance.random() >= dropout:
        return caption
    return " ".join(word for word in caption.split() if chance.random() < 0.5)


class _LearningText:
    """In the place of a network's bank of embeddings while the text encoder learns; conditions are rows of `tokens`."""

    def __init__(self, encoder: nn.Module) -> None:
        self._encoder: Any = encoder
        self.tokens = torch.zeros(0)

    def __call__(self, cond: Tensor, like: Tensor) -> Embeddings:
        """Embeddings with their gradients."""
        return {"prompt": self._encoder(self.tokens[cond]).last_hidden_state}


def _train(
    config: TextTeacherConfig,
    tokenizer: Any,
    encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    latents: Tensor,
    captions: Sequence[str],
    on_record: OnRecord,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Fit text encoder and denoiser together; a share `label_dropout` of rows has the empty prompt."""
    settings, text = config.trainer, _LearningText(encoder)
    generator, chance = torch.Generator().manual_seed(config.seed), random.Random(config.seed)
    model = _model(config, unet)
    network: Any = model.network
    network.bank = text

    def prompt(row: int) -> str:
        if chance.random() < settings.label_dropout:
            return ""
        return without_words(captions[row], config.text.word_dropout, chance)

    def loss() -> Tensor:
        rows = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        prompts = [prompt(row) for row in rows.tolist()]
        tokens = tokenizer(
            prompts, padding="max_length", max_length=config.text.length, truncation=True, return_tensors="pt"
        )
        text.tokens = tokens.input_ids
        return denoising_loss(model, latents[rows], torch.arange(len(rows)), generator)

    trained: Any = fit(nn.ModuleDict({"encoder": encoder, "unet": unet}), loss, settings, on_record)
    return trained["encoder"], trained["unet"]


def _model(config: TextTeacherConfig, unet: UNet2DConditionModel) -> DiffusionModel:
    scheduler = scheduler_config(config.schedule)
    schedule = schedule_from_diffusers(scheduler)
    size = unet.config.sample_size
    return DiffusionModel(
        StableDiffusionNetwork(unet),
        checked_prediction(scheduler, schedule),
        schedule,
        (unet.config.in_channels, size, size),
        prompted=True,
    )


def _new_text_encoder(tokenizer: Any, config: Text) -> CLIPTextModel:
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        return CLIPTextModel(settings)
    except Exception as error:  # of transformers and torch, which run out of memory
        raise ConfigError(
            f"`text` must describe a CLIPTextModel, but transformers refuses it: {first_line(error)}. Lower "
            "`text.width` or `text.layers`."
        ) from error


def _new_denoiser(config: TextTeacherConfig, vae: AutoencoderKL) -> UNet2DConditionModel:
    model, halvings = config.model, len(config.autoencoder.block_out_channels) - 1
    size, depth = config.image_size // 2**halvings, len(model.block_out_channels)
    if size % 2 ** (depth - 1):
        raise ConfigError(
            f"`model.block_out_channels` must halve the latents {depth - 1} times, but they have {size} x {size} "
            "values. Use fewer levels, or another `image_size`."
        )
    try:
        return UNet2DConditionModel(
            sample_size=size,
            in_channels=vae.config.latent_channels,
            out_channels=vae.config.latent_channels,
            block_out_channels=model.block_out_channels,
            layers_per_block=model.layers_per_block,
            down_block_types=("DownBlock2D",) * (depth - 1) + ("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
            attention_head_dim=model.attention_heads,  # which diffusers reads as their number
            norm_num_groups=model.norm_num_groups,
            cross_attention_dim=config.text.width,
            # Ours: the prompt as a whole also enters with the time, and scales features, which few images teach sooner.
            addition_embed_type="text",
            addition_embed_type_num_heads=config.text.heads,
            resnet_time_scale_shift="scale_shift",
        )
    except Exception as error:  # of diffusers and torch, which run out of memory too
        raise ConfigError(
            f"`model` must describe a UNet2DConditionModel, but diffusers refuses it: {first_line(error)}. Change its "
            "channels, or `norm_num_groups`, which divides them."
        ) from error
