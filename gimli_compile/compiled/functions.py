"""A function compiled: its results, its results with residuals, and its adjoint, each built when first needed.

Graphs write themselves as Python when they first run, and not after each change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch.fx._lazy_graph_module import _use_lazy_graph_module

from gimli_compile.collecting import rare_collections
from gimli_compile.compiled.backends import Backend, Executable, entry_of
from gimli_compile.compiled.halves import Function, Halves, Lanes, halves
from gimli_compile.compiled.tidying import with_reshapes
from gimli_compile.compiled.verification import verified

Tensor = torch.Tensor
Split = Callable[..., Halves]  # `halves`, or what returns such for the same arguments


@dataclass(frozen=True)
class Builder:
    """How graphs become executables."""

    backend: Backend
    verify: bool

    @rare_collections()
    @_use_lazy_graph_module(True)
    def __call__(self, module: fx.GraphModule, what: str) -> Executable:
        """Builds one; with `verify`, it compares itself with the graph in its first call."""
        module = with_reshapes(module)
        return verified(self.backend, module, what) if self.verify else self.backend(module)


class CompiledFunction:
    """A pure function of tensors, compiled for inputs of one form, with the adjoints of some of them."""

    @rare_collections()
    @_use_lazy_graph_module(True)
    def __init__(
        self,
        function: Function,
        examples: Sequence[Tensor],
        wanted: Sequence[int],
        *,
        summed: frozenset[int],
        lanes: Lanes,
        build: Builder,
        what: str,
        split: Split = halves,
    ) -> None:
        self._build = build
        self._what = what
        self._entries = {"plain": 0, "saving": 0, "backward": 0}
        self.halves: Halves = split(function, examples, wanted, summed, lanes)

    @cached_property
    def plain(self) -> Executable:
        """Computes the results."""
        return self._build(self.halves.plain, self._what)

    @cached_property
    def saving(self) -> Executable:
        """Computes the results and the fresh residuals; the adjoint, which needs them, is built at the same time."""
        fresh = self.halves.saving is not self.halves.plain
        made = self._build(self.halves.saving, f"{self._what} with residuals") if fresh else self.plain
        if self.halves.backward is not None:
            _ = self.backward
        return made

    @cached_property
    def backward(self) -> Executable:
        """Computes the adjoints from residuals, the adjoints of the results, and accumulators."""
        assert self.halves.backward is not None
        return self._build(self.halves.backward, f"adjoint of {self._what}")

    def entries(self) -> tuple[int, int, int]:
        """Returns the addresses of `plain`, `saving` and `backward`; 0 of what is not built or cannot be called yet."""
        for name, known in self._entries.items():
            if not known and name in self.__dict__:
                self._entries[name] = entry_of(self.__dict__[name])
        plain, saving, backward = self._entries.values()
        return plain, plain if self.halves.saving is self.halves.plain else saving, backward
