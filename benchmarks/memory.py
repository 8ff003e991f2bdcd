"""How much memory a run takes at its peak: the bytes of live tensors, and what the process grows by."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.autograd import ProfilerActivity, ProfilerConfig, ProfilerState

STATUS = Path("/proc/self/status")


def peaks(run: Callable[[], Any], *, device: str, counts_tensors: bool) -> dict[str, int | None]:
    """Returns bytes: "live" tensors beyond those before, "growth" of the process in a run, and "process" so far.

    The first is what torch allocates, whatever allocates it (autograd, compiled code), or what XLA plans to.
    """
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    growth = _growth(run)
    live = getattr(run, "temporary", None)
    if live is None and counts_tensors:
        live = _live_on_gpu(run) if device == "cuda" else _live_on_cpu(run)
    return {"live": live, "growth": growth, "process": process}


def release() -> None:
    """Gives freed memory back, that of this project's pool too, so that a process's size says what it holds."""
    gc.collect()
    lean = sys.modules.get("gimli_compile.compiled.lean")
    if lean is not None:
        lean.give_memory_back()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _growth(run: Callable[[], Any]) -> int | None:
    release()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    except OSError:
        run()
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(entry: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


def _live_on_gpu(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _live_on_cpu(run: Callable[[], Any]) -> int:
    """Adds up the allocations and deallocations that torch's CPU allocator reports to the profiler."""
    release()
    config = ProfilerConfig(ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
    torch.autograd._prepare_profiler(config, {ProfilerActivity.CPU})
    torch.autograd._enable_profiler(config, {ProfilerActivity.CPU})
    try:
        run()
    finally:
        events = torch.autograd._disable_profiler().events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
