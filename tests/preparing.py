"""Small sources of images and captions, and preparing them without Ray."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from tiny import PROMPTS

from ddil_ray.config.prepare import PrepareConfig
from ddil_ray.data import load_images
from ddil_ray.models import find_pipeline
from ddil_ray.prepare import begin, fill, new_job, stages, summary
from ddil_ray.tracking import View

__all__ = [
    "assert_every_row_once",
    "encode",
    "inline",
    "kill_after",
    "picture",
    "prepare",
    "prepared",
    "quiet",
    "settings",
    "start",
    "write_folder",
    "write_pairs",
    "write_tar",
]


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


def prepared(teacher, folder, *, rows=16):
    """The folder of data prepared for a tiny teacher: pictures with `PROMPTS`, or in folders of as many classes."""
    family, _ = find_pipeline(str(teacher))
    if family.prompted:
        write_folder(folder / "source", [PROMPTS[i % len(PROMPTS)] for i in range(rows)])
    else:
        for i in range(rows):
            place = folder / "source" / f"class {i % len(PROMPTS)}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(picture(i))
    return prepare(settings(teacher, folder / "source", folder / "prepared", dtype="fp32")).output


def write_pairs(folder, pairs, *, tars, captions):
    """`pairs` images of one colour with captions of `captions` different texts; the colour tells the number."""
    folder.mkdir()
    for t in range(tars):
        members = {}
        for i in range(t, pairs, tars):
            members[f"{i:05}.png"] = encode(np.full((16, 16, 3), [i % 256, i // 256, 0], dtype=np.uint8))
            members[f"{i:05}.txt"] = f"caption {i % captions}".encode()
        write_tar(folder / f"{t}.tar", members)


def assert_every_row_once(output, pairs, captions):
    """The rows are those of `write_pairs`, once each, with the prompt of their caption."""
    texts = load_images(str(output)).prompts.texts()
    assert sorted(texts) == sorted({f"caption {i}" for i in range(captions)})
    files = list((output / "latents" / "16x16").iterdir())
    rows = [row for f in files for row in pq.read_table(f, columns=["source", "cond"]).to_pylist()]
    counts = Counter(int(row["source"].rpartition("/")[2]) for row in rows)
    assert counts == Counter(range(pairs))
    assert all(texts[row["cond"]] == f"caption {int(row['source'][-5:]) % captions}" for row in rows)
    index = json.loads((output / "dataset.json").read_text())
    assert (index["buckets"], index["prompts"], index["skipped"]) == ({"16x16": pairs}, captions, 0)


def start(script, folder, **environment):
    """A Python script, as a process that leads a group of its own."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, start_new_session=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_after(process, output, items):
    """Kill the process and its group once `items` items are done; what it started must end too."""
    while len(list((output / "work" / "done").glob("*.json"))) < items:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "dataset.json").exists()
    _, alive = psutil.wait_procs(children, timeout=60)
    for child in alive:
        child.kill()
    assert not alive
