"""Folders of finished runs, made without training: a tiny student, and scores as they were measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ddil_ray.config import RunConfig, load_config, to_yaml
from ddil_ray.evaluation.scoring import GROUPS
from ddil_ray.export import save_model_folder
from ddil_ray.models.unet import new_unet, unet_model

__all__ = ["finished_run", "group_scores", "save_pixel_student"]


def group_scores(mean: float, *, seed: int, spread: float = 0.001) -> list[float]:
    """Scores of groups around `mean`: what chance does to all students alike, and a tenth of it to each alone."""
    shared = np.random.default_rng(0).normal(0, spread, GROUPS)
    own = np.random.default_rng([1, seed]).normal(0, spread / 10, GROUPS)
    return [float(score) for score in mean + shared + own]


def save_pixel_student(folder: Path, *, seed: int = 0, classes: int | None = 10) -> None:
    """A student of 8 x 8 pixels in one channel, with random weights."""
    torch.manual_seed(seed)
    unet = new_unet(sample_shape=(1, 8, 8), num_classes=classes, block_out_channels=(8, 16))
    model = unet_model(unet, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    save_model_folder(folder, model, name="s", description="d", steps=1)


def finished_run(output: Path, name: str, *, kid: float | None, seed: int = 0, settings: Sequence[str] = ()) -> str:
    """A run whose student, told apart by `seed`, has `kid` to its teacher at one step; None: it was not measured."""
    folder = output / name
    config = load_config("digits-pd", [f"name={name}", f"output={output}", *settings], kind=RunConfig)
    save_pixel_student(folder / "student", seed=seed)
    (folder / "config.yaml").write_text(to_yaml(config))
    scores, groups = {}, {}
    if kid is not None:
        scores = {"student": {"1": {"kid_teacher": kid, "frechet_teacher": 100 * kid}}}
        groups = {"student": {"1": {"kid_teacher": group_scores(kid, seed=seed)}}}
    content = {"scores": scores, "groups": groups, "about": {"features": "64 features", "num_samples": 1000}}
    (folder / "metrics.json").write_text(json.dumps(content))
    return str(folder)
