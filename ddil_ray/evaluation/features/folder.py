"""Kind folder: a vision model that transformers saved, as a feature network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.evaluation.preprocess import Preprocessing, load_preprocessing

__all__ = ["load_folder"]


class _Pooled(nn.Module):
    """A vision model's pooled output; the mean over positions where it has none.

    Where the folder has no weights of its pooler it is the first position's output, the class token's.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, *, pools: bool) -> None:
        super().__init__()
        self.model, self.preprocessing, self.pools = model, preprocessing, pools

    def forward(self, images: Tensor) -> Tensor:
        output: Any = self.model(pixel_values=self.preprocessing(images))
        hidden: Tensor = output.last_hidden_state
        if not self.pools:
            return hidden[:, 0]
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.mean(1)


def load_folder(folder: str) -> tuple[nn.Module, int]:
    """The vision model in `folder` with its own preprocessing, and the pixels it resizes images to.

    Raises:
        ConfigError: no such folder, transformers is not installed, or it cannot load the folder (safetensors only), or
            has not all weights in it.
    """
    if not Path(folder).is_dir():
        raise ConfigError(
            f"`evaluation.features` must be auto, inception, `module.path:factory` or the folder of a transformers "
            f"vision model, but is {folder!r} instead, and there is no such folder."
        )
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ConfigError(
            "`evaluation.features` must be a network that is installed, but a folder needs transformers, which is "
            "missing. Run `pip install 'ddil-ray[transformers]'`."
        ) from error
    preprocessing = load_preprocessing(folder, field="evaluation.features")
    try:
        model, loaded = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(
            f"`evaluation.features` must be a folder that transformers' AutoModel can load, with safetensors weights, "
            f"but {folder} failed: {first_line(error)}"
        ) from error
    missing, seeing = sorted(loaded["missing_keys"]), "vision_model."
    if hasattr(model, "vision_model"):  # of a model of images and texts, the images' part
        model, missing = model.vision_model, [n.removeprefix(seeing) for n in missing if n.startswith(seeing)]
    poolers = [name for name in missing if name.partition(".")[0] == "pooler"]
    if len(poolers) < len(missing):  # what is not there is random, anew each time
        raise ConfigError(
            f"`evaluation.features` must be a folder with all weights of its model, but {folder} lacks {len(missing)} "
            f"of them, {missing[0]} among them. Save the whole model, or use another."
        )
    return _Pooled(model, preprocessing, pools=not poolers), preprocessing.size
