"""Pins what is kept of a block: features, errors and the first images, and no other image."""

from __future__ import annotations

import pickle

import pytest
import torch
from measured import assert_same

from ddil_ray.data import load_images
from ddil_ray.evaluation import Benchmark, FeatureNetwork, Instruments, teacher_sampler
from ddil_ray.evaluation.maker import SHOWN, SampleRows
from ddil_ray.testing import tiny_model

DATA = load_images("digits")
FLAT = Instruments(FeatureNetwork(torch.nn.Flatten(), "pixels"))


def _sampler(steps):
    model = tiny_model()
    return teacher_sampler(model.expert(guided=True), model, steps, w=1.0)


@pytest.fixture(scope="module")
def maker():
    return Benchmark(DATA, reference=_sampler(4), num_samples=300, seed=7, batch_size=100, instruments=FLAT).maker


def test_a_block_is_made_twice_the_same_from_its_number_alone(maker):
    once, again = (maker.block(2, {"few": {2: _sampler(2)}}) for _ in range(2))
    assert_same(once, again)
    assert not torch.equal(once.held_out, maker.block(1, {}).held_out)


def test_the_teachers_samples_may_be_given(maker):
    given = maker.block(1, {"few": {2: _sampler(2)}}, maker.teacher(1))
    made = maker.block(1, {"few": {2: _sampler(2)}})
    assert_same(given, made)


def test_images_are_kept_of_the_first_rows_only(maker):
    first, later = (maker.block(b, {"few": {1: _sampler(1), 2: _sampler(2)}}) for b in (0, 1))
    assert [len(b.reference) for b in (first, later)] == [SHOWN, 0]
    assert [len(b.samples["few"][2].first) for b in (first, later)] == [SHOWN, 0]
    rows = later.samples["few"][2]
    kept = sum(value.numel() for value in vars(rows).values())
    assert kept == rows.features.numel() + rows.cond.numel() + rows.paired_error.numel()
    # Tensors that are views would take their whole storage along: a later block is features and little more.
    features = 100 * 64 * 4
    assert len(pickle.dumps(later)) < 3 * features + 2 * 100 * 16 + 10_000


def test_the_reference_has_no_paired_error_and_others_do(maker):
    samples = maker.block(0, {"few": {2: _sampler(2), 4: _sampler(4)}}).samples["few"]
    assert float(samples[4].paired_error.abs().max()) == 0
    assert float(samples[2].paired_error.min()) > 0


def test_held_out_samples_are_from_other_noise_with_the_same_conditions(maker):
    teacher = maker.teacher(0)
    assert float((teacher.held_out - teacher.paired.flatten(1)).abs().amax(1).min()) > 0.1


def test_rows_are_put_together_in_order(maker):
    parts = [maker.block(b, {"few": {2: _sampler(2)}}).samples["few"][2] for b in range(3)]
    whole = SampleRows.cat(parts)
    assert len(whole.features) == len(whole.cond) == 300
    assert torch.equal(whole.features[100:200], parts[1].features)
    assert len(whole.first) == SHOWN
