"""Pins that a block's noises come from (seed, block) alone and are never those of training."""

from __future__ import annotations

import itertools

import torch

from ddil_ray.evaluation.blocks import Blocks, Use
from ddil_ray.states.batch import Origin
from ddil_ray.states.source import StateRequest

LABELS = torch.arange(5).repeat(10)


def _blocks(num_samples=230, batch_size=32, seed=3):
    return Blocks(LABELS, (1, 4, 4), num_samples, batch_size, seed)


def test_blocks_have_all_rows_once():
    blocks = _blocks()
    assert [row for b in range(len(blocks)) for row in blocks.rows(b)] == list(range(230))
    assert [len(blocks.conditions(b)) for b in range(len(blocks))] == [32] * 7 + [6]


def test_a_block_is_the_same_however_many_there_are():
    few, many = _blocks(num_samples=64), _blocks(num_samples=6400)
    for use in (Use.PAIRED, Use.HELD_OUT):
        assert torch.equal(few.noise(1, use), many.noise(1, use))
    assert torch.equal(few.conditions(1), many.conditions(1))
    assert few.key(1, Use.STEPS) == many.key(1, Use.STEPS)


def test_conditions_are_as_frequent_as_in_the_data_over_every_walk():
    for batch_size in (7, 50, 120):
        blocks = _blocks(num_samples=200, batch_size=batch_size)
        cond = torch.cat([blocks.conditions(b) for b in range(len(blocks))])
        assert all(walk.bincount().tolist() == [10] * 5 for walk in cond.split(50))
        assert not torch.equal(cond[:50], cond[50:100])


def test_every_noise_is_drawn_once():
    keys = [_blocks(seed=s).key(b, use) for s in range(3) for b in range(100) for use in Use]
    assert len(set(keys)) == len(keys)


def test_no_training_request_has_an_evaluation_noise_for_equal_seeds():
    ours, theirs = {}, {}
    for seed in (0, 1, 7, 1_000_003, 0x6576616C):
        blocks = _blocks(num_samples=1600, seed=seed)
        ours |= {blocks.key(b, use): blocks.noise(b, use) for b in range(50) for use in Use}
        for phase, origin, index in itertools.product(range(5), Origin, range(50)):
            generator = StateRequest(origin, phase, index, 32, seed).generator()
            theirs[generator.initial_seed()] = torch.randn(32, 1, 4, 4, generator=generator)
    assert not set(ours) & set(theirs)
    starts, others = ({tuple(n.flatten()[:8].tolist()) for n in noises.values()} for noises in (ours, theirs))
    assert (len(starts), len(others)) == (len(ours), len(theirs))
    assert not starts & others
