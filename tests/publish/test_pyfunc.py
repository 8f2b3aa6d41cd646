"""Pins a student as MLflow loads it: what it takes, whose images it gives, and that it is data alone."""

from __future__ import annotations

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from mlflow.exceptions import MlflowException
from registered import save_pixel_student
from tiny import save_pipeline

from ddil_ray.errors import ConfigError
from ddil_ray.export import consistency_scheduler, save_model_folder
from ddil_ray.models import load_model, student_of
from ddil_ray.publish.pyfunc import save_student


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Pipelines of prompts, of prompts and told guidance, of classes, and of neither."""
    place = tmp_path_factory.mktemp("students")
    teacher = load_model(str(save_pipeline("stable_diffusion", place)))
    told = student_of(teacher, guidance_embedding=True)
    torch.nn.init.normal_(told.network.denoiser.time_embedding.cond_proj.weight)
    for name, model in (("prompts", teacher), ("told", told)):
        scheduler = consistency_scheduler(model, original_inference_steps=50)
        save_model_folder(place / name, model, scheduler=scheduler, name="s", description="d", steps=4)
    digits = load_model("builtin:digits")
    scheduler = consistency_scheduler(digits, original_inference_steps=4)
    save_model_folder(place / "classes", digits, scheduler=scheduler, name="s", description="d", steps=4)
    save_pixel_student(place / "neither", classes=None)
    return place


@pytest.fixture
def loaded(students, tmp_path):
    """Loads a student by MLflow, from what is registered of it."""

    def load(name, steps=4, w=0.0):
        save_student(tmp_path / name, students / name, steps=steps, w=w)
        return mlflow.pyfunc.load_model(str(tmp_path / name))

    return load


def _of_the_pipeline(folder, **call):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return (pipeline(output_type="np", **call).images * 255).round()


def _orders(**columns):
    return pd.DataFrame(columns)


def test_prompts_give_the_images_of_the_pipeline_row_after_row(loaded, students):
    images = loaded("prompts").predict(_orders(prompt=["a red bird", "rain"], num_images=[1, 2]), params={"seed": 3})
    theirs = _of_the_pipeline(
        students / "prompts",
        prompt=["a red bird", "rain", "rain"],
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.manual_seed(3),
    )
    assert (images.shape, images.dtype) == ((3, 16, 16, 3), np.uint8)
    difference = np.abs(images.astype(int) - theirs)
    assert difference.max() <= 2
    assert (difference <= 1).mean() > 0.99


def test_classes_give_the_images_of_the_pipeline(loaded, students):
    images = loaded("classes").predict(_orders(num_images=[2, 1], class_label=[7, 4]))
    theirs = _of_the_pipeline(
        students / "classes",
        batch_size=3,
        class_labels=[7, 7, 4],
        num_inference_steps=4,
        generator=torch.manual_seed(0),
    )
    assert np.abs(images.astype(int) - theirs.reshape(images.shape)).max() <= 1


def test_without_a_label_classes_come_in_turn(loaded):
    student = loaded("classes")
    in_turn = student.predict(_orders(num_images=[7, 5]))
    named = student.predict(_orders(num_images=[1] * 12, class_label=[*range(10), 0, 1]))
    assert np.array_equal(in_turn, named)


def test_seed_and_steps_decide_and_a_call_leaves_nothing_for_the_next(loaded):
    student, orders = loaded("prompts"), _orders(prompt=["rain"], num_images=[2])
    first = student.predict(orders)
    other = student.predict(_orders(prompt=["snow", "two boats"], num_images=[1, 1]), params={"seed": 1, "steps": 1})
    assert not np.array_equal(first, other)
    assert np.array_equal(first, student.predict(orders, params={"seed": 0, "steps": 4}))


def test_guidance_is_that_of_the_run_unless_it_is_told(loaded):
    student, orders = loaded("told", w=2.0), _orders(prompt=["rain"], num_images=[1])
    usual = student.predict(orders)
    assert np.array_equal(usual, student.predict(orders, params={"guidance": 2.0}))
    assert not np.array_equal(usual, student.predict(orders, params={"guidance": 0.0}))


@pytest.mark.parametrize(
    ("name", "columns", "params"),
    [
        ("prompts", {"num_images": True, "prompt": True}, ["seed", "steps"]),
        ("told", {"num_images": True, "prompt": True}, ["seed", "steps", "guidance"]),
        ("classes", {"num_images": True, "class_label": False}, ["seed", "steps"]),
        ("neither", {"num_images": True}, ["seed", "steps"]),
    ],
)
def test_the_signature_says_what_a_student_takes(loaded, name, columns, params):
    signature = loaded(name, steps=2).metadata.signature
    assert {column.name: column.required for column in signature.inputs} == columns
    assert [param.name for param in signature.params] == params
    assert next(param.default for param in signature.params if param.name == "steps") == 2
    (images,) = signature.outputs
    assert images.shape == ((-1, 16, 16, 3) if name in ("prompts", "told") else (-1, 8, 8, 1))


@pytest.mark.parametrize(
    ("name", "orders", "params", "error", "expected"),
    [
        ("prompts", {"num_images": [1]}, {}, MlflowException, "(?s)missing.*prompt"),
        ("prompts", {"num_images": ["two"], "prompt": ["a"]}, {}, MlflowException, "num_images"),
        ("neither", {"num_images": [1]}, {"seed": "x"}, MlflowException, "seed"),
        ("neither", {"num_images": [0]}, {}, ConfigError, r"`num_images` must be at least 1 in each row, but is \[0\]"),
        ("neither", {"num_images": [1]}, {"steps": 0}, ConfigError, "`steps` must be at least 1, but is 0 instead"),
        ("classes", {"num_images": [1]}, {"steps": 5}, ConfigError, "`--steps` must be at most 4"),
        ("classes", {"num_images": [1], "class_label": [10]}, {}, ConfigError, "`class_label` must be from 0 to 9"),
    ],
)
def test_what_a_student_cannot_have_is_refused(loaded, name, orders, params, error, expected):
    with pytest.raises(error, match=expected):
        loaded(name).predict(_orders(**orders), params=params)


def test_what_is_registered_is_data_that_a_module_of_this_package_reads(students, tmp_path):
    save_student(tmp_path / "m", students / "classes", steps=1, w=0.0)
    kinds = {path.suffix for path in (tmp_path / "m").rglob("*") if path.is_file() and path.name != "MLmodel"}
    assert kinds == {".safetensors", ".json", ".md", ".yaml", ".txt"}
    (flavour,) = yaml.safe_load((tmp_path / "m" / "MLmodel").read_text())["flavors"].items()
    assert flavour[0] == "python_function"
    assert flavour[1]["loader_module"] == "ddil_ray.publish.pyfunc"
    assert flavour[1]["code"] is None
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "m").rglob("*.yaml"))
    needs = (tmp_path / "m" / "requirements.txt").read_text().split()
    assert {need.partition("==")[0] for need in needs} >= {"ddil-ray", "diffusers", "mlflow", "torch"}


def test_pickled_weights_in_a_registered_student_are_refused(students, tmp_path):
    save_student(tmp_path / "m", students / "classes", steps=1, w=0.0)
    (weights,) = (tmp_path / "m").rglob("unet/*.safetensors")
    torch.save({"weight": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        mlflow.pyfunc.load_model(str(tmp_path / "m"))
