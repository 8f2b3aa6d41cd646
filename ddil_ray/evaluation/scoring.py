"""From the rows of all blocks to scores: over everything, and per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddil_ray.evaluation.maker import SampleRows
from ddil_ray.evaluation.metrics import FrechetTo, kernel_distance, vendi_score
from ddil_ray.evaluation.neighbours import NEIGHBOURS, Manifold

__all__ = ["GROUPS", "MANIFOLD_ROWS", "ClassScores", "Measured", "Scorer"]

MANIFOLD_ROWS = 10_000
"""Rows of either side that neighbours are counted among, as is usual; the work grows with their product."""

GROUPS = 10
"""Groups of samples that are scored apart, so that two samplers of the same noises can be compared group by group."""

ClassScores = dict[str, Any]
"""Scores of one class: class, prompt (where given), count, paired_error, and where there are rows enough precision,
coverage and kid_data against the data of the class."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one sampler."""

    scores: dict[str, float]
    """frechet_data, frechet_teacher, kid_data, kid_teacher, precision, recall, density, coverage (against data), vendi,
    paired_error; lpips_diversity and clip_score where asked for."""
    classes: list[ClassScores]
    """By class id; empty without labels."""
    groups: dict[str, list[float]]
    """Of `GROUPS` groups of the samples, against as many parts of the references, the scores that few rows have on
    average as all do: kid_data, kid_teacher, paired_error, clip_score. Left out where a group had less than two rows.
    """
    first: Tensor
    """(F, C, H, W) first samples."""


class Scorer:
    """Scores of samplers against data features (M, D) with labels (M,) and held-out teacher features (N, D).

    `prompts` has one text per class id, for the breakdown. Without data (M = 0), its scores are left out.
    """

    def __init__(self, data: Tensor, labels: Tensor, teacher: Tensor, prompts: Mapping[int, str] | None = None) -> None:
        self._references = {**({"data": data} if len(data) else {}), "teacher": teacher}
        self._frechet = {name: FrechetTo(features) for name, features in self._references.items()}
        self._manifold = Manifold(_spread(data, MANIFOLD_ROWS)) if len(data) else None
        ids = labels[labels >= 0].unique().tolist()
        self._classes = {c: data[labels == c] for c in ids}
        self._class_manifolds = {c: Manifold(d) for c, d in self._classes.items() if len(d) > NEIGHBOURS}
        self._prompts = prompts

    def __call__(self, rows: SampleRows) -> Measured:
        """Scores of one sampler's rows."""
        features, few = rows.features, _spread(rows.features, MANIFOLD_ROWS)
        scores = {f"frechet_{name}": distance(features) for name, distance in self._frechet.items()}
        scores |= {f"kid_{name}": kernel_distance(real, features) for name, real in self._references.items()}
        if self._manifold is not None:
            scores |= self._manifold.fidelity(few)
            scores["recall"] = self._manifold.recall(few)
        scores |= {"vendi": vendi_score(features), "paired_error": float(rows.paired_error.mean())}
        asked = {"lpips_diversity": rows.lpips, "clip_score": rows.clip}
        scores |= {name: float(values.double().mean()) for name, values in asked.items() if len(values)}
        return Measured(scores, [self._class_scores(c, rows) for c in self._classes], self._groups(rows), rows.first)

    def _groups(self, rows: SampleRows) -> dict[str, list[float]]:
        features = _parts(rows.features)
        groups = {
            f"kid_{name}": [kernel_distance(*pair) for pair in zip(_parts(real), features, strict=True)]
            for name, real in self._references.items()
            if min(len(real), len(rows.features)) >= 2 * GROUPS
        }
        means = {"paired_error": rows.paired_error, "clip_score": rows.clip}
        return groups | {
            name: [float(part.double().mean()) for part in _parts(values)]
            for name, values in means.items()
            if len(values) >= 2 * GROUPS
        }

    def _class_scores(self, class_id: int, rows: SampleRows) -> ClassScores:
        mine = rows.cond == class_id
        scores: ClassScores = {"class": class_id, "count": int(mine.sum())}
        if self._prompts is not None:
            scores["prompt"] = self._prompts[class_id]
        if scores["count"]:
            scores["paired_error"] = float(rows.paired_error[mine].mean())
            if class_id in self._class_manifolds:
                fidelity = self._class_manifolds[class_id].fidelity(rows.features[mine])
                scores |= {name: fidelity[name] for name in ("precision", "coverage")}
        if min(scores["count"], len(self._classes[class_id])) > 1:
            scores["kid_data"] = kernel_distance(self._classes[class_id], rows.features[mine])
        return scores


def _parts(rows: Tensor) -> list[Tensor]:
    """`rows` in `GROUPS` parts, the same of everything that is as long; shuffled, as data often comes sorted."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return list(rows[order].tensor_split(GROUPS))


def _spread(features: Tensor, rows: int) -> Tensor:
    """At most `rows` of `features`, evenly spread: data often comes class after class."""
    return features if len(features) <= rows else features[torch.linspace(0, len(features) - 1, rows).long()]
