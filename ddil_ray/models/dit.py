"""Family `dit`: class-conditional latent transformers, `DiTPipeline` of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ddil_ray.diffusion.schedule import schedule_from_diffusers
from ddil_ray.errors import ConfigError
from ddil_ray.models.family import Family, checked_prediction, load_component, read_config
from ddil_ray.models.model import DiffusionModel
from ddil_ray.models.network import FamilyNetwork

__all__ = ["FAMILY", "DiT", "DiTNetwork"]

_NULL_CLASS = 1000
"""What `DiTPipeline` guides away from, whatever the transformer."""


class DiTNetwork(FamilyNetwork):
    """A `DiTTransformer2DModel` that keeps the labels it is given, and whose predicted variance is left out.

    diffusers' label embeddings replace some labels by the unconditional one while they train. Here states are labelled
    with a condition each, so a student that is trained must see that condition.
    """

    denoiser: DiTTransformer2DModel

    def __init__(self, denoiser: DiTTransformer2DModel) -> None:
        super().__init__(denoiser)
        for module in denoiser.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor, w: Tensor) -> Tensor:
        """See `FamilyNetwork.forward`."""
        prediction: Tensor = self.denoiser(x_t, timestep=time, class_labels=cond, return_dict=False)[0]
        return prediction[:, : x_t.shape[1]]


class DiT(Family):
    """DiT: epsilon, with or without a learnt variance.

    Source: Peebles and Xie 2022, arXiv:2212.09748.
    """

    name = "dit"
    component = "transformer"

    def load(self, folder: Path) -> DiffusionModel:
        """See `Family.load`."""
        scheduler = read_config(folder, "scheduler")
        _check_is_class_conditional(read_config(folder, "transformer"), folder)
        transformer = load_component(DiTTransformer2DModel, folder, "transformer")
        schedule, size = schedule_from_diffusers(scheduler), transformer.config.sample_size
        return DiffusionModel(
            network=DiTNetwork(transformer),
            prediction=checked_prediction(scheduler, schedule),
            schedule=schedule,
            sample_shape=(transformer.config.in_channels, size, size),
            num_conditions=_NULL_CLASS + 1,
            null_cond=_NULL_CLASS,
            bottleneck=f"denoiser.transformer_blocks.{len(transformer.transformer_blocks) // 2}",
            family=self,
            folder=folder,
            scheduler_config=scheduler,
        )

    def pipeline(self, model: DiffusionModel, scheduler: Any, *, w: float) -> Any:
        """See `Family.pipeline`; it keeps the names of classes, which diffusers reads and does not write."""
        pipeline = super().pipeline(model, scheduler, w=w)
        names = pipeline.load_config(model.folder).get("id2label")
        if names:
            pipeline.register_to_config(id2label=names)
        return pipeline

    def example(self, model: DiffusionModel, *, times: Tensor) -> str:
        """See `Family.example`."""
        return f"class_labels=[0] * 8, num_inference_steps={len(times) - 1}"

    def plain(self, network: nn.Module, w: float) -> nn.Module:
        """The transformer itself."""
        assert isinstance(network, DiTNetwork)
        transformer: nn.Module = network.denoiser
        return transformer


def _check_is_class_conditional(config: dict[str, Any], folder: Path) -> None:
    """Of a class that other pipelines had too, and with the null class that `DiTPipeline` uses."""
    norm = config.get("norm_type")
    if norm != "ada_norm_zero":
        raise ConfigError(
            f"`norm_type` of a {config.get('_class_name')} must be 'ada_norm_zero', that of class-conditional DiTs, "
            f"but is {norm!r} in {folder} instead. Use a teacher of a known family."
        )
    classes = config.get("num_embeds_ada_norm", _NULL_CLASS)
    if classes != _NULL_CLASS:
        raise ConfigError(
            f"`num_embeds_ada_norm` of a DiT transformer must be {_NULL_CLASS}, the class that diffusers' DiTPipeline "
            f"takes for none, but is {classes} in {folder} instead: diffusers would guide it away from another class. "
            f"Save it with {_NULL_CLASS} classes, and the null class as the last row of its label embeddings."
        )


FAMILY = DiT()
