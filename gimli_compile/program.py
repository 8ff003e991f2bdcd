"""The one intermediate representation: an fx graph of aten operators between named, role-carrying slots."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import networkx as nx
import torch
from torch import fx

from gimli_compile import drawing
from gimli_compile.graph_nodes import copy_node
from gimli_compile.metadata import operator_name
from gimli_compile.printing import print_program, run_namespace
from gimli_compile.release import compile_releasing
from gimli_compile.run_refusals import refusal_of
from gimli_compile.slot import Role, Slot
from gimli_compile.transforms import in_every_lane

Pass = Callable[["Program"], "Program"]


@dataclass(frozen=True)
class Draw:
    """One random draw that was lifted out of a program: the operator that makes it, from constant arguments only."""

    target: Callable[..., torch.Tensor]
    args: tuple[object, ...]
    kwargs: Mapping[str, object] = field(default_factory=dict)

    def __call__(self) -> torch.Tensor:
        """Draws from the default generator, as the eager operator would; under `vmap` once for each lane."""
        return in_every_lane(lambda: self.target(*self.args, **self.kwargs))


@dataclass(frozen=True)
class Program:
    """A pure function of tensors.

    `graph` holds one placeholder for each of `inputs`, in that order, and returns one value for each of `results`.
    `constants` gives the tensors bound to inputs of role CONSTANT (held by reference, as the user's code holds them),
    `draws` the samplers of inputs of role NOISE, drawn in this order. `functions` names callables other than aten
    operators (custom autograd functions) that nodes call.
    """

    title: str
    name: str
    graph: fx.Graph
    inputs: tuple[Slot, ...]
    results: tuple[Slot, ...]
    constants: Mapping[Slot, torch.Tensor] = field(default_factory=dict)
    draws: Mapping[Slot, Draw] = field(default_factory=dict)
    stage: str = "captured"

    @cached_property
    def code(self) -> str:
        """The program as Python source; this text is what runs."""
        return print_program(self)

    @cached_property
    def function(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The compiled text: takes one tensor for each of `inputs`, constants and draws included.

        Values are let go after their last use, which the text does not say.
        """
        namespace = run_namespace(self.graph)
        exec(compile_releasing(self.code, self._filename), namespace)
        return namespace[self.name]

    def __call__(self, values: Mapping[Slot, torch.Tensor]) -> dict[Slot, torch.Tensor]:
        """Runs on a mapping from slot to tensor; constants are filled in, and draws made unless they are given."""
        try:
            outputs = self.function(*(self._bind(slot, values) for slot in self.inputs))
        except (NotImplementedError, RuntimeError) as error:
            refusal = refusal_of(error, self, self._filename)
            if refusal is None:
                raise
            raise refusal from error
        return dict(zip(self.results, outputs, strict=True))

    @property
    def _filename(self) -> str:
        return f"<gimli_compile {self.name}>"

    def _bind(self, slot: Slot, values: Mapping[Slot, torch.Tensor]) -> torch.Tensor:
        value = values.get(slot)
        if value is not None:
            return value
        return self.constants[slot] if slot.role is Role.CONSTANT else self.draws[slot]()

    def draw(self, drawn: dict[Slot, torch.Tensor]) -> dict[Slot, torch.Tensor]:
        """Makes the draws that `drawn` lacks, adds them to it, and returns those of this program."""
        for slot, draw in self.draws.items():
            if slot not in drawn:
                drawn[slot] = draw()
        return {slot: drawn[slot] for slot in self.draws}

    def __str__(self) -> str:
        return self.code

    def __repr__(self) -> str:
        return f"Program({self.title!r}, {len(self.graph.nodes)} nodes)"

    def to_networkx(self) -> nx.DiGraph:
        """Returns the data flow as a directed graph: see `gimli_compile.drawing.to_networkx`."""
        return drawing.to_networkx(self)

    def save_svg(self, path: str | os.PathLike[str]) -> None:
        """Draws the data flow into an SVG file."""
        drawing.save_svg(self, path)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page with the drawing beside the program's text."""
        drawing.save_html(self, path)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the order of `inputs`."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def output(self) -> fx.Node:
        """The node that returns."""
        return next(iter(self.graph.find_nodes(op="output")))

    @property
    def returned(self) -> Sequence[fx.Node]:
        """The nodes of the results, in the order of `results`."""
        return cast(Sequence[fx.Node], self.output.args[0])

    def node_of(self, slot: Slot) -> fx.Node:
        """Returns the placeholder of an input slot."""
        return self.placeholders[self.inputs.index(slot)]

    def result_of(self, slot: Slot) -> fx.Node:
        """Returns the node that a result slot returns."""
        return self.returned[self.results.index(slot)]

    def calls(self, *targets: Any) -> bool:
        """Tells whether some node calls one of these targets."""
        return any(self.graph.find_nodes(op="call_function", target=target) for target in targets)

    def copy(self, **changes: Any) -> Program:
        """Returns a copy with a graph of its own, node names and meta kept, and the fields of `changes` replaced."""
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            env[node] = copy_node(graph, node, env.__getitem__)
        return replace(self, graph=graph, **changes)

    def tidied(self) -> Program:
        """Returns a copy without calls that nothing uses, its nodes numbered in order."""
        live = {self.output}
        for node in reversed(list(self.graph.nodes)):
            if node in live:
                live.update(node.all_input_nodes)
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in live:
                continue
            name = operator_name(node.target) if node.op == "call_function" else node.name
            env[node] = copy_node(graph, node, env.__getitem__, name=name)
        return replace(self, graph=graph)


def apply_passes(program: Program, passes: Sequence[Pass], check: Callable[[Program], None]) -> Program:
    """Applies `passes` in order and checks the program after each that changed it."""
    check(program)
    for transform in passes:
        made = transform(program)
        if made is not program:
            check(made)
        program = made
    return program
