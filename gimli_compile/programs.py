"""The captured programs of a functionalized model and optimizer, to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import fx

from gimli_compile.composition import compose
from gimli_compile.loss_table import LossTable
from gimli_compile.program import Program
from gimli_compile.update_table import UpdateTable


@dataclass(frozen=True)
class Family:
    """The variants of one program, each with the conditions under which it holds."""

    name: str
    variants: tuple[tuple[Program, tuple[str, ...]], ...]

    @property
    def latest(self) -> Program:
        """The variant captured last."""
        return self.variants[-1][0]

    @property
    def code(self) -> str:
        """The source of the variant captured last."""
        return self.latest.code

    @property
    def graph(self) -> fx.Graph:
        """The fx graph of the variant captured last."""
        return self.latest.graph

    def to_networkx(self) -> nx.DiGraph:
        """Returns the data flow of the variant captured last as a directed graph."""
        return self.latest.to_networkx()

    def save_svg(self, path: str | os.PathLike[str]) -> None:
        """Draws the variant captured last into an SVG file."""
        self.latest.save_svg(path)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page with the drawing of the variant captured last beside its text."""
        self.latest.save_html(path)

    def __len__(self) -> int:
        return len(self.variants)

    def __str__(self) -> str:
        return "\n\n".join(self._print(index) for index in range(len(self.variants)))

    def _print(self, index: int) -> str:
        program, guards = self.variants[index]
        lines = [f"# variant {index + 1} of {len(self.variants)}"] if len(self.variants) > 1 else []
        if guards:
            lines.append("# holds when " + " and ".join(guards))
        return "\n".join([*lines, program.code])


class Programs(Mapping[str, Family]):
    """The programs by name: "forward", "loss", "grad", "update" and "step", as far as they were captured."""

    def __init__(self, losses: LossTable, updates: UpdateTable, whole: UpdateTable | None = None) -> None:
        self._families = dict(_families(losses, updates, whole))

    def __getitem__(self, name: str) -> Family:
        if name not in self._families and name in ("forward", "loss", "grad", "step"):
            raise KeyError(f"{name}: not captured yet; call `{'step' if name == 'grad' else name}` on a batch first")
        return self._families[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._families)

    def __len__(self) -> int:
        return len(self._families)


def _families(losses: LossTable, updates: UpdateTable, whole: UpdateTable | None) -> Iterator[tuple[str, Family]]:
    for name in ("forward", "loss"):
        captured = [one.captured for group in losses.forwards.values() for one in group if one.name == name]
        if captured:
            yield name, Family(name, tuple((one.program, one.guards) for one in captured))
    if losses.gradients:
        yield "grad", Family("grad", tuple((g.exact, g.captured.guards) for g in losses.all_gradients))
    variants = tuple((variant.program, variant.guards) for variant in updates.variants)
    if variants:
        yield "update", Family("update", variants)
    if whole is not None:
        if whole.variants:
            yield "step", Family("step", tuple((variant.program, variant.guards) for variant in whole.variants))
    elif losses.gradients:
        gradient = losses.all_gradients[-1].exact
        fitting = tuple(
            (compose(gradient, program), guards) for program, guards in variants if _fits(gradient, program)
        )
        if fitting:
            yield "step", Family("step", fitting)


def _fits(gradient: Program, update: Program) -> bool:
    """Tells whether the gradient gives just what the update takes."""
    given = {slot: node.meta["val"].shape for slot, node in zip(gradient.results, gradient.returned, strict=True)}
    taken = dict(zip(update.inputs, update.placeholders, strict=True))
    grads = {slot for slot in given if slot.role.value == "grads"}
    wanted = {slot: node.meta["val"].shape for slot, node in taken.items() if slot.role.value == "grads"}
    return set(wanted) == grads and all(given[slot] == shape for slot, shape in wanted.items())
