"""Pins what of a network is trained, and what its copies share."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from ddil_ray.models import Lora, student_of
from ddil_ray.objectives.critic import Critic
from ddil_ray.testing import tiny_model
from ddil_ray.trained import (
    copy_network,
    is_adapted,
    load_trained_state,
    set_trainable,
    trained_parameters,
    trained_state,
)

LORA = Lora(rank=2, alpha=2, target_modules=("inside", "outside"))
ADAPTERS = {f"{layer}.lora_{part}.default.weight" for layer in ("inside", "outside") for part in "AB"}


def adapted_network():
    return student_of(tiny_model(), lora=LORA).network


def test_of_a_plain_network_everything_is_trained():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = trained_state(network)
    assert list(state) == list(network.state_dict())
    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in network.state_dict().items())
    assert list(trained_parameters(network)) == list(network.parameters())
    assert not is_adapted(network)


def test_of_an_adapted_network_the_adapters_are():
    network = adapted_network()
    assert set(trained_state(network)) == ADAPTERS
    assert {name for name, p in network.named_parameters() if p.requires_grad} == ADAPTERS
    assert is_adapted(network)


def test_a_copy_shares_the_base_and_nothing_else():
    """Also after both have crossed to another process together, as samplers do."""
    network = adapted_network()
    copied, adapters = copy_network(network), trained_state(network)
    for one, other in ((network, copied), pickle.loads(pickle.dumps((network, copied)))):
        for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert (mine.data_ptr() == theirs.data_ptr()) == (name not in adapters)
    plain = tiny_model().network
    assert all(
        mine.data_ptr() != theirs.data_ptr()
        for mine, theirs in zip(plain.parameters(), copy_network(plain).parameters(), strict=True)
    )


def test_the_head_of_a_critic_on_an_adapted_network_is_trained_beside_the_adapters():
    x_t, zero = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    critic = Critic(copy_network(adapted_network()), layer="inside", example=(x_t, zero, zero.long(), zero))
    expected = {f"network.{name}" for name in ADAPTERS} | {f"head.{name}" for name in critic.head.state_dict()}
    assert set(trained_state(critic)) == expected
    assert {name for name, p in set_trainable(critic).named_parameters() if p.requires_grad} == expected
    assert not any(p.requires_grad for p in set_trainable(critic, False).parameters())


def test_a_state_goes_into_a_network_of_its_kind_alone():
    source, target = adapted_network(), adapted_network()
    for parameter in trained_parameters(source):
        nn.init.normal_(parameter)
    load_trained_state(target, pickle.loads(pickle.dumps(trained_state(source))))
    assert all(torch.equal(a, b) for a, b in zip(trained_parameters(source), trained_parameters(target), strict=True))
    with pytest.raises(KeyError, match="same kind of network"):
        load_trained_state(tiny_model().network, trained_state(source))
