"""Programs of Inductor on plain memory instead of tensors of torch: what runs in loops without Python between steps.

Inductor writes the text of a program for tensors of torch, of which a small program makes a hundred: they, and the way
of small products through the dispatcher, take most of its time. Where the text says nothing that `lean_program.h` does
not know, it is compiled with another meaning of the same words: memory that a pool keeps, and products by kernels of
its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch._inductor.codecache import CppCodeCache, CppWrapperCodeCache
from torch._inductor.cpu_vec_isa import pick_vec_isa

from gimli_compile.compiled.cpp_builds import as_written, quick_to_build
from gimli_compile.compiled.layout_checks import define_check, with_checks

_BEGIN, _END = "void inductor_entry_impl(", "} // inductor_entry_impl"
_HEADER = "#include <torch/csrc/inductor/cpp_wrapper/cpu.h>\n"
_KERNELS = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_RELEASE = "py::gil_scoped_release_simple release;"  # the driver does that once
# What the text may call, besides kernels of its own and the names of its variables.
_KNOWN = {
    *("inductor_entry_impl", "steal_from_raw_handles_to_raii_handles", "move", "reset", "release", "data_ptr"),
    *("assert_size_stride", "check_layout"),
    *("reinterpret_tensor_wrapper", "wrap_with_raii_handle_if_needed", "RAIIAtenTensorHandle"),
    *("AOTI_TORCH_ERROR_CODE_CHECK", "aoti_torch_empty_strided", "aoti_torch_new_tensor_handle"),
    *(f"aoti_torch_cpu_{name}_out" for name in ("mm", "addmm", "bmm", "baddbmm")),
}
_INCLUDE = re.compile(r'#include "(\w+\.h)"\n')
_METHOD = re.compile(r"\b(\w+(?:\.neg\(\))?)\.(exp|tanh)\(\)")  # which lean_math.h has a faster function for
_VARIABLE = re.compile(r"(buf|arg|primals|tangents|var|tmp|cpp_fused)_?\w*")
# torch 2.11 compiles every text for the CPU's vector instructions; later versions where they are asked for.
_ISA: dict[str, Any] = (
    {"needs_vec_isa": True} if "needs_vec_isa" in signature(CppCodeCache.load_async).parameters else {}
)
_ATTACH = 'extern "C" void gimli_attach(const gimli::Runtime* given) { gimli::runtime = given; }\n'


class _LeanCode(CppCodeCache):
    """Libraries that share one header, which is compiled once on a machine."""

    cache: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _get_uncompiled_header(cls, device: str) -> str:
        return "torch/csrc/inductor/cpp_prefix.h"

    @classmethod
    def build(cls, text: str, submit: Any = None) -> Callable[[], ctypes.CDLL]:
        """Returns a function that waits for the library of a text; `submit` runs the compiler meanwhile."""
        return cls.load_async(text, "cpu", submit, **_ISA)


@functools.cache
def driver() -> Any:
    """Builds the driver of loops, once on a machine, and imports it."""
    path = _LeanCode.build(_text("loop_driver.cpp"))()._name
    spec = importlib.util.spec_from_file_location("loop_driver", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def give_memory_back() -> None:
    """Gives the memory back to torch that the pool keeps for the next loop, up to 64 MiB."""
    if driver.cache_info().currsize:
        driver().empty()


@functools.cache
def _text(name: str) -> str:
    """Returns the text of a file, with those of this folder that it includes."""
    text = Path(__file__).with_name(name).read_text()
    return _INCLUDE.sub(lambda found: _text(found[1]), text)


@dataclass(frozen=True)
class LeanProgram:
    """A program as Python calls it: with handles of tensors of torch in capsules. `entry` is its address."""

    library: ctypes.CDLL
    entry: int
    results: int

    def __call__(self, handles: Sequence[Any]) -> list[Any]:
        """Runs it; what it returns, torch owns."""
        return driver().call(self.entry, handles, self.results)


@contextmanager
def lean_programs(inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within this, programs that Inductor writes for the CPU are lean where their text and the compiler allow.

    They refuse what has other sizes or strides than `inputs`. The compiler has to know vector instructions, which the
    products are made of.
    """
    build = CppWrapperCodeCache.load_pybinding_async

    def load(*args: Any, submit_fn: Any = None, **options: Any) -> Callable[[], Any]:
        text, count = with_checks(options.get("main_code", ""), inputs), options.get("num_outputs", -1)
        fits = not args and options.get("kernel_code") is None and bool(pick_vec_isa())
        lean = lean_text(text) if fits else None
        if lean is None:
            known = {"main_code": quick_to_build(define_check(text))} if text else {}
            return build(*args, submit_fn=submit_fn, **options | known)
        if submit_fn is not None and not driver.cache_info().currsize:
            _LeanCode.build(_text("loop_driver.cpp"), submit_fn)
        made = _LeanCode.build(lean, submit_fn)
        return lambda: _loaded(made(), count)

    with mock.patch.object(CppWrapperCodeCache, "load_pybinding_async", load):
        yield


def lean_text(text: str) -> str | None:
    """Returns the text of a lean program; None where it says what is not known."""
    begin, end = text.find(_BEGIN), text.find(_END)
    if begin < 0 or end < 0 or _HEADER not in text:
        return None
    called = set(re.findall(r"(\w+)\s*\(", text[begin:end]))
    if any(name not in _KNOWN and not _VARIABLE.fullmatch(name) for name in called):
        return None
    if _RELEASE not in text:
        return None
    start = f'extern "C" {as_written(text)}void gimli_program('
    program = text.replace(_HEADER, "", 1).replace(_RELEASE, "", 1).replace(_BEGIN, start, 1)
    program = _METHOD.sub(r"gimli::\2(\1)", program)
    headers = (_KERNELS, *map(_text, ("lean_runtime.h", "lean_program.h", "lean_math.h")))
    return "".join((*headers, program, _ATTACH))


def _loaded(library: ctypes.CDLL, results: int) -> LeanProgram:
    """Returns the lean program in a library."""
    library.gimli_attach(ctypes.c_void_p(driver().runtime()))
    return LeanProgram(library, ctypes.cast(library.gimli_program, ctypes.c_void_p).value or 0, results)
