"""Students as low-rank adapters on a frozen base, by peft: put on, fused into the base, and written as diffusers reads
them.

Source: Hu et al. 2021, arXiv:2106.09685; as students of distillation Luo et al. 2023, arXiv:2311.05556 (LCM-LoRA).
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ddil_ray.errors import ConfigError, first_line
from ddil_ray.models.model import DiffusionModel
from ddil_ray.seeded import seeded
from ddil_ray.trained import is_adapted, set_trainable, share_network

__all__ = ["TARGETS", "Lora", "adapted", "fused", "save_lora"]

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS: dict[str, tuple[str, ...]] = {
    "unet": (
        *_ATTENTION,
        *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    ),
    "transformer": (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
}
"""Ends of the names of the layers that get adapters by default, by the family's component. UNets: what diffusers'
`train_lcm_distill_lora_sd_wds.py` takes. Transformers: all projections of attention, the text stream's included."""


@dataclass(frozen=True)
class Lora:
    """W x becomes W x + alpha / rank B A x, with A of `rank` rows and B = 0 at first."""

    rank: int = 64
    alpha: float = 64.0
    target_modules: tuple[str, ...] | None = None
    """Ends of the names of the layers that get adapters; None for `TARGETS`."""
    dropout: float = 0.0
    """Chance that an input of A is dropped."""


def adapted(model: DiffusionModel, lora: Lora) -> DiffusionModel:
    """`model` with new adapters, the only trainable part; on the tensors of `model`, but in modules of its own.

    The base stays in eval mode: dropout and running statistics are those of `model`. The adapters are the same each
    time, so that all ranks start alike.

    Raises:
        ConfigError: no such layers, or layers that take no adapters; peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "`student.lora` must be null where peft is not installed. Run `pip install 'ddil-ray[lora]'`."
        ) from error
    network = share_network(model.network)
    targets = list(lora.target_modules or _default_targets(model))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    with seeded(0):
        try:
            inject_adapter_in_model(config, _root(network))
        except ValueError as error:
            raise ConfigError(
                "`student.lora.target_modules` must name linear, convolution or embedding layers of the network, but "
                f"is {targets} instead: {first_line(error)}"
            ) from error
    network.eval()
    for name, part in network.named_modules():
        if ".lora_dropout." in name:
            part.train()
    return model.with_network(set_trainable(network))


def fused(model: DiffusionModel) -> DiffusionModel:
    """`model` as a plain network that computes what it computes with its adapters; itself where it has none."""
    if not is_adapted(model.network):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = copy.deepcopy(model.network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del _root(network).peft_config
    return model.with_network(network)


def save_lora(folder: Path, model: DiffusionModel) -> bool:
    """Write the adapters of `model` so that `load_lora_weights` of diffusers reads them, rank and alpha included.

    Args:
        folder: holds the pipeline with the adapters fused into it; gets `lora/pytorch_lora_weights.safetensors`.
        model: adapted.

    Returns:
        False, and nothing is written, where pipelines of that class read no adapters, or there is none.
    """
    pipeline: Any = None if model.family is None else _pipeline_class(folder)
    if model.family is None or not hasattr(pipeline, "save_lora_weights"):
        return False
    from peft import get_peft_model_state_dict

    root, part = _root(model.network), model.family.component
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(root).items()}
    about = {f"{part}_lora_adapter_metadata": root.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(folder / "lora", **{f"{part}_lora_layers": layers}, **about)
    return True


def _pipeline_class(folder: Path) -> Any:
    import diffusers

    return getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])


def _root(network: nn.Module) -> Any:
    """What adapters are put into: the denoiser of a family's network, so that their names are those of diffusers."""
    return getattr(network, "denoiser", network)


def _default_targets(model: DiffusionModel) -> tuple[str, ...]:
    if model.family is None:
        raise ConfigError(
            "`student.lora.target_modules` must name layers of the network of a factory, but is not set. Set it to "
            f"some of {', '.join(_linear_layers(model.network)[:8])}."
        )
    return TARGETS[model.family.component]


def _linear_layers(network: nn.Module) -> list[str]:
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
