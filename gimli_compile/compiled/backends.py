"""What runs the graphs of compiled programs: Inductor, TorchScript, or Python."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InductorError
from torch.fx.experimental.proxy_tensor import make_fx

from gimli_compile.compiled.affine_strides import affine_strides
from gimli_compile.compiled.cpp_builds import Entry, Pending, built_at_once, built_beside
from gimli_compile.compiled.dtype_rules import dtype_rules_made_once
from gimli_compile.compiled.fusion_memory import memory_asked_where_shared
from gimli_compile.compiled.lean import LeanProgram, lean_programs
from gimli_compile.compiled.low_precision import has_low_precision, rounded_as_written
from gimli_compile.compiled.small_values import compute_small_values_first
from gimli_compile.compiled.torchscript import script
from gimli_compile.errors import InputError
from gimli_compile.metadata import FAKE

Tensor = torch.Tensor
Executable = Callable[[list[Tensor]], Sequence[Tensor]]
Backend = Callable[[fx.GraphModule], Executable]
_ALONE = 32768  # elements of a loop for each thread: what starting and waiting for threads is worth
_NEIGHBOURS = 8  # of the loops that use one value, how many each is tried to be fused with: a number is used by all
# What the Python around a library's function uses where all it does is to pass tensors on.
_PASSING_ON = {
    *("torch", "isinstance", "Tensor", "tensor", "_C", "_aoti", "clear"),
    *("unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"),
}


@dataclass(frozen=True)
class NativeProgram:
    """An executable that Inductor made for the CPU."""

    call: Executable

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Runs it from Python."""
        return self.call(inputs)

    @property
    def entry(self) -> int:
        """Where its lean program (`lean.py`) begins, which the loop in C++ calls; 0 if it is not one, or not yet.

        It is one if all that its Python does is to pass tensors on.
        """
        code, cells = getattr(self.call, "__code__", None), getattr(self.call, "__closure__", None) or ()
        held = [cell.cell_contents for cell in cells]
        found = [one for one in (_made(value) for value in held) if isinstance(one, LeanProgram)]
        return found[0].entry if code and len(found) == 1 and _PASSING_ON.issuperset(code.co_names) else 0


def _made(value: Any) -> Any:
    return value.made if isinstance(value, Pending) else value


def entry_of(executable: Executable) -> int:
    """Returns the address at which C++ can call an executable; 0 if it cannot, or not yet."""
    return getattr(executable, "entry", 0)


def run_in_python(module: fx.GraphModule) -> Executable:
    """Runs a graph operator by operator, as it prints."""
    return lambda inputs: module(*inputs)


def compile_with_torchscript(module: fx.GraphModule) -> Executable:
    """Runs a graph in the interpreter of TorchScript: builds in a second or so and needs no C++ compiler."""
    scripted = script(module)
    return lambda inputs: scripted(*inputs)


def compile_with_inductor(module: fx.GraphModule) -> Executable:
    """Compiles a graph to machine code. Its C++ wrapper saves the time that Python needs for each kernel.

    The C++ compiler runs beside what Python does next: the first call waits for it.

    On a GPU, a kernel computes what is alike for many tensors, such as the updates of all parameters.

    Layouts stay as they are: where Inductor (torch 2.13, CPU) changes that of convolutions, captured steps of
    convolution, relu and max-pool come out wrong, their gradients zero.
    """

    def again() -> Entry | None:
        entries: list[Entry] = []
        with built_at_once(entries):
            _compiled(module)
        return entries[-1] if entries else None  # the same code is not loaded twice

    try:
        with built_beside(again):
            return _compiled(module)
    except InductorError:  # headers are compiled at once, by a compiler that may not know what was taken for granted
        try:
            with built_at_once([]):
                return _compiled(module, combined=False)
        except InductorError:
            if not has_low_precision(module):
                raise
            # The wrapper in C++ of torch 2.11 does not know all operators that are left to torch there.
            with built_at_once([]):
                return _compiled(module, combined=False, wrapped=False)


def _compiled(module: fx.GraphModule, *, combined: bool = True, wrapped: bool = True) -> Executable:
    """Compiles a graph.

    Args:
        module: the graph.
        combined: with kernels for many tensors on a GPU, which torch calls experimental.
        wrapped: with a wrapper in C++ on the CPU.
    """
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    on_cpu = all(fake.device.type == "cpu" for fake in fakes)
    native = wrapped and on_cpu
    settings = {"cpp_wrapper": native, "layout_optimization": False, "cpp.min_chunk_size": _ALONE}
    settings["max_fusion_buffer_group_pairwise_attempts"] = _NEIGHBOURS
    settings |= {"combo_kernels": combined and not on_cpu, "combo_kernels_pointwise_only": True}
    lean = lean_programs(fakes) if native else nullcontext()
    quick = affine_strides(), dtype_rules_made_once(), memory_asked_where_shared()
    with inductor_config.patch(settings), torch.no_grad(), lean, ExitStack() as stack:
        for one in quick:
            stack.enter_context(one)
        lowered = _lowered(stack.enter_context(rounded_as_written(module)), fakes)
        compiled = compile_fx_inner(lowered, fakes, cpp_wrapper=native, is_inference=True)
    call = getattr(compiled, "current_callable", None) or compiled  # without the profiler's frame around each call
    return NativeProgram(call) if native else call


def _lowered(function: Callable[..., Any], fakes: Sequence[Tensor]) -> fx.GraphModule:
    """Returns the graph of a function in the operators that Inductor knows."""
    with FAKE, torch.no_grad():
        lowered = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
    lowered.graph.eliminate_dead_code()
    compute_small_values_first(lowered.graph)
    output = next(iter(lowered.graph.find_nodes(op="output")))
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # keep the layout of all results
    return lowered


BACKENDS: dict[str, Backend] = {
    "eager": run_in_python,
    "torchscript": compile_with_torchscript,
    "inductor": compile_with_inductor,
}


@functools.cache
def has_compiler() -> bool:
    """Tells whether Inductor finds a C++ compiler."""
    try:
        return shutil.which(get_cpp_compiler()) is not None
    except Exception:  # torch raises errors of its own where it finds none
        return False


def choose_backend(name: str) -> str:
    """Returns the backend of this name; "auto" is Inductor where there is a compiler, and TorchScript elsewhere."""
    if name == "auto":
        return "inductor" if has_compiler() or torch.cuda.is_available() else "torchscript"
    if name not in BACKENDS:
        raise InputError(f"backend={name!r} is not an option. Use one of 'auto', {', '.join(map(repr, BACKENDS))}.")
    return name
