"""A seat for each contender: its process, seen from the one that measures, with limits on time and memory."""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.worker import Job, serve

POLL = 0.05  # seconds between looks at a process that works
RESERVE = 2**30  # bytes that are left to the system
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class OutError(Exception):
    """The contender is out: `status` says how, the text why."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status


class Seat:
    """The process of one contender.

    Args:
        job: what it is for.
        cache: a folder for what compilers keep, empty for a cold build.
        time_limit: seconds that a request may take.
        memory_limit: bytes that the process may grow to.
    """

    def __init__(self, job: Job, cache: Path, *, time_limit: float, memory_limit: int) -> None:
        self.job = job
        self.time_limit, self.memory_limit = time_limit, memory_limit
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(job, theirs), daemon=True)
        variables = dict.fromkeys(THREAD_VARIABLES, str(job.threads))
        variables |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
        variables |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCHINDUCTOR_COMPILE_THREADS": str(job.threads)}
        with _environment(variables):
            self._process.start()
        theirs.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Returns the answer to a request.

        Raises:
            OutError: the worker has none: it cannot, it failed, it died, or it took too much time or memory.
        """
        self._connection.send((name, arguments))
        end = time.monotonic() + self.time_limit
        while not self._connection.poll(POLL):
            if time.monotonic() > end:
                self._leave("too slow", f"{name} took more than {self.time_limit:.0f} s")
            if _resident(self._process.pid) > min(self.memory_limit, self._room()):
                self._leave("too large", f"{name} took more than {_resident(self._process.pid) / 1e9:.1f} GB")
        try:
            status, answer = self._connection.recv()
        except EOFError:
            self._process.join(5)
            self._leave("failed", f"the process ended in {name} (exit code {self._process.exitcode})")
        if status != "ok":
            self._leave(status, answer)
        return answer

    def _room(self) -> int:
        return _resident(self._process.pid) + _available() - RESERVE

    def _leave(self, status: str, text: str) -> None:
        self.close()
        raise OutError(status, text)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.kill()
        self._process.join()


@contextmanager
def _environment(variables: dict[str, str]):
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _resident(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**62
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
