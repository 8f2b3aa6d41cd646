"""Pins that one thread at a time has its turn, the smallest place first."""

from __future__ import annotations

import threading
import time

import pytest

from ddil_ray.runtime.turns import Turns


def test_the_smallest_place_that_waits_is_next():
    turns, order, inside = Turns(), [], threading.Event()

    def take(place):
        with turns.of(place):
            order.append(place)

    def hold():
        with turns.of(4):
            inside.set()
            while len(turns._waiting) < 3:
                time.sleep(0.01)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    assert inside.wait(10)
    for place in (8, 6, 2):
        threads.append(threading.Thread(target=take, args=(place,)))
        threads[-1].start()
    for thread in threads:
        thread.join(10)
    assert order == [2, 6, 8]


def test_a_turn_ends_with_an_error():
    turns = Turns()
    with pytest.raises(ValueError, match="x"), turns.of(1):
        raise ValueError("x")
    with turns.of(1):
        pass
