"""Kind `auto`: a classifier trained on the data on the spot, so that distances need no download."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own short name

from ddil_ray.data import ImageData
from ddil_ray.evaluation.features.network import FeatureNetwork
from ddil_ray.seeded import seeded

__all__ = ["train_features"]

_LARGEST = 64
"""Pixels: larger images are shrunk to this."""
_WORDS = 64
"""At most so many words of prompts are told apart, each of at least `_LEAST_IMAGES` and at most half of the images."""
_LEAST_IMAGES = 8


class _Classifier(nn.Module):
    def __init__(self, channels: int, outputs: int, *, shrink: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *([nn.AdaptiveAvgPool2d(_LARGEST)] if shrink else []),
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
        )
        self.head = nn.Linear(64, outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.body(images)))
        return logits


@dataclass(frozen=True)
class _Task:
    """What is told apart."""

    what: str
    targets: Tensor
    """(N,) class ids; or (N, K) shares of the words that are in the prompt, all 0 where none is."""
    outputs: int

    def accuracy(self, logits: Tensor, targets: Tensor) -> float:
        """Share of images whose likeliest answer is right, of those that have a right one."""
        guess = logits.argmax(1)
        if targets.ndim == 1:
            return float((guess == targets).double().mean())
        hits = targets.gather(1, guess[:, None])[:, 0] > 0
        return float(hits[targets.any(1)].double().mean())


def train_features(data: ImageData, *, epochs: int = 15, seed: int = 0) -> FeatureNetwork:
    """A small classifier's penultimate layer, trained on four fifths of `data` (seconds on one core for digits).

    It tells classes apart; of images with prompts, which of the commonest words are in the prompt (ours: a prompt is
    what such images are about). Other data gets the same network with random weights, and a name that says so.
    """
    task, (channels, height, width) = _task(data), data.images.shape[1:]
    shrink = max(height, width) > _LARGEST
    size = _LARGEST if shrink else None
    with seeded(seed):
        network = _Classifier(channels, task.outputs if task else 1, shrink=shrink)
        if task is None:
            return FeatureNetwork(network.body.eval(), "64 features of a random convolutional network", size)
        train, held_out = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).split(
            [int(len(data) * 0.8), len(data) - int(len(data) * 0.8)]
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(train)).split(64):
                chosen = train[rows]
                loss = F.cross_entropy(network(data.images[chosen]), task.targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        network.eval()
        with torch.no_grad():
            accuracy = task.accuracy(network(data.images[held_out]), task.targets[held_out])
    return FeatureNetwork(
        network.body, f"64 features of a classifier of {task.what}{data.name}, {accuracy:.1%} on held-out images", size
    )


def _task(data: ImageData) -> _Task | None:
    """What a classifier of `data` can learn; None where nothing is known of it."""
    if data.labelled and len(data):
        return _Task("", data.labels, int(data.num_classes or 1))
    texts = data.prompts.texts() if data.prompts is not None else ()
    if not texts or not len(data):
        return None
    words = [set(re.findall(r"\w+", texts[id_].lower())) for id_ in data.labels.tolist()]
    images = Counter(word for found in words for word in found)
    telling = (word for word, count in images.most_common() if _LEAST_IMAGES <= count <= len(data) / 2)
    known = list(itertools.islice(telling, _WORDS))
    if not known:
        return None
    present = torch.tensor([[float(word in found) for word in known] for found in words])
    shares = present / present.sum(1, keepdim=True).clamp(min=1)
    return _Task(f"{len(known)} words of the prompts of ", shares, len(known))
