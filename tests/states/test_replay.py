"""Pins the replay buffer: capacity, reuse, age, and exact continuation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddil_ray.errors import StaleStateError
from ddil_ray.states.batch import StateBatch
from ddil_ray.states.replay import ReplayBuffer


def rows(count, version=-1, start=0):
    n = torch.arange(start, start + count)
    return StateBatch(
        x_t=n.float()[:, None],
        t=torch.full((count,), 0.5, dtype=torch.float64),
        cond=n,
        w=torch.zeros(count),
        origin=torch.ones(count, dtype=torch.int8),
        version=torch.full((count,), version),
        phase=torch.zeros(count, dtype=torch.int64),
        label=n.float()[:, None],
    )


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_reuse_it_is_a_queue():
    buffer = ReplayBuffer(capacity=100)
    buffer.add(rows(6))
    buffer.add(rows(6, start=6))
    drawn = torch.cat([buffer.draw(4, step=0, generator=_generator()).cond for _ in range(3)])
    assert drawn.tolist() == list(range(12))
    assert len(buffer) == 0


@given(
    capacity=st.integers(1, 30),
    reuse=st.integers(1, 4),
    max_staleness=st.integers(0, 10),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
)
def test_it_never_exceeds_capacity_age_or_reuse(capacity, reuse, max_staleness, sizes):
    buffer = ReplayBuffer(capacity=capacity, reuse=reuse, max_staleness=max_staleness)
    uses: dict[int, int] = {}
    for step, size in enumerate(sizes):
        buffer.add(rows(size, version=step, start=100 * step))
        assert len(buffer) <= capacity
        drawn = buffer.draw(min(3, len(buffer)), step=step, generator=_generator(step))
        assert bool((step - drawn.version <= max_staleness).all())
        for n in drawn.cond.tolist():
            uses[n] = uses.get(n, 0) + 1
    assert max(uses.values()) <= reuse
    assert buffer.received == sum(sizes)


def test_rows_without_weights_never_expire():
    buffer = ReplayBuffer(capacity=10, max_staleness=1)
    buffer.add(rows(4, version=-1))
    assert len(buffer.draw(4, step=1000, generator=_generator())) == 4


def test_only_old_rows_is_an_error_that_says_what_to_do():
    buffer = ReplayBuffer(capacity=10, max_staleness=2)
    buffer.add(rows(4, version=0))
    with pytest.raises(StaleStateError, match=r"at most 2 steps old at step 9.*replay.max_staleness"):
        buffer.draw(2, step=9, generator=_generator())
    assert buffer.expired == 4


def test_a_restored_buffer_draws_on_as_if_nothing_had_happened():
    a = ReplayBuffer(capacity=50, reuse=3)
    a.add(rows(20))
    a.draw(5, step=0, generator=_generator())
    b = ReplayBuffer(capacity=50, reuse=3)
    b.load_state_dict(a.state_dict())
    for seed in range(5):
        left, right = (x.draw(7, step=1, generator=_generator(seed)) for x in (a, b))
        assert left.cond.tolist() == right.cond.tolist()


def test_batches_survive_the_trip_through_columns():
    batch = rows(5, version=3)
    back = StateBatch.from_columns(batch.to_columns())
    for name, values in vars(batch).items():
        assert torch.equal(getattr(back, name), values)
        assert getattr(back, name).dtype == values.dtype
