"""The update of one parameter element as formulas, read off the captured program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter, greek_letters_set
from torch import fx

from gimli_compile.errors import InputError, compose_message
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.symbolic_operators import number
from gimli_compile.symbolic_translation import Formulas, Translation


@dataclass(frozen=True, eq=False)
class UpdateRule(Mapping[str, sympy.Expr]):
    """The update of one element of a parameter: a mapping from result (`theta'`, `exp_avg'`) to expression.

    `symbols` gives the symbols by name: `theta` and `G` are the element of the parameter and of its gradient, state is
    named by its key, hyperparameters by theirs (`lr`, `beta_1`). Every expression is in terms of these inputs alone;
    the text and the LaTeX form, made of `shown`, use the new state, as papers do. What is not element-wise (a norm, a
    matrix product) is a function without a definition. An expression too large to read, and one of several cases that
    is compared, is cut at symbols that `definitions` explains, in the order of computation.
    """

    parameter: str
    conditions: tuple[str, ...]
    symbols: Mapping[str, sympy.Symbol]
    inlined: Formulas
    shown: Formulas

    def __getitem__(self, name: str) -> sympy.Expr:
        return self.inlined.results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inlined.results)

    def __len__(self) -> int:
        return len(self.inlined.results)

    @property
    def definitions(self) -> Mapping[sympy.Symbol, sympy.Expr]:
        """The expressions of the symbols that stand for parts of the results; empty for most optimizers."""
        return self.inlined.definitions

    def __str__(self) -> str:
        lines = self._lines(lambda expr: sympy.sstr(expr, full_prec=False))
        return "\n".join(f"{name} = {text}" for name, text in lines)

    def __repr__(self) -> str:
        return f"UpdateRule({self.parameter!r}: {', '.join(self)})"

    def _repr_latex_(self) -> str:
        shown = [*self.shown.definitions.values(), *self.shown.results.values()]
        names = {symbol: _latex_name(symbol.name) for expr in shown for symbol in _symbols_in(expr)}
        printer = _Latex({"symbol_names": names, "full_prec": False, "mul_symbol": "\\,"})
        lines = self._lines(printer.doprint)
        body = " \\\\\n".join(f"{_latex_name(name)} &= {text}" for name, text in lines)
        return f"$$\\begin{{aligned}}\n{body}\n\\end{{aligned}}$$"

    def _lines(self, render: Callable[[Any], str]) -> Iterator[tuple[str, str]]:
        for symbol, expr in self.shown.definitions.items():
            yield symbol.name, render(expr)
        for name, expr in sorted(self.shown.results.items(), key=lambda item: item[0] == "theta'"):
            yield name, _render_sum(expr, self.symbols.get(name.removesuffix("'")), render)


def _render_sum(expr: sympy.Expr, leading: sympy.Symbol | None, render: Callable[[Any], str]) -> str:
    """Renders a sum with the terms that have `leading` as a factor first, as `theta - G*lr`."""
    terms = sympy.Add.make_args(expr)
    first = sympy.Add(*(term for term in terms if leading in sympy.Mul.make_args(term)))
    rest = expr - first
    if first == 0 or rest == 0:
        return render(expr)
    text = render(rest)
    return f"{render(first)} - {text[1:].lstrip()}" if text.startswith("-") else f"{render(first)} + {text}"


class _Latex(LatexPrinter):
    """Writes the functions that stand for operators by their whole names."""

    def _hprint_Function(self, func: str) -> str:
        if "_" in func or "[" in func:
            return f"\\operatorname{{{_escaped(func)}}}"
        return super()._hprint_Function(func)


def _escaped(name: str) -> str:
    return name.replace("_", "\\_")


def _symbols_in(expr: Any) -> set[sympy.Symbol]:
    return {symbol for symbol in expr.free_symbols if isinstance(symbol, sympy.Symbol)}


def _latex_name(name: str) -> str:
    plain = name.rstrip("'")
    prime = name[len(plain) :]
    stem, _, index = plain.rpartition("_")
    if not (stem and index.isdigit()):
        stem, index = plain, ""
    letter = f"\\{stem}" if stem in greek_letters_set else stem
    if stem not in greek_letters_set and len(stem) > 1:
        letter = f"\\mathrm{{{_escaped(stem)}}}"
    return f"{letter}{f'_{{{index}}}' if index else ''}{prime}"


# ---------------------------------------------------------------------- choosing


def derive_update_rule(
    variants: Sequence[tuple[Program, tuple[str, ...]]], variant: int | None = None, parameter: str | None = None
) -> UpdateRule:
    """Returns the rule of one variant of an update for one parameter.

    Args:
        variants: the update programs, each with the conditions under which it holds.
        variant: the position of a variant; by default the latest of those that take the most state, which is what
            every step but the first runs.
        parameter: a parameter's name; by default the first of those with the most state of their own.

    Raises:
        InputError: there is no such variant, or it does not change such a parameter.
    """
    program, conditions = variants[_choose_variant(variants, variant)]
    parameter = _choose_parameter(program, parameter)
    chosen = _results_of(program, parameter)
    relevant = _ancestors(program, [program.result_of(slot) for slot in chosen])
    inputs = [(slot, node) for slot, node in zip(program.inputs, program.placeholders, strict=True) if node in relevant]
    names = _names([*(slot for slot, _ in inputs), *chosen], parameter, _parameters(program))
    values = {node: _value(program, slot, node, names[slot]) for slot, node in inputs}
    wanted = {f"{names[slot]}'": program.result_of(slot) for slot in chosen}
    new = {node: _symbol(name, node) for name, node in reversed(wanted.items()) if node.op == "call_function"}
    symbols = {value.name: value for value in values.values() if isinstance(value, sympy.Symbol)}
    inlined = Translation(relevant, values, {}).formulas(wanted)
    return UpdateRule(parameter, conditions, symbols, inlined, Translation(relevant, values, new).formulas(wanted))


def _choose_variant(variants: Sequence[tuple[Program, tuple[str, ...]]], variant: int | None) -> int:
    if variant is None:
        counts = [sum(slot.role is Role.STATE for slot in program.inputs) for program, _ in variants]
        return max(range(len(counts)), key=lambda index: (counts[index], index))
    if not -len(variants) <= variant < len(variants):
        raise InputError(
            compose_message(
                f"variant={variant} does not exist",
                None,
                f"{len(variants)} variants of the update were captured so far.",
                'Print `fn.programs["update"]` to see them.',
            )
        )
    return variant


def _choose_parameter(program: Program, parameter: str | None) -> str:
    moved = [
        slot.path
        for slot, node in zip(program.results, program.returned, strict=True)
        if slot.role is Role.PARAM and node.op == "call_function"
    ]
    if parameter in moved or (parameter is None and moved):
        owned = {name: sum(_owner(slot, moved) == name for slot in program.inputs) for name in moved}
        return max(moved, key=owned.__getitem__) if parameter is None else parameter
    raise InputError(
        compose_message(
            "the update changes no parameter" if parameter is None else f"the update does not change {parameter!r}",
            None,
            f"It changes {', '.join(map(repr, moved)) or 'none'}.",
            "Name a trained parameter as the model names it.",
        )
    )


def _owner(slot: Slot, parameters: Sequence[str]) -> str | None:
    """Returns the parameter that a piece of state belongs to: the longest whose name its path starts with."""
    found = [name for name in parameters if slot.role is Role.STATE and slot.path.startswith(f"{name}.")]
    return max(found, key=len, default=None)


def _parameters(program: Program) -> list[str]:
    return [slot.path for slot in program.results if slot.role is Role.PARAM]


def _results_of(program: Program, parameter: str) -> list[Slot]:
    """Returns the result slots of a parameter and of the state that is its own or everybody's."""
    parameters = _parameters(program)
    kept = [Slot(Role.PARAM, parameter)]
    return kept + [s for s in program.results if s.role is Role.STATE and _owner(s, parameters) in (parameter, None)]


def _ancestors(program: Program, nodes: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Returns the nodes that some nodes depend on, themselves included, in the order of the graph."""
    found = set(nodes)
    for node in reversed(program.graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return {node: None for node in program.graph.nodes if node in found}


# ---------------------------------------------------------------------- naming


def _value(program: Program, slot: Slot, node: fx.Node, name: str) -> sympy.Expr:
    """Returns the symbol of an input; a constant number is itself."""
    constant = program.constants.get(slot)
    if constant is not None and constant.dim() == 0:
        return number(constant.item())
    return _symbol(name, node)


def _symbol(name: str, node: fx.Node) -> sympy.Symbol:
    whole = not node.meta["val"].is_floating_point()
    return sympy.Symbol(name, integer=True) if whole else sympy.Symbol(name, real=True)


def _names(slots: Sequence[Slot], parameter: str, parameters: Sequence[str]) -> dict[Slot, str]:
    """Returns a name for each slot: a short one where it is the only slot that wants it."""
    wanted = {slot: _short_name(slot, parameter, parameters) for slot in slots}
    owners: dict[str, set[Slot]] = {}
    for slot, name in wanted.items():
        owners.setdefault(name, set()).add(slot)
    return {slot: name if len(owners[name]) == 1 else slot.name for slot, name in wanted.items()}


def _short_name(slot: Slot, parameter: str, parameters: Sequence[str]) -> str:
    owner = slot.path if slot.role in (Role.PARAM, Role.GRAD) else _owner(slot, parameters)
    suffix = f"[{owner}]" if owner not in (parameter, None) else ""
    if slot.role in (Role.PARAM, Role.GRAD):
        return ("theta" if slot.role is Role.PARAM else "G") + suffix
    if slot.role not in (Role.STATE, Role.HYPER):
        return slot.name
    *front, last = slot.path.removeprefix(f"{owner}.").split(".")
    if last.isdigit() and front:
        stem = front[-1]
        last = f"{stem[:-1] if stem.endswith('s') and len(stem) > 2 else stem}_{int(last) + 1}"
    return last + suffix
