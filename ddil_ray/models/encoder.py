"""Text encoders through the `encode_prompt` of a family's own pipeline, which holds nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ddil_ray.models.family import TextEncoder, absent_components, unreadable
from ddil_ray.models.latents import variant_of

__all__ = ["PipelineEncoder"]


class PipelineEncoder(TextEncoder):
    """The text encoders of a pipeline of class `kind`; a family's subclass asks `pipeline` for embeddings.

    Raises:
        ConfigError: not readable.
    """

    kind: Any
    without: tuple[str, ...]
    """The components of such a pipeline that encode no text."""

    def __init__(self, folder: Path, device: torch.device | str) -> None:
        parts = absent_components(folder) | dict.fromkeys(self.without)
        try:
            pipeline = self.kind.from_pretrained(
                folder,
                torch_dtype=torch.float32,
                variant=variant_of(folder / "text_encoder"),
                use_safetensors=True,
                **parts,
            )
        except (OSError, ValueError) as error:
            raise unreadable(folder, error) from error
        self.pipeline = pipeline.to(device)
        self.device = device
