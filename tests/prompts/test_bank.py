"""Pins the bank: right rows, bounded memory, one for all copies of a network, empty when it arrives."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ddil_ray.errors import DataError
from ddil_ray.models.network import FamilyNetwork
from ddil_ray.prompts import NEGATIVE, HeldEmbeddings, Prompts


def prompts(rows=10, cache_bytes=2**20):
    held = {"prompt": torch.arange(rows * 6.0).reshape(rows, 2, 3), "pooled": torch.arange(rows * 1.0)[:, None]}
    return Prompts(HeldEmbeddings(held), {"prompt": -torch.ones(1, 2, 3), "pooled": -torch.ones(1, 1)}, cache_bytes)


def test_every_row_gets_the_embeddings_of_its_id():
    found = prompts().bank()(torch.tensor([3, NEGATIVE, 3, 0]), torch.zeros(1, dtype=torch.float64))
    assert found["prompt"].dtype == torch.float64
    assert found["prompt"][:, 0, 0].tolist() == [18, -1, 18, 0]
    assert found["pooled"][:, 0].tolist() == [3, -1, 3, 0]


def test_memory_is_bounded_and_the_least_used_goes_first():
    row = (6 + 1) * 4
    bank = prompts(cache_bytes=3 * row).bank()
    for ids in ([0, 1, 2], [0], [3]):
        bank(torch.tensor(ids), torch.zeros(1))
    before = bank.missed
    bank(torch.tensor([0, 2, 3]), torch.zeros(1))
    assert bank.missed == before
    bank(torch.tensor([1]), torch.zeros(1))
    assert bank.missed == before + 1
    assert bank._bytes <= 3 * row


def test_more_rows_than_fit_are_all_given():
    found = prompts(cache_bytes=1).bank()(torch.arange(10), torch.zeros(1))
    assert found["pooled"][:, 0].tolist() == list(range(10))


def test_copies_of_a_network_share_their_bank_and_a_pickled_one_arrives_empty():
    network = FamilyNetwork(nn.Linear(1, 1))
    network.bank = prompts().bank()
    assert copy.deepcopy(network).bank is network.bank
    network.bank(torch.tensor([1]), torch.zeros(1))
    arrived = pickle.loads(pickle.dumps(network.bank))
    assert (arrived.asked, len(arrived._kept)) == (0, 0)
    assert arrived(torch.tensor([1]), torch.zeros(1))["pooled"].tolist() == [[1]]


def test_an_id_without_a_prompt_is_refused():
    with pytest.raises(DataError, match=r"from 0 to 9, but a state has 10"):
        prompts().bank()(torch.tensor([10]), torch.zeros(1))
