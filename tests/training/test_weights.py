"""Pins the form in which weights travel."""

from __future__ import annotations

import torch
from torch import nn

from ddil_ray.testing import tiny_model
from ddil_ray.training.weights import flatten_weights, load_weights


def test_weights_of_several_dtypes_come_back_bit_for_bit():
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    source[1].num_batches_tracked.fill_(7)
    target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    flat = flatten_weights(source)
    assert set(flat) == {"torch.float32", "torch.int64", "torch.float64"}
    load_weights(target, flat)
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_the_copy_does_not_change_when_the_network_does():
    network = tiny_model().network
    flat = flatten_weights(network)
    before = {k: v.copy() for k, v in flat.items()}
    for parameter in network.parameters():
        parameter.data.add_(1)
    assert all((flat[k] == before[k]).all() for k in flat)
