"""Pins the replay buffer: capacity, reuse, age, and exact continuation."""

from __future__ import annotations

from collections import Counter

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


class Listed:
    """What the buffer is to do, row by row: (number, version, uses) in order of arrival."""

    def __init__(self, *, capacity, reuse, max_staleness):
        self.capacity, self.reuse, self.max_staleness = capacity, reuse, max_staleness
        self.rows, self.counters = [], Counter()

    def add(self, numbers, version):
        self.rows += [[n, version, 0] for n in numbers]
        excess = max(0, len(self.rows) - self.capacity)
        self.rows = self.rows[excess:]
        self.counters.update(received=len(numbers), evicted=excess)

    def draw(self, count, *, step, generator):
        young = [r for r in self.rows if r[1] < 0 or step - r[1] <= self.max_staleness]
        self.counters.update(expired=len(self.rows) - len(young))
        self.rows = young
        if not young:
            return None
        if count > len(young):
            chosen = torch.randint(len(young), (count,), generator=generator).tolist()
        elif self.reuse == 1:
            chosen = list(range(count))
        else:
            chosen = torch.randperm(len(young), generator=generator)[:count].tolist()
        self.counters.update(drawn=count)
        drawn = [young[i][0] for i in chosen]
        for i in chosen:
            young[i][2] += 1
        self.rows = [r for r in young if r[2] < self.reuse]
        return drawn


def _restored(buffer):
    restored = ReplayBuffer(capacity=buffer.capacity, reuse=buffer.reuse, max_staleness=buffer.max_staleness)
    restored.load_state_dict(buffer.state_dict())
    return restored


EVENTS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 12), st.booleans()),
    st.tuples(st.just("draw"), st.integers(1, 15), st.integers(0, 3)),
    st.tuples(st.sampled_from(["restore", "clear"]), st.none(), st.none()),
)


@given(
    capacity=st.integers(1, 30),
    reuse=st.integers(1, 4),
    max_staleness=st.integers(0, 6),
    events=st.lists(EVENTS, max_size=30),
)
def test_it_draws_drops_and_counts_as_a_list_of_rows_does(capacity, reuse, max_staleness, events):
    settings = {"capacity": capacity, "reuse": reuse, "max_staleness": max_staleness}
    buffer, listed = ReplayBuffer(**settings), Listed(**settings)
    generator, same, step, number = _generator(), _generator(), 0, 0
    for event, count, more in events:
        if event == "add":
            version = step if more else -1
            buffer.add(rows(count, version=version, start=number))
            listed.add(range(number, number + count), version)
            number += count
        elif event == "draw":
            step += more
            wanted = listed.draw(count, step=step, generator=same)
            if wanted is None:
                with pytest.raises(StaleStateError):
                    buffer.draw(count, step=step, generator=generator)
            else:
                drawn = buffer.draw(count, step=step, generator=generator)
                assert drawn.cond.tolist() == drawn.x_t[:, 0].tolist() == drawn.label[:, 0].tolist() == wanted
        elif event == "restore":
            buffer = _restored(buffer)
        else:
            buffer.clear()
            listed.rows = []
        assert len(buffer) == len(listed.rows)
        assert all(getattr(buffer, name) == n for name, n in listed.counters.items())
    assert torch.equal(generator.get_state(), same.get_state())


def test_what_was_drawn_is_no_part_of_the_buffer():
    buffer = ReplayBuffer(capacity=4, reuse=2)
    buffer.add(rows(4))
    drawn = buffer.draw(4, step=0, generator=_generator())
    drawn.x_t.fill_(-1)
    assert sorted(buffer.draw(4, step=0, generator=_generator()).x_t[:, 0].tolist()) == [0, 1, 2, 3]


def test_memory_is_taken_for_the_rows_held_and_not_for_the_capacity():
    buffer = ReplayBuffer(capacity=10**9)
    for step in range(50):
        buffer.add(rows(8))
        buffer.draw(8, step=step, generator=_generator())
    assert len(buffer._slots) == 8


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


def test_columns_are_read_where_they_lie():
    batch = rows(5)
    columns = batch.to_columns()
    back = StateBatch.from_columns(columns)
    for name, values in vars(batch).items():
        assert columns[name].ctypes.data == values.data_ptr() == getattr(back, name).data_ptr()


def test_read_only_columns_are_taken_without_a_warning(recwarn):
    columns = rows(5).to_columns()
    for column in columns.values():
        column.flags.writeable = False
    buffer = ReplayBuffer(capacity=5)
    buffer.add(StateBatch.from_columns(columns))
    assert buffer.draw(5, step=0, generator=_generator()).cond.tolist() == list(range(5))
    assert not [w for w in recwarn if "writable" in str(w.message)]


def test_rows_are_chosen_by_slice_number_or_mark():
    batch = rows(5)
    for chosen in (slice(1, 4), torch.tensor([1, 2, 3]), torch.tensor([False, True, True, True, False])):
        assert batch[chosen].cond.tolist() == batch[chosen].label[:, 0].tolist() == [1, 2, 3]
