"""Pins `ddil-ray export`: copies, other precisions, ONNX, and what reaches the hub."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from commands import run
from diffusers import DiffusionPipeline
from hub import local_hub
from safetensors.torch import load_file
from tiny import save_pipeline

from ddil_ray.export import consistency_scheduler, save_model_folder
from ddil_ray.models import load_model
from ddil_ray.models.unet import new_unet, unet_model


@pytest.fixture(scope="module")
def student_run(tmp_path_factory):
    """A run folder with a student of prompts."""
    folder = tmp_path_factory.mktemp("runs") / "sd"
    model = load_model(str(save_pipeline("stable_diffusion", folder / "teacher")))
    scheduler = consistency_scheduler(model, original_inference_steps=50)
    save_model_folder(folder / "student", model, scheduler=scheduler, name="s", description="d", steps=4)
    return folder


@pytest.fixture(scope="module")
def pixel_student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    unet = new_unet(sample_shape=(1, 8, 8), num_classes=10, block_out_channels=(8, 16))
    model = unet_model(unet, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    save_model_folder(folder, model, name="s", description="d", steps=4)
    return folder


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_student_of_a_run_is_copied(capsys, monkeypatch, tmp_path, student_run):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "export", student_run, "--json")
    assert code == 0
    assert json.loads(out) == {"folder": "exports/sd"}
    assert _files(tmp_path / "exports" / "sd") == _files(student_run / "student")
    code, _, err = run(capsys, "export", student_run / "student")
    assert code == 2
    assert "`--out` must be a new or empty folder, but exports/sd holds files" in err


def test_a_half_precision_copy_loads_by_its_card_and_here(capsys, tmp_path, student_run):
    out = tmp_path / "half"
    assert run(capsys, "export", student_run, "--dtype", "fp16", "--variant", "--out", out)[0] == 0
    names = {p.relative_to(out).as_posix() for p in out.rglob("*.safetensors")}
    assert names == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
    }
    assert {v.dtype for n in names for v in load_file(out / n).values() if v.is_floating_point()} == {torch.float16}
    card = (out / "README.md").read_text()
    assert "cast to fp16" in card
    (load,) = re.findall(r"DiffusionPipeline.from_pretrained\(.*\)", card)
    names = {"DiffusionPipeline": DiffusionPipeline, "torch": torch}
    pipeline = eval(load.replace("path/to/this/folder", str(out)), names)
    assert pipeline.unet.dtype == torch.float16
    half, full = load_model(str(out)), load_model(str(student_run / "student"))
    torch.testing.assert_close(half.network.state_dict(), full.network.state_dict(), rtol=2e-3, atol=1e-6)
    embedded = (m.family.text_encoder(m.folder)(["a cat"])["prompt"] for m in (half, full))
    torch.testing.assert_close(*embedded, rtol=0, atol=1e-2)
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(half.codec.decode(latents), full.codec.decode(latents), rtol=0, atol=1e-2)
    assert str(tmp_path) not in "".join(p.read_text() for p in out.rglob("*.json"))


def test_all_of_a_folder_is_committed_to_the_hub(capsys, monkeypatch, tmp_path, pixel_student):
    with local_hub(monkeypatch) as hub:
        arguments = ("export", pixel_student, "--out", tmp_path, "--push", "me/digits", "--private", "--json")
        code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert json.loads(out)["hub"] == f"{hub.url}/me/digits"
    assert [(r["organization"], r["name"], r["visibility"]) for r in hub.created] == [("me", "digits", "private")]
    assert hub.files == {f"me/digits/{name}": content for name, content in _files(tmp_path).items()}
    assert b'from_pretrained("me/digits")' in hub.files["me/digits/README.md"]
    assert hub.tokens == {"Bearer hf_of-tests"}


def test_a_hub_out_of_reach_leaves_the_folder(capsys, monkeypatch, tmp_path, pixel_student):
    with local_hub(monkeypatch):
        pass
    code, _, err = run(capsys, "export", pixel_student, "--out", tmp_path, "--push", "me/digits")
    assert code == 1
    assert "Pushing to me/digits failed" in err
    assert f"hf upload me/digits {tmp_path}" in err
    assert (tmp_path / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variant"], "`--variant` must come with `--dtype` fp16 or bf16"),
        (["--private"], "`--private` must come with `--push`"),
        (["--push", "a/b/c"], "`--push` must be owner/name, but is 'a/b/c' instead"),
        (["--push", "me/digits"], "`--push` must have a token of the hub"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(
    capsys, monkeypatch, tmp_path, pixel_student, arguments, expected
):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = run(capsys, "export", pixel_student, "--out", tmp_path / "out", *arguments)
    assert code == 2
    assert expected in err
    assert not (tmp_path / "out").exists()


def test_a_copy_inside_its_source_is_refused(capsys, pixel_student):
    code, _, err = run(capsys, "export", pixel_student, "--out", pixel_student / "unet" / "copy")
    assert code == 2
    assert "`--out` must not lie in the folder that is exported" in err
    assert not (pixel_student / "unet" / "copy").exists()


def test_a_folder_that_is_no_pipeline_is_refused(capsys, tmp_path):
    code, _, err = run(capsys, "export", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "MODEL must be a run folder with a student, or a diffusers pipeline folder" in err


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["student_run", "pixel_student"])
def test_onnx_computes_what_torch_computes(capsys, tmp_path, request, folder):
    import onnxruntime

    code, out, _ = run(capsys, "export", request.getfixturevalue(folder), "--onnx", "--out", tmp_path, "--json")
    assert code == 0
    session = onnxruntime.InferenceSession(json.loads(out)["onnx"], providers=["CPUExecutionProvider"])
    unet = load_model(str(tmp_path)).network.denoiser
    card = (tmp_path / "README.md").read_text()
    rng = np.random.default_rng(0)
    for batch in (1, 5):
        feed = {}
        for given in session.get_inputs():
            assert f"| `{given.name}` | {' x '.join(map(str, given.shape))} |" in card
            shape = [batch, *given.shape[1:]]
            labels = given.name == "class_labels"
            feed[given.name] = rng.integers(0, 10, shape) if labels else rng.normal(size=shape).astype(np.float32)
        (theirs,) = session.run(None, feed)
        ours = unet(**{name: torch.from_numpy(part) for name, part in feed.items()}).sample
        torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), rtol=0, atol=1e-3)
