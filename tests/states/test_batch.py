"""Pins the last gate before training: no block with a column missing, of another kind, or that would spoil weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ddil_ray.errors import StateError
from ddil_ray.states.batch import Origin, StateBatch

ROWS = 6


def block(**changes):
    """Labelled student states of 1 x 4 x 4."""
    good = StateBatch(
        x_t=torch.randn(ROWS, 1, 4, 4),
        t=torch.linspace(0, 1, ROWS, dtype=torch.float64),
        cond=torch.arange(ROWS),
        w=torch.ones(ROWS),
        origin=torch.full((ROWS,), int(Origin.STUDENT), dtype=torch.int8),
        version=torch.zeros(ROWS, dtype=torch.int64),
        phase=torch.zeros(ROWS, dtype=torch.int64),
        label=torch.randn(ROWS, 1, 4, 4),
    )
    return replace(good, **changes)


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


def test_what_is_right_passes():
    batch = block()
    StateBatch.from_columns(batch.to_columns()).check(origin=Origin.STUDENT, phase=0, sample_shape=(1, 4, 4))
    unlabelled = block(label=torch.zeros(ROWS, 0))
    unlabelled.check(origin=Origin.STUDENT, phase=0, sample_shape=(1, 4, 4), labelled=False)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("x_t", None, r"`states` must have the columns x_t, t, .* but x_t are missing: there are t, cond"),
        ("label", None, r"but label are missing"),
        ("x_t", np.array([None] * ROWS, dtype=object), r"`x_t` .* is object of shape"),
        ("x_t", np.zeros((ROWS, 4)), r"`x_t` of states must be float32 of shape \(6, \.\.\.\), but is float64"),
        ("x_t", np.zeros((ROWS - 1, 4), np.float32), r"`x_t` .* but is float32 of shape \(5, 4\)"),
        ("t", np.zeros(ROWS, np.float32), r"`t` of states must be float64 of shape \(6,\), but is float32"),
        ("cond", np.zeros((ROWS, 2), np.int64), r"`cond` .* but is int64 of shape \(6, 2\)"),
        ("origin", np.zeros(ROWS), r"`origin` of states must be int8"),
        ("label", np.zeros(ROWS, np.float32), r"`label` .* of shape \(6, \.\.\.\), but is float32 of shape \(6,\)"),
    ],
)
def test_columns_of_another_kind_are_refused_by_name(column, value, expected):
    columns = block().to_columns()
    columns[column] = value
    with pytest.raises(StateError, match=expected):
        StateBatch.from_columns({name: part for name, part in columns.items() if part is not None})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("x_t", float("nan"), r"`x_t` of a block of student states .* with 1 times NaN or infinity instead"),
        ("x_t", float("inf"), r"finite and of shape \(1, 4, 4\), but is of shape \(1, 4, 4\) with 1 times NaN"),
        ("label", float("-inf"), r"`label` .* there and finite"),
        ("t", 1.5, r"`t` .* in \[0, 1\], but is 0, 0.2, 0.4, \.\.\. instead"),
        ("t", float("nan"), r"`t` .* NaN or infinity"),
        ("w", float("nan"), r"`w` .* finite"),
        ("origin", int(Origin.TEACHER), r"`origin` .* must be 1, but is 1, 2 instead"),
        ("phase", 3, r"`phase` .* must be 0, but is 0, 3 instead"),
    ],
)
def test_values_that_nothing_can_be_learnt_from_are_refused(field, value, expected):
    batch = block()
    batch = replace(batch, **{field: with_value(getattr(batch, field), value)})
    with pytest.raises(StateError, match=expected) as caught:
        batch.check(origin=Origin.STUDENT, phase=0, sample_shape=(1, 4, 4))
    assert caught.value.exit_code == 1


def test_states_of_another_size_and_without_labels_are_refused():
    with pytest.raises(StateError, match=r"of shape \(1, 8, 8\), but is of shape \(1, 4, 4\)"):
        block().check(origin=Origin.STUDENT, phase=0, sample_shape=(1, 8, 8))
    with pytest.raises(StateError, match=r"`label` .* there"):
        block(label=torch.zeros(ROWS, 0)).check(origin=Origin.STUDENT, phase=0, sample_shape=(1, 4, 4))
