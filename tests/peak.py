"""Peaks of tensor memory as torch's allocator reports them to the profiler; what estimates are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["peak_bytes"]


def peak_bytes(prepare: Callable[[], Any], act: Callable[[Any], Any]) -> int:
    """The most that tensors made by `prepare` and during `act`, which gets them, take at once during `act`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        made = prepare()
        with record_function("act"):
            act(made)
    events = profiled.profiler.kineto_results.events()
    (window,) = [event for event in events if event.name() == "act"]
    now = peak = 0
    for time, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        if window.start_ns() <= time <= window.end_ns():
            peak = max(peak, now)
    return peak
