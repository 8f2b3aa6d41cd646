"""Comparing what was measured twice."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import torch

__all__ = ["assert_same"]


def assert_same(first, second):
    """Assert that two results agree, bit for bit, in every tensor and number."""
    assert type(first) is type(second)
    if is_dataclass(first):
        for field in fields(first):
            assert_same(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert_same(value, second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second
