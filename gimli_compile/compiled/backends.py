"""What runs the graphs of compiled programs: Inductor, TorchScript, or Python."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from gimli_compile.compiled.lean import LeanProgram, lean_programs
from gimli_compile.compiled.torchscript import script
from gimli_compile.errors import InputError
from gimli_compile.metadata import FAKE

Tensor = torch.Tensor
Executable = Callable[[list[Tensor]], Sequence[Tensor]]
Backend = Callable[[fx.GraphModule], Executable]
# What the Python around a library's function uses where all it does is to pass tensors on.
_PASSING_ON = {
    *("torch", "isinstance", "Tensor", "tensor", "_C", "_aoti", "clear"),
    *("unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"),
}


@dataclass(frozen=True)
class NativeProgram:
    """An executable, and where its lean program (`lean.py`) begins: the loop in C++ calls that."""

    call: Executable
    entry: int

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Runs it from Python."""
        return self.call(inputs)


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

    Layouts stay as they are: where Inductor (torch 2.13, CPU) changes that of convolutions, captured steps of
    convolution, relu and max-pool come out wrong, their gradients zero.
    """
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    with FAKE, torch.no_grad():
        lowered = make_fx(lambda *inputs: module(*inputs), decomposition_table=select_decomp_table())(*fakes)
    lowered.graph.eliminate_dead_code()
    output = next(iter(lowered.graph.find_nodes(op="output")))
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # keep the layout of all results
    native = all(fake.device.type == "cpu" for fake in fakes)
    lean = lean_programs() if native else nullcontext()
    with inductor_config.patch(cpp_wrapper=native, layout_optimization=False), torch.no_grad(), lean:
        compiled = compile_fx_inner(lowered, fakes, cpp_wrapper=native, is_inference=True)
    call = getattr(compiled, "current_callable", None) or compiled  # without the profiler's frame around each call
    return NativeProgram(call, _entry(call)) if native else call


def _entry(call: Executable) -> int:
    """Returns where the lean program begins to which a call of Inductor's passes tensors on; 0 if it does not."""
    code, cells = getattr(call, "__code__", None), getattr(call, "__closure__", None) or ()
    found = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, LeanProgram)]
    return found[0].entry if code and len(found) == 1 and _PASSING_ON.issuperset(code.co_names) else 0


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
