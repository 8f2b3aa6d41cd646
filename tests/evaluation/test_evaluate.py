"""Pins what is measured against what."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import (
    Benchmark,
    Instruments,
    exported_sampler,
    most_steps,
    student_samplers,
    teacher_sampler,
    train_features,
)
from ddil_ray.models import load_model
from ddil_ray.objectives import LatentConsistency, ProgressiveDistillation
from ddil_ray.testing import tiny_model

DATA = load_images("digits")


def _sampler(steps):
    model = tiny_model()
    return teacher_sampler(model.expert(guided=True), model, steps, w=1.0)


@dataclass(frozen=True)
class Painter:
    """A sampler that shows the same pictures whatever the noise."""

    images: torch.Tensor

    def __call__(self, noise, cond, *, seed, batch_size):
        return self.images[: len(noise)]


@pytest.fixture(scope="module")
def benchmark():
    instruments = Instruments(train_features(DATA, epochs=1))
    return Benchmark(DATA, reference=_sampler(8), num_samples=64, seed=7, instruments=instruments)


def test_data_measures_close_to_data_and_constant_samples_show_no_variety(benchmark):
    shown = {"good": {1: Painter(DATA.images[:64])}, "flat": {1: Painter(torch.zeros(64, 1, 8, 8))}}
    measured = benchmark.measure(shown).measured
    good, flat = (measured[name][1].scores for name in ("good", "flat"))
    assert good["frechet_data"] < flat["frechet_data"]
    assert good["coverage"] > 5 * flat["coverage"]
    assert flat["vendi"] == pytest.approx(1)
    assert good["vendi"] > 1.5


def test_the_reference_has_no_paired_error_and_fewer_steps_have(benchmark):
    measurements = benchmark.measure({"teacher": {8: _sampler(8), 2: _sampler(2)}})
    scores = {n: m.scores["paired_error"] for n, m in measurements.measured["teacher"].items()}
    assert scores[8] == 0
    assert scores[2] > 0
    assert torch.equal(measurements.reference, measurements.measured["teacher"][8].first)


def test_classes_are_as_frequent_as_in_the_data(benchmark):
    rows = benchmark.measure({"teacher": {2: _sampler(2)}}).measured["teacher"][2].classes
    assert [row["class"] for row in rows] == list(range(10))
    assert sum(row["count"] for row in rows) == 64


def test_a_reader_is_told_what_was_measured_how(benchmark):
    about = benchmark.describe()
    assert "classifier of digits" in about["features"]
    assert {k: about[k] for k in ("num_samples", "image_size", "resized", "k", "seed")} == {
        "num_samples": 64, "image_size": 8, "resized": False, "k": 5, "seed": 7
    }  # fmt: skip


def test_rounds_are_sampled_at_their_own_steps_only():
    model = tiny_model()
    pd = ProgressiveDistillation(model.schedule, teacher_steps=8, student_steps=(4, 2))
    assert list(student_samplers(pd, {4: model, 2: model}, (1, 2, 4, 8), w=0.0)) == [2, 4]
    lcm = LatentConsistency(model.schedule)
    assert list(student_samplers(lcm, {4: model}, (1, 2, 8), w=0.0)) == [1, 2, 8]


def test_more_steps_than_the_grid_are_refused():
    model = tiny_model()
    model.scheduler_config = {"_class_name": "LCMScheduler", "original_inference_steps": 10}
    with pytest.raises(ConfigError, match=r"`--steps` must be at most 10.*but is 11"):
        exported_sampler(model, 11)
    assert most_steps(model) == 10
    assert most_steps(tiny_model()) is None


def test_more_steps_than_timesteps_are_refused():
    model = load_model("builtin:digits")
    assert teacher_sampler(model.expert(guided=True), model, 1000, w=0.0).times[-2] == 1e-3
    for sampler in (lambda: exported_sampler(model, 1001), lambda: teacher_sampler(model.denoiser(), model, 2000, w=0)):
        with pytest.raises(ConfigError, match=r"at most the 1000 timesteps of the model's schedule, but are"):
            sampler()
