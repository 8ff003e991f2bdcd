"""How many bytes of tensors live at once: counted by torch's allocator, so that it does not depend on the machine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def peak_growth(action: Callable[[], Any]) -> int:
    """Returns by how many bytes the tensors alive while `action` runs outgrow those alive before it, at most."""
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    # There is one cycle of events; torch 2.11 warns that it drops those of earlier ones, unless it keeps them.
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        kept = action()
    del kept
    results: Any = profile.profiler
    events = sorted(results.kineto_results.events(), key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak
