"""Runs code on tensors that have a form and no memory, as long as it asks for nothing but their form.

What an optimizer's step does to its numbers, and whether it runs at all, seldom depends on what its tensors hold. So
the trial of a large one runs on fake tensors. Everything that could make a difference ends it: a value that is asked
for, a random draw, a shape that follows from values, a tensor with memory that is to take what a fake one holds, and
whatever is raised. The trial is then made on copies.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
_MEMORY = {
    torch.Tensor.numpy,
    torch.Tensor.data_ptr,
    torch.Tensor.__array__,
    torch.Tensor.__dlpack__,
    torch.Tensor.untyped_storage,
    torch.Tensor.share_memory_,
}


class FormAsked(Exception):
    """Hollow tensors were asked for more than their form."""


class HollowTensors(TorchDispatchMode):
    """While it is on, operators on hollow tensors give hollow ones, and those on others run. `failed` says if it ends.

    Code may catch what it raises; `failed` stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed = False
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._functions = _MemoryAsked(self)

    def __enter__(self) -> HollowTensors:
        self._was_silent, _LOGGER.disabled = _LOGGER.disabled, True  # it prints what is raised, and caught here
        self._functions.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)
        _LOGGER.disabled = self._was_silent

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a hollow tensor of the form of another."""
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
            raise self.fail()
        with self._fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def fail(self) -> FormAsked:
        """Notes that the trial says nothing; returns what to raise."""
        self.failed = True
        return FormAsked("more than the form of a tensor is asked for")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags or _gives_values(func) or _fills_memory(func, args, kwargs):
            raise self.fail()
        try:
            with self._fake:
                return func(*args, **kwargs)
        except Exception:
            self.failed = True
            raise


class _MemoryAsked(TorchFunctionMode):
    def __init__(self, hollow: HollowTensors) -> None:
        super().__init__()
        self.hollow = hollow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _MEMORY and any(isinstance(leaf, FakeTensor) for leaf in args):
            raise self.hollow.fail()
        return func(*args, **(kwargs or {}))


def _gives_values(func: Any) -> bool:
    """Tells whether an operator returns numbers or flags that values decide, and not only tensors."""
    if func.namespace == "prim" or func is torch.ops.aten.is_same_size.default:  # the device, the layout
        return False
    return not all("Tensor" in str(part.type) for part in func._schema.returns)


def _fills_memory(func: Any, args: Any, kwargs: Any) -> bool:
    """Tells whether an operator writes to a tensor that is not hollow."""
    if not func._schema.is_mutable:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    written = [given.get(part.name) for part in func._schema.arguments if part.alias_info and part.alias_info.is_write]
    tensors = [leaf for leaf in tree_leaves(written) if isinstance(leaf, torch.Tensor)]
    return not all(isinstance(leaf, FakeTensor) for leaf in tensors)
