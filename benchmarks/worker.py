"""A contender in a process of its own: it is asked, over a pipe, for outcomes, times and memory."""

from __future__ import annotations

import importlib
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.roster import Contender
from benchmarks.workloads import Workload

TURN = 0.1  # seconds that a turn takes at least: fast runs are repeated
SLOWDOWN = 4  # by which counting tensors may slow a run down


@dataclass(frozen=True)
class Job:
    """What a worker is for."""

    contender: Contender
    workload: Workload
    device: str
    threads: int
    log: str


def serve(job: Job, connection: Connection) -> None:
    """Answers requests, each `(name, arguments)`, with `(status, answer)` until the pipe closes."""
    _settle(job)
    meta = importlib.import_module("benchmarks.meta_gradient")
    worker = Worker(job, meta)
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = "ok", getattr(worker, name)(*arguments)
        except (meta.NotThereError, NotImplementedError) as error:
            answer = "not there", _first_line(error)
        except Exception as error:  # a contender may fail in any way; the others go on
            traceback.print_exc()
            answer = "failed", f"{type(error).__name__}: {_first_line(error)}"
        connection.send(answer)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _settle(job: Job) -> None:
    """Gives the process its cores and sends what it writes to its log; before any framework is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.threads])
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)


class Worker:
    """Makes runs of the contender, and measures the one in float32."""

    def __init__(self, job: Job, meta: Any) -> None:
        self.job = job
        self.meta = meta
        self.run: Callable[[], Any] | None = None
        self.seconds = 0.0
        torch = importlib.import_module("torch")
        torch.set_num_threads(job.threads)
        torch.backends.cudnn.allow_tf32 = False
        torch.manual_seed(0)

    def _make(self, dtype: str, workload: Workload) -> Callable[[], Any]:
        contender = self.job.contender
        function = getattr(importlib.import_module(contender.module), contender.function)
        setting = self.meta.Setting(dtype, self.job.device)
        if contender.family == "jax" or contender.key == "plain-jax":
            return function(workload, setting, **contender.options)
        return self.meta.synchronized(
            function(self.meta.problem_of(workload, setting), **contender.options), self.job.device
        )

    def outcome(self, dtype: str, checked: bool) -> dict[str, Any]:
        """Returns the arrays of one run."""
        workload = self.job.workload
        return self.meta.as_arrays(self._make(dtype, workload.checked() if checked else workload)())

    def build(self) -> tuple[float, dict[str, Any]]:
        """Makes the run that is measured; returns the seconds to its first result, and that result."""
        importlib.import_module(self.job.contender.module)
        start = time.perf_counter()
        self.run = self._make("float32", self.job.workload)
        arrays = self.meta.as_arrays(self.run())
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        self.run()
        self.seconds = time.perf_counter() - start
        return seconds, arrays

    def memory(self, limit: float) -> dict[str, int | None]:
        """Returns the peaks of a run; counts no tensors where that would take longer than `limit` seconds."""
        assert self.run is not None
        memory = importlib.import_module("benchmarks.memory")
        counts = self.seconds * SLOWDOWN < limit
        return memory.peaks(self.run, device=self.job.device, counts_tensors=counts)

    def release(self) -> None:
        """Gives freed memory back."""
        importlib.import_module("benchmarks.memory").release()

    def time(self) -> float:
        """Returns the milliseconds of a run, the mean over a turn."""
        assert self.run is not None
        count = min(100, max(1, math.ceil(TURN / max(self.seconds, 1e-6))))
        start = time.perf_counter()
        for _ in range(count):
            self.run()
        self.seconds = (time.perf_counter() - start) / count
        return 1e3 * self.seconds
