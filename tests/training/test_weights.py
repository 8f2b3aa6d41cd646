"""Pins the form in which weights travel."""

from __future__ import annotations

import torch
from torch import nn

from ddil_ray.testing import tiny_model
from ddil_ray.training.wire import Snapshot, flatten_weights, load_weights


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


def test_loading_shares_memory_where_nothing_must_be_converted():
    """So that a node holds a student once, however many actors roll it out."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    flat = flatten_weights(network)
    flat["torch.float32"].flags.writeable = False  # as Ray hands it out
    load_weights(network, flat)
    assert network[0].weight.data_ptr() == flat["torch.float32"].ctypes.data
    assert network.eval()(torch.ones(2, 3)).isfinite().all()


def test_weights_that_travel_as_bfloat16_take_half_the_bytes_and_are_rounded():
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    flat = Snapshot(source.state_dict().values(), float32_as=torch.bfloat16).on_host()
    assert flat["torch.float32"].nbytes * 2 == flatten_weights(source)["torch.float32"].nbytes
    target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).double())
    load_weights(target, flat)
    assert torch.equal(target[0].weight, source[0].weight.bfloat16().float())
    assert torch.equal(target[2].weight, source[2].weight)
    assert target[0].weight.dtype == torch.float32


def test_a_snapshot_over_another_takes_its_memory():
    network = nn.Linear(3, 4)
    old = Snapshot(network.state_dict().values())
    before = old.on_host()["torch.float32"]
    network.weight.data.add_(1)
    new = Snapshot(network.state_dict().values(), over=old).on_host()["torch.float32"]
    assert new.ctypes.data == before.ctypes.data
    assert (new == flatten_weights(network)["torch.float32"]).all()
