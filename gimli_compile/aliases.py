"""Tensors that show the memory of captured ones, and are made past the dispatcher: `nn.Parameter(x)`, subclasses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from gimli_compile.metadata import storage_of
from gimli_compile.refusals import hidden_memory

if TYPE_CHECKING:
    from gimli_compile.interception import Interception
    from gimli_compile.recording import Recorder

Tensor = torch.Tensor
aten = torch.ops.aten


@contextmanager
def memory_followed(recorder: Recorder) -> Iterator[None]:
    """Lets a program see what `nn.Parameter(x)` is made of, and refuses other tensors in the memory of captured ones.

    In a model no gradient goes through a new parameter, as in eager.
    """
    original, own = Tensor._make_subclass, vars(Tensor).get("_make_subclass")

    def make(cls: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, data, *args, **kwargs)
        if recorder.knows(data):
            recorder.add_call(aten.detach.default, (recorder.node_of(data),), {}, made)
            recorder.mark_stop(made)
        return made

    setattr(Tensor, "_make_subclass", staticmethod(make))  # noqa: B010
    before, recorder.refuses_hidden = recorder.refuses_hidden, True
    try:
        yield
    finally:
        recorder.refuses_hidden = before
        if own is None:
            del Tensor._make_subclass
        else:
            setattr(Tensor, "_make_subclass", own)  # noqa: B010


def refuse_hidden(tensor: Tensor, known: Iterable[Tensor]) -> None:
    """Refuses an unknown tensor in the memory of a known one: a program does not see where it comes from."""
    storage = storage_of(tensor)
    if any(storage_of(other) == storage for other in known):
        raise hidden_memory(type(tensor).__name__)


def _deepcopy(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`copy.deepcopy` copies memory, once for all tensors in it; what has a derivative it refuses, as in eager."""
    tensor, memo = args
    place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
    if id(tensor) not in memo and tensor.is_leaf:
        with mode:
            memo[id(tensor)] = memo[place].detach() if place in memo else tensor.detach().clone()
            memo.setdefault(place, memo[id(tensor)])
    return memo[id(tensor)] if id(tensor) in memo else func(*args, **kwargs)


def _refuse_memory(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    if mode.recorder.knows(args[0]):
        raise hidden_memory(f"Tensor.{func.__name__}")
    return func(*args, **kwargs)


ALIAS_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    Tensor.__deepcopy__: _deepcopy,
    Tensor.__dlpack__: _refuse_memory,
    Tensor.__reduce_ex__: _refuse_memory,
}
