"""A registered student as MLflow loads it: orders of images go in, images come out.

MLflow imports this module, which a registered model names, and gives it the folder of the student. So there is no code
and no pickle in what is registered: a diffusers pipeline in safetensors and JSON, read as every pipeline here is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from importlib.metadata import Distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from torch import Tensor

from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import draw, exported_sampler
from ddil_ray.models import DiffusionModel, load_model

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["StudentModel", "save_student"]

_NEEDS = ("ddil-ray", "diffusers", "mlflow", "peft", "torch", "transformers")
"""What of that which is installed here a process needs that loads a student."""


def save_student(path: Path, student: Path, *, steps: int, w: float, about: Model | None = None) -> None:
    """Write the student in a pipeline folder as an MLflow model, for `mlflow.pyfunc.load_model`.

    Args:
        path: folder to make.
        student: its pipeline.
        steps: sampling steps by default.
        w: guidance by default, where its network is told any.
        about: what MLflow knows of a model that is logged.
    """
    signature = _signature(load_model(str(student)), steps=steps, w=w)
    mlflow.pyfunc.save_model(
        str(path),
        loader_module=__name__,
        data_path=str(student),
        mlflow_model=about,
        signature=signature,
        input_example=_example(signature),
        pip_requirements=[
            f"{name}=={found.version}" for name in _NEEDS for found in list(Distribution.discover(name=name))[:1]
        ],
    )


def _signature(model: DiffusionModel, *, steps: int, w: float) -> ModelSignature:
    """What `StudentModel` of `model` takes and gives, as MLflow enforces it."""
    columns = [ColSpec("long", "num_images")]
    if model.prompted:
        columns.append(ColSpec("string", "prompt"))
    elif model.num_conditions is not None:
        columns.append(ColSpec("long", "class_label", required=False))
    params = [ParamSpec("seed", "long", 0), ParamSpec("steps", "long", steps)]
    if model.reads_guidance:
        params.append(ParamSpec("guidance", "double", float(w)))
    channels, *size = model.sample_shape
    if model.codec is not None:
        channels, size = int(model.codec.vae.config.out_channels), [side * model.codec.pixels for side in size]
    images = TensorSpec(np.dtype(np.uint8), (-1, *size, channels))
    return ModelSignature(Schema(columns), Schema([images]), ParamSchema(params))


def _example(signature: ModelSignature) -> tuple[pd.DataFrame, dict[str, Any]]:
    """An order of one image."""
    import pandas as pd

    values = {"num_images": 1, "prompt": "a red bird", "class_label": 0}
    order = pd.DataFrame({column.name: [values[column.name]] for column in signature.inputs})
    return order, {param.name: param.default for param in signature.params}


class StudentModel:
    """What `mlflow.pyfunc.load_model` gives: a student that draws what rows ask for.

    Args:
        model: a student that was loaded from a pipeline folder.
        device: where it computes.
    """

    def __init__(self, model: DiffusionModel, device: torch.device | str = "cpu") -> None:
        self._model, self._device, self._lock = model, device, threading.Lock()
        self._encoder = model.text_encoder(device) if model.prompted else None

    def predict(self, data: pd.DataFrame, params: Mapping[str, Any]) -> np.ndarray:
        """(N, H, W, C) uint8 images, row after row.

        Args:
            data: `num_images` of each row, and its `prompt` or `class_label`; without a label, classes in turn.
            params: `seed`, `steps`, and `guidance` where the student is told it.

        Raises:
            ConfigError: a value that the student cannot have.
        """
        steps = int(params["steps"])
        if steps < 1:
            raise ConfigError(f"`steps` must be at least 1, but is {steps} instead.")
        with self._lock, torch.no_grad():  # a network has one bank of prompts at a time
            cond = self._conditions(data)
            sampler = exported_sampler(self._model, steps, w=float(params.get("guidance", 0.0))).to(self._device)
            images = draw(self._model, sampler, cond, seed=int(params["seed"]))
        pixels: np.ndarray = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        return pixels

    def _conditions(self, data: pd.DataFrame) -> Tensor:
        """(N,) condition of each image; the network can look them up."""
        counts = torch.tensor(data["num_images"].to_list(), dtype=torch.int64)
        if not len(counts) or int(counts.min()) < 1:
            raise ConfigError(f"`num_images` must be at least 1 in each row, but is {counts.tolist()} instead.")
        if self._encoder is not None:
            prompts = [str(prompt) for prompt in data["prompt"]]
            self._model.ask(prompts, encoder=self._encoder)
            return torch.arange(len(prompts)).repeat_interleave(counts)
        classes = self._model.classes or 1
        if "class_label" not in data:
            return torch.arange(int(counts.sum())) % classes
        labels = torch.tensor(data["class_label"].to_list(), dtype=torch.int64)
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise ConfigError(f"`class_label` must be from 0 to {classes - 1}, but is {labels.tolist()} instead.")
        return labels.repeat_interleave(counts)


def _load_pyfunc(path: str) -> StudentModel:
    """What MLflow calls with the folder of the student; MLFLOW_DEFAULT_PREDICTION_DEVICE may name a device."""
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
    return StudentModel(load_model(str(Path(path))), device or ("cuda" if torch.cuda.is_available() else "cpu"))
