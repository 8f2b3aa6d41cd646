"""CLIP score: how well a sample shows the prompt of its condition.

Written here because torchmetrics' class does not run with transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.evaluation.preprocess import Preprocessing, load_preprocessing

__all__ = ["ClipScore", "load_clip"]

_PROMPTS_PER_PASS = 256


class _ImageTower(nn.Module):
    """CLIP's image side: pixels to the space shared with texts."""

    def __init__(self, vision: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision, self.projection = vision, projection

    def forward(self, pixels: Tensor) -> Tensor:
        embedded: Tensor = self.projection(self.vision(pixel_values=pixels).pooler_output)
        return embedded


@dataclass(frozen=True)
class ClipScore:
    """max(100 cos(E_image, E_text), 0) per sample, its text being the prompt of its condition.

    Source: Hessel et al. 2021, arXiv:2104.08718, eq. 1, with torchmetrics' weight of 100.
    """

    images: nn.Module
    texts: Tensor
    """(K, E) unit vectors."""
    conditions: Tensor
    """(K,) int64 ascending: what each of `texts` is the prompt of."""
    preprocessing: Preprocessing
    name: str
    device: torch.device | str = "cpu"

    def to(self, device: torch.device | str) -> ClipScore:
        """This score computed on `device`; its weights are moved, not copied."""
        self.images.to(device)
        return replace(self, texts=self.texts.to(device), conditions=self.conditions.to(device), device=device)

    @torch.no_grad()
    def __call__(self, images: Tensor, cond: Tensor) -> Tensor:
        """(N,) float32 scores, on the CPU, of images (N, C, H, W) in [-1, 1] with conditions `cond` (N,)."""
        embedded = F.normalize(self.images(self.preprocessing(images.float().to(self.device))), dim=1)
        texts = self.texts[torch.searchsorted(self.conditions, cond.to(self.device))]
        cosines = (embedded * texts).sum(1)
        return (100 * cosines).clamp(min=0).cpu()


@torch.no_grad()
def load_clip(model: str, prompts: Mapping[int, str]) -> ClipScore:
    """The score by the CLIP model of a folder or hub id, for conditions with these prompts.

    Raises:
        ConfigError: transformers is not installed, or cannot load the model.
    """
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ConfigError(
            "`evaluation.clip` must be null where transformers is missing, but is "
            f"{model!r}. Run `pip install 'ddil-ray[transformers]'`, or leave it out."
        ) from error
    try:
        clip: Any = CLIPModel.from_pretrained(model, use_safetensors=True).eval().requires_grad_(False)
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"`evaluation.clip` must be the folder or hub id of a CLIP model with safetensors weights, but {model!r} "
            f"failed: {first_line(error)}"
        ) from error
    length = clip.config.text_config.max_position_embeddings
    conditions = sorted(prompts)
    texts = []
    for start in range(0, len(conditions), _PROMPTS_PER_PASS):
        asked = [prompts[condition] for condition in conditions[start : start + _PROMPTS_PER_PASS]]
        tokens = tokenizer(asked, padding=True, truncation=True, max_length=length, return_tensors="pt")
        texts.append(clip.text_projection(clip.text_model(**tokens).pooler_output))
    preprocessing = load_preprocessing(model, field="evaluation.clip")
    return ClipScore(
        _ImageTower(clip.vision_model, clip.visual_projection),
        F.normalize(torch.cat(texts), dim=1),
        torch.tensor(conditions),
        preprocessing,
        model,
    )
