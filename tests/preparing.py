"""Small sources of images and captions, and preparing them without Ray."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from ddil_ray.config.prepare import PrepareConfig
from ddil_ray.prepare import begin, fill, new_job, stages, summary
from ddil_ray.tracking import View

__all__ = ["encode", "inline", "picture", "prepare", "quiet", "settings", "write_folder", "write_tar"]


def picture(seed, height=16, width=16, *, format="PNG"):
    """An image file of a random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(pixels, format)


def encode(pixels, format="PNG"):
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **({"compress_level": 1} if format == "PNG" else {}))
    return buffer.getvalue()


def write_tar(path, members):
    """A tar of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_folder(folder, captions):
    """A folder of 16 x 16 pictures with a metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, caption in enumerate(captions):
        (folder / f"{i:03}.png").write_bytes(picture(i))
        lines.append(json.dumps({"file_name": f"{i:03}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def settings(teacher, source, output, **more):
    """A config."""
    data = {"source": str(source), **more.pop("data", {})}
    tree = {"teacher": {"model": str(teacher)}, "data": data, "output": str(output), **more}
    return PrepareConfig.model_validate(tree)


def inline(job, stop_after=None):
    """Does requests in this process; interrupted where a stage has done as many as `stop_after` says of it."""
    device = torch.device("cpu")

    def execute(stage, requests):
        answer = getattr(stages, stage)(job, device)
        for count, request in enumerate(requests):
            if stop_after and stop_after.get(stage) == count:
                raise KeyboardInterrupt
            yield answer(request)

    return execute


def quiet():
    """A view that nobody sees."""
    return View(Console(file=io.StringIO()))


def prepare(config, stop_after=None):
    """Prepare in this process."""
    job = new_job(config)
    return summary(job) if begin(job) else fill(job, inline(job, stop_after), quiet())
