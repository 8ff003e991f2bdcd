"""Modules that TorchScript runs: their tensors are held, and their code is run, outside of Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from gimli_compile.errors import InputError, compose_message


def is_scripted(module: nn.Module) -> bool:
    """Tells whether a module was made by `torch.jit.script` or `torch.jit.trace`."""
    return isinstance(module, torch.jit.ScriptModule)


def options_of(module: nn.Module) -> Iterable[tuple[str, Any]]:
    """Returns the attributes of a module by name; of a scripted one only whether it trains, the rest is compiled in."""
    return [("training", module.training)] if is_scripted(module) else vars(module).items()


@contextmanager
def scripts_substituted(modules: Iterable[nn.Module], by_id: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Runs with other tensors in place of those that scripted modules hold, and operator by operator."""
    held = []
    for module in filter(is_scripted, modules):
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        held += [(cast(Any, module)._c, name, tensor) for name, tensor in named]
    try:
        for holder, name, tensor in held:
            holder.setattr(name, by_id.get(id(tensor), tensor))
        with cast(Any, torch.jit).optimized_execution(False):
            yield
    finally:
        for holder, name, tensor in held:
            holder.setattr(name, tensor)


def refuse_detaching(modules: Iterable[nn.Module]) -> None:
    """Refuses scripted code that detaches: below TorchScript it looks like a detach of the framework's own."""
    for module in filter(is_scripted, modules):
        scripted = cast(Any, module)
        if scripted._c._has_method("forward") and "aten::detach" in str(scripted.inlined_graph):
            raise InputError(
                compose_message(
                    f"the scripted module `{scripted.original_name}` calls `detach`",
                    None,
                    "Where a gradient is to stop is seen in Python, and TorchScript runs outside of it.",
                    "Give `functionalize` the module that was scripted or traced, not its scripted form.",
                )
            )
