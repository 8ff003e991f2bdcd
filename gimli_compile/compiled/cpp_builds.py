"""Machine code that a C++ compiler makes while Python goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch._inductor import config, cpu_vec_isa
from torch._inductor.codecache import CppWrapperCodeCache
from torch._inductor.cpu_vec_isa import VecISA

Entry = Callable[..., Any]
_BEGIN, _END = "void inductor_entry_impl(", "} // inductor_entry_impl"
_LONG = 100_000  # characters; a long function that calls kernels takes the compiler longer than all of the kernels
_AS_WRITTEN = """
#if defined(__clang__)
[[clang::optnone]]
#elif defined(__GNUC__)
__attribute__((optimize("O0")))
#endif
"""
_ASKED = (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX512VNNI, cpu_vec_isa.VecAMX)


class Pending:
    """The entry point of a program whose machine code is being made; its first call waits."""

    def __init__(self, wait: Callable[[], Entry], again: Callable[[], Entry | None]) -> None:
        self._wait = wait
        self._again = again
        self._entry: Entry = self._first

    def __call__(self, *handles: Any) -> Any:
        """Runs the machine code."""
        return self._entry(*handles)

    @property
    def made(self) -> Entry | None:
        """The entry point, once the first call has waited for it."""
        return None if self._entry == self._first else self._entry

    def _first(self, *handles: Any) -> Any:
        try:
            self._entry = self._wait()
        except Exception:  # of the compiler, which may not know what was taken for granted
            made = self._again()
            if made is None:
                raise
            self._entry = made
        return self._entry(*handles)


def quick_to_build(text: str) -> str:
    """Returns the text of a program; where the function that calls its kernels is long, that is compiled as written.

    The kernels are optimized as ever. They are what takes the time when the program runs.
    """
    return text.replace(_BEGIN, f"{as_written(text)}{_BEGIN}", 1)


def as_written(text: str) -> str:
    """Returns what to write before the function that calls the kernels of a program; nothing if it is short."""
    begin, end = text.find(_BEGIN), text.find(_END)
    return _AS_WRITTEN if 0 <= begin < end - _LONG else ""


@contextmanager
def built_beside(again: Callable[[], Entry | None]) -> Iterator[None]:
    """Lets Inductor leave its C++ compiler running when it is done: who calls the program first waits for it.

    Inductor tries, for each set of vector instructions that the CPU has, whether the compiler knows it: eight runs of
    compiler and interpreter before the first program. Inside, that is taken for granted; where a build then fails,
    `again` makes another entry point, or None if there is no other.
    """

    def load(*args: Any, **options: Any) -> Pending:
        return Pending(CppWrapperCodeCache.load_pybinding_async(*args, submit_fn=_pool().submit, **options), again)

    checked = VecISA.check_build
    CppWrapperCodeCache.load_pybinding = staticmethod(load)  # type: ignore[method-assign]
    VecISA.check_build = lambda *_: True  # type: ignore[method-assign]
    try:
        with config.patch("cpp.vec_isa_ok", True):
            yield
    finally:
        VecISA.check_build = checked  # type: ignore[method-assign]
        del CppWrapperCodeCache.load_pybinding


@contextmanager
def built_at_once(entries: list[Entry]) -> Iterator[None]:
    """Lets Inductor ask what the compiler knows, and wait for it; adds the entry points that it loads to `entries`."""
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for known in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            vars(isa).pop(known, None)
    for kind in _ASKED:
        kind.__bool__.cache_clear()
    cpu_vec_isa.VecAVX512.is_avx512_bf16_supported.cache_clear()
    cpu_vec_isa.VecAMX.is_amx_fp16_supported.cache_clear()

    def load(*args: Any, **options: Any) -> Entry:
        entries.append(CppWrapperCodeCache.load_pybinding_async(*args, **options)())
        return entries[-1]

    CppWrapperCodeCache.load_pybinding = staticmethod(load)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CppWrapperCodeCache.load_pybinding


@cache
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores, thread_name_prefix="gimli_compile C++")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads stay with the parent
