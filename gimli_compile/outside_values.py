"""Values of tensors that lie outside of a program, and that code read: they are conditions of the program.

A program holds the very tensor, so that what anyone writes into it counts. Not so where code made a number of it, a
branch or a shape: these are part of the program, which then is for these values alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from gimli_compile.recording import Recorder

aten = torch.ops.aten


class OutsideValues:
    """The constants of one trace that lie outside, where anyone may write to them."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._nodes: set[fx.Node] = set()
        self._pinned: set[tuple[fx.Node, int]] = set()

    def add(self, node: fx.Node) -> None:
        """Announces a constant."""
        self._nodes.add(node)

    def discard(self, node: fx.Node) -> None:
        """Says that a constant is a copy that nobody else has."""
        self._nodes.discard(node)

    def pin(self, tensors: Iterable[torch.Tensor]) -> None:
        """Makes it a condition of the program that tensors keep their values, as far as these come from outside."""
        recorder = self._recorder
        if recorder.is_paused:  # the project's own code looks
            return
        for tensor in tensors:
            node = recorder.node_of(tensor)
            read = node, 0 if tensor.is_inference() else tensor._version
            if not recorder.reach(tensor) and read not in self._pinned and self._comes_from_outside(node):
                self._pinned.add(read)
                self.expect_same(tensor)

    def expect_same(self, tensor: torch.Tensor) -> None:
        """Makes it a condition of the program that a tensor has the values that it has now."""
        recorder = self._recorder
        with recorder.paused():
            fixed = tensor.detach().clone()
        self.discard(recorder.node_of(fixed))
        with recorder, torch.no_grad():
            same = aten.eq.Tensor(tensor, fixed)
            if tensor.is_floating_point() or tensor.is_complex():
                undefined = aten.logical_and.default(aten.ne.Tensor(tensor, tensor), aten.ne.Tensor(fixed, fixed))
                same = aten.logical_or.default(same, undefined)
            held = aten.all.default(same)
            recorder.expect(held)
        recorder.node_of(held).meta["fixed"] = True

    def _comes_from_outside(self, node: fx.Node) -> bool:
        seen, pending = {node}, [node]
        while pending:
            one = pending.pop()
            if one in self._nodes:
                return True
            new = [argument for argument in one.all_input_nodes if argument not in seen]
            seen.update(new)
            pending += new
        return False
