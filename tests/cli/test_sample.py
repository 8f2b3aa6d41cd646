"""Pins `ddil-ray sample`: the images of the folder's own pipeline, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from commands import run
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import save_pipeline

from ddil_ray.export import consistency_scheduler, save_model_folder
from ddil_ray.models import load_model, student_of

PROMPTS = ["a red bird", "two boats"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher of prompts, and consistency students that are, and are not, told guidance."""
    place = tmp_path_factory.mktemp("sample")
    teacher = load_model(str(save_pipeline("stable_diffusion", place)))
    told = student_of(teacher, guidance_embedding=True)
    torch.nn.init.normal_(told.network.denoiser.time_embedding.cond_proj.weight)
    for name, model in (("student", teacher), ("told", told)):
        scheduler = consistency_scheduler(model, original_inference_steps=50)
        save_model_folder(place / name, model, scheduler=scheduler, name="s", description="d", steps=4)
    return {"teacher": place / "pipeline", "student": place / "student", "told": place / "told"}


def _tiles(path, size, columns):
    """Images (N, H, W, C) of a grid, N a multiple of `columns`."""
    with Image.open(path) as opened:
        sheet = np.asarray(opened).astype(int)
    sheet = sheet.reshape(*sheet.shape[:2], -1)
    scale = sheet.shape[1] // (columns * (size + 1))
    sheet = sheet[::scale, ::scale]
    rows = sheet.shape[0] // (size + 1)
    tiles = sheet.reshape(rows, size + 1, columns, size + 1, -1).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * columns, size + 1, size + 1, -1)[:, :size, :size]


def _pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("folder", "options", "call"),
    [
        (
            "teacher",
            ["--guidance", 3, "--negative-prompt", "rain"],
            {"guidance_scale": 4.0, "negative_prompt": ["rain"] * 4},
        ),
        ("teacher", [], {"guidance_scale": 1.0}),
        ("student", [], {"guidance_scale": 1.0}),
        ("told", ["--guidance", 2], {"guidance_scale": 3.0}),
    ],
)
def test_prompts_give_the_images_of_the_pipeline(capsys, tmp_path, folders, folder, options, call):
    """Of the same seed, within one level of 255 in nearly every value."""
    out, words = tmp_path / "grid.png", [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    arguments = (folders[folder], *words, "--num", 4, "--seed", 3, "--out", out, "--json", *options)
    code, printed, _ = run(capsys, "sample", *arguments)
    assert code == 0
    assert json.loads(printed) == {"out": str(out), "num": 4, "steps": 4, "prompts": PROMPTS}
    theirs = _pipeline(folders[folder])(
        prompt=PROMPTS * 2, num_inference_steps=4, generator=torch.manual_seed(3), output_type="np", **call
    ).images
    difference = np.abs(_tiles(out, 16, columns=2) - (theirs * 255).round())
    assert difference.max() <= 2
    assert (difference <= 1).mean() > 0.99


def test_classes_give_the_images_of_the_pipeline(capsys, tmp_path):
    """From fresh noise at every step, which is not that of the start."""
    model, out = load_model("builtin:digits"), tmp_path / "grid.png"
    scheduler = consistency_scheduler(model, original_inference_steps=4)
    save_model_folder(tmp_path / "s", model, scheduler=scheduler, name="s", description="d", steps=4)
    assert run(capsys, "sample", tmp_path / "s", "--num", 10, "--out", out)[0] == 0
    theirs = _pipeline(tmp_path / "s")(
        batch_size=10,
        class_labels=list(range(10)),
        num_inference_steps=4,
        generator=torch.manual_seed(0),
        output_type="np",
    ).images
    assert np.abs(_tiles(out, 8, columns=10) - (theirs * 255).round()).max() <= 1


def test_prompts_of_a_file_come_after_those_given(capsys, tmp_path, folders):
    (tmp_path / "prompts.txt").write_text("rain\n\n  snow\n")
    arguments = ("--prompt", "a cat", "--prompt-file", tmp_path / "prompts.txt", "--steps", 1, "--device", "cpu")
    code, out, _ = run(capsys, "sample", folders["student"], *arguments, "--out", tmp_path / "grid.png", "--json")
    assert code == 0
    assert json.loads(out)["prompts"] == ["a cat", "rain", "snow"]
    assert json.loads(out)["num"] == 12


@pytest.mark.parametrize(
    ("folder", "options", "expected"),
    [
        ("teacher", [], "`--prompt` must be given for this model"),
        ("teacher", ["--prompt", "a", "--class-label", 1], "`--class-label` must be left out for this model"),
        ("teacher", ["--prompt", "a", "--negative-prompt", "b"], "`--negative-prompt` must come with `--guidance`"),
        ("student", ["--prompt", "a", "--guidance", 2], "which has its guidance in its weights, but is 2 instead"),
        ("told", ["--prompt", "a"], "`--guidance` must be given for this model"),
        ("teacher", ["--prompt-file", "/nowhere"], "`--prompt-file` must be a text file, but /nowhere failed"),
        ("teacher", ["--prompt", "a", "--device", "abacus"], "`--device` must be auto or a device that torch has"),
        ("teacher", ["--prompt", "a", "--device", "meta"], "`--device` must be auto or a device that torch has"),
        ("builtin:digits", ["--guidance", 1, "--negative-prompt", "b"], "of a model that is asked by text"),
        ("builtin:digits", ["--steps", 2000], "at most the 1000 timesteps of the model's schedule, but are 2000"),
        ("/nowhere/else", [], "MODEL must"),
        ("builtin:digits", ["--prompt", "a"], "`--prompt` must be left out for this model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(capsys, tmp_path, folders, folder, options, expected):
    code, _, err = run(capsys, "sample", folders.get(folder, folder), *options, "--out", tmp_path / "grid.png")
    assert code == 2
    assert expected in err
    assert not (tmp_path / "grid.png").exists()
