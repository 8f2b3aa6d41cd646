"""Tiny pipelines of every family, random and built locally, and data prepared for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

__all__ = ["PIPELINES", "PROMPTS", "byte_tokenizer", "save_pipeline", "tiny_vae"]

PROMPTS = ["a red bird", "two boats", "rain", "a house of stone", "snow"]
"""What images of `prepared` data show."""

LATENT = 8
"""Height and width of every tiny pipeline's latents; images are twice that."""


def byte_tokenizer(folder: Path, *, length: int = 12) -> CLIPTokenizer:
    """A CLIP tokenizer that has bytes for words, so that nothing is fetched."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length)


def clip_config(width: int, **more) -> CLIPTextConfig:
    """A text encoder of one layer over bytes."""
    return CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=512, eos_token_id=513, pad_token_id=513, **more,
    )  # fmt: skip


def tiny_vae(channels: int = 4, **more) -> AutoencoderKL:
    """Images of 16 x 16 to latents of 8 x 8."""
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4,
        sample_size=2 * LATENT, scaling_factor=0.5, **more,
    )  # fmt: skip


def _unet(context: int, *, in_channels: int = 4, **more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT, in_channels=in_channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context, attention_head_dim=2, norm_num_groups=4, **more,
    )  # fmt: skip


def _discrete_scheduler(**more) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", **{"steps_offset": 1, **more},
    )  # fmt: skip


def stable_diffusion(folder: Path, *, unet: dict | None = None, **scheduler) -> StableDiffusionPipeline:
    """As Stable Diffusion 1.5."""
    return StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=CLIPTextModel(clip_config(16)), tokenizer=byte_tokenizer(folder / "words"),
        unet=_unet(16, **(unet or {})), scheduler=_discrete_scheduler(**scheduler), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder: Path, *, unet: dict | None = None, zeros: bool = True, **scheduler) -> StableDiffusionXLPipeline:
    """As Stable Diffusion XL."""
    words = byte_tokenizer(folder / "words")
    parts = {
        "vae": tiny_vae(),
        "text_encoder": CLIPTextModel(clip_config(16)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(8, projection_dim=12)),
    }
    added = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12 + 6 * 4}
    denoiser = _unet(16 + 8, addition_embed_type="text_time", **added, **(unet or {}))
    return StableDiffusionXLPipeline(
        **parts, tokenizer=words, tokenizer_2=words, unet=denoiser, scheduler=_discrete_scheduler(**scheduler),
        force_zeros_for_empty_prompt=zeros, add_watermarker=False,
    )  # fmt: skip


def ssd1b(folder: Path, **scheduler) -> StableDiffusionXLPipeline:
    """As SSD-1B: asked as `sdxl` is, by a UNet without a middle and with fewer transformer layers on its way up."""
    layers = {"transformer_layers_per_block": [1, 2], "reverse_transformer_layers_per_block": [[2, 1], 1]}
    return sdxl(folder, unet={"mid_block_type": None, **layers}, **scheduler)


def dit(folder: Path, *, classes: int = 1000, **scheduler) -> DiTPipeline:
    """As DiT-XL-2: predicts a variance too, and names its classes."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=LATENT, num_embeds_ada_norm=classes,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer, tiny_vae(), _discrete_scheduler(**scheduler))
    pipeline.register_to_config(id2label={str(i): f"class {i}, number {i}" for i in range(classes)})
    return pipeline


def letter_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that has letters for words."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *((chr(c), -3.0) for c in range(33, 127))], extra_ids=0)


def tiny_t5(width: int) -> T5EncoderModel:
    """One layer over letters."""
    return T5EncoderModel(T5Config(vocab_size=98, d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2))


def _flow_vae() -> AutoencoderKL:
    return tiny_vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def sd3(folder: Path, *, t5: bool = True, **scheduler) -> StableDiffusion3Pipeline:
    """As Stable Diffusion 3.5 medium."""
    words = byte_tokenizer(folder / "words")
    transformer = SD3Transformer2DModel(
        sample_size=LATENT, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=20,
        pos_embed_max_size=LATENT, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=_flow_vae(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        text_encoder=CLIPTextModelWithProjection(clip_config(16, projection_dim=12)), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(8, projection_dim=8)), tokenizer_2=words,
        text_encoder_3=tiny_t5(32) if t5 else None, tokenizer_3=letter_tokenizer() if t5 else None,
    )  # fmt: skip


def flux(folder: Path, *, told: bool = True, **scheduler) -> FluxPipeline:
    """As FLUX.1-dev, told the guidance, with a shift that depends on the size."""
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=told, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    settings = {"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
    return FluxPipeline(
        vae=_flow_vae(), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**settings),
        text_encoder=CLIPTextModel(clip_config(16)), tokenizer=byte_tokenizer(folder / "words"),
        text_encoder_2=tiny_t5(32), tokenizer_2=letter_tokenizer(),
    )  # fmt: skip


def flux_schnell(folder: Path) -> FluxPipeline:
    """As FLUX.1-schnell: not told the guidance."""
    return flux(folder, told=False, shift=1.0, use_dynamic_shifting=False)


PIPELINES: dict[str, Callable[..., object]] = {
    "stable_diffusion": stable_diffusion,
    "sdxl": sdxl,
    "ssd1b": ssd1b,
    "dit": dit,
    "sd3": sd3,
    "flux": flux,
    "flux_schnell": flux_schnell,
}
"""Builder of a tiny pipeline of each family; gets a folder to work in."""


def save_pipeline(family: str, folder: Path, **settings) -> Path:
    """`folder`/pipeline with a random tiny pipeline of `family`, the same each time."""
    torch.manual_seed(0)
    pipeline = PIPELINES[family](folder, **settings)
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
