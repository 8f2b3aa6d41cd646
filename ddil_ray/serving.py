"""Answers requests for images with an exported student: what may be asked, and drawing several at once; without Ray.

An image is what its request says, whoever it is drawn together with: all its noise comes from its own seed. Alone or
in a batch it differs by rounding, at most one level of 255.
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, ValidationError
from torch import Tensor

from ddil_ray.config.explain import explain
from ddil_ray.config.kinds import Group, Seed
from ddil_ray.diffusion.solver import fresh_noise
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import exported_sampler
from ddil_ray.models import load_model
from ddil_ray.models.match import said_of
from ddil_ray.publish.folder import pipeline_folder
from ddil_ray.redact import redact

__all__ = ["MOST_BYTES", "Ask", "Studio"]

MOST_BYTES = 64 * 1024
"""Of a request."""
_MOST_CHARACTERS = 4096


class Ask(Group):
    """A request for one image."""

    prompt: Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)] | None = Field(
        None, description="of a student of prompts"
    )
    class_label: Annotated[int, Field(ge=0, strict=True)] | None = Field(None, description="of a student of classes")
    seed: Seed = Field(default_factory=lambda: secrets.randbits(32), description="of all noise; default: any")


class Studio:
    """An exported student that draws images.

    Args:
        student: run folder, or pipeline folder; a path or URL.
        steps: of sampling.
        guidance: w, of students that are told it, and of teachers.
        device: to draw on.

    Raises:
        ConfigError: it cannot be loaded, or not be sampled so.
    """

    def __init__(self, student: str, *, steps: int, guidance: float | None, device: torch.device | str = "cpu") -> None:
        with said_of("STUDENT"):
            model = load_model(str(pipeline_folder(student, "STUDENT")))
        if model.reads_guidance and guidance is None:
            raise ConfigError(
                "`--guidance` must be given for this student, whose network is told w. Its README.md says what it was "
                "trained with."
            )
        self._model, self.student, self.steps = model, student, steps
        self._device = torch.device(device)
        self._sampler = exported_sampler(model, steps, w=guidance or 0.0).to(device)
        self._encoder = model.text_encoder(device) if model.prompted else None
        self.classes = model.classes
        """How many there are to ask for; None where there are none."""

    @property
    def about(self) -> dict[str, Any]:
        """What is served, and what it may be asked."""
        asked = ["seed"]
        if self._encoder is not None:
            asked.append("prompt")
        if self.classes is not None:
            asked.append("class_label")
        return {"student": _shown(self.student), "steps": self.steps, "asked": asked, "classes": self.classes}

    def read(self, body: bytes) -> Ask:
        """The request in `body`, JSON.

        Raises:
            ConfigError: it cannot be answered; says all that is wrong.
        """
        try:
            content = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            raise ConfigError("A request must be a JSON object, but cannot be read as JSON.") from None
        if not isinstance(content, dict):
            raise ConfigError("A request must be a JSON object, but is another value.")
        try:
            ask = Ask.model_validate(content)
        except ValidationError as error:
            raise ConfigError("\n".join(explain(error, Ask, content, {}))) from None
        self._check(ask)
        return ask

    def _check(self, ask: Ask) -> None:
        if self._encoder is not None and ask.prompt is None:
            raise ConfigError("`prompt` must be given, as this student is asked by text, but is missing.")
        if self._encoder is None and ask.prompt is not None:
            raise ConfigError("`prompt` must be left out, as this student is not asked by text.")
        if self.classes is None and ask.class_label is not None:
            raise ConfigError("`class_label` must be left out, as this student knows no classes.")
        if self.classes is not None and (ask.class_label is None or ask.class_label >= self.classes):
            found = "missing" if ask.class_label is None else f"{ask.class_label} instead"
            raise ConfigError(f"`class_label` must be from 0 to {self.classes - 1}, but is {found}.")

    def draw(self, asks: Sequence[Ask]) -> list[bytes]:
        """The PNG files of what `read` gave, drawn at once."""
        generators = [torch.Generator().manual_seed(ask.seed) for ask in asks]
        noise = fresh_noise((len(asks), *self._model.sample_shape), generators)
        samples = self._sampler(noise, self._conditions(asks), seed=generators, batch_size=len(asks))
        return [_png(sample) for sample in samples]

    def check(self) -> None:
        """See that the device still computes; a GPU that has failed once raises here."""
        torch.zeros(1, device=self._device).add(1).item()

    def _conditions(self, asks: Sequence[Ask]) -> Tensor:
        """(B,) condition ids."""
        if self._encoder is None:
            return torch.tensor([ask.class_label or 0 for ask in asks])
        texts = list(dict.fromkeys(str(ask.prompt) for ask in asks))
        self._model.ask(texts, encoder=self._encoder)
        return torch.tensor([texts.index(str(ask.prompt)) for ask in asks])


def _shown(student: str) -> str:
    """`student` as strangers may know it: no credentials, and of a place on this machine the name alone."""
    path = Path(student.removeprefix("file://"))
    if path.is_absolute():
        student = "/".join(path.parts[-2:]) if path.name == "student" else path.name  # within a run's folder
    return redact(student)


def _png(sample: Tensor) -> bytes:
    """A sample (C, H, W) in [-1, 1] as a file; of other than 1 or 3 channels the first is shown."""
    pixels = ((sample[: 3 if len(sample) >= 3 else 1] + 1) * 127.5).round().numpy().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()
