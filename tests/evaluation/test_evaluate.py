"""Pins what is measured against what, and that evaluation noise is never training noise."""

from __future__ import annotations

import pytest
import torch

from ddil_ray.data import load_images
from ddil_ray.errors import ConfigError
from ddil_ray.evaluation import Benchmark, exported_sampler, student_samplers, teacher_sampler, train_features
from ddil_ray.objectives import LatentConsistency, ProgressiveDistillation
from ddil_ray.testing import tiny_model

DATA = load_images("digits")


@pytest.fixture(scope="module")
def benchmark():
    model = tiny_model()
    reference = teacher_sampler(model.expert(guided=True), model.schedule, 8, w=1.0)
    features = train_features(DATA, epochs=1)
    return Benchmark(DATA, reference=reference, num_samples=64, seed=7, features=features)


def test_the_reference_has_no_paired_error_and_others_do(benchmark):
    model = tiny_model()
    same, fewer = (teacher_sampler(model.expert(guided=True), model.schedule, n, w=1.0) for n in (8, 2))
    assert benchmark.measure(benchmark.samples(same))["paired_error"] == 0
    assert benchmark.measure(benchmark.samples(fewer))["paired_error"] > 0


def test_held_out_teacher_samples_are_from_other_noise(benchmark):
    assert float((benchmark.teacher_held_out - benchmark.teacher_paired).abs().max()) > 0.1


def test_data_measures_close_to_data_and_constant_samples_show_no_spread(benchmark):
    good = benchmark.measure(DATA.images[:64])
    flat = benchmark.measure(torch.zeros(64, 1, 8, 8))
    assert good["frechet_data"] < flat["frechet_data"]
    assert good["coverage"] > 5 * flat["coverage"]
    assert flat["spread"] == 0.0


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
