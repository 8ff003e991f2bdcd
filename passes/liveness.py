"""Dead-code elimination."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from gimli_compile.program import Program
from gimli_compile.slot import Role


def eliminate_dead_code(program: Program) -> Program:
    """Removes nodes whose values reach no result, and constants that nothing uses.

    Inputs stay, draws among them: dropping a draw would change every later one.

        a = aten.sin(x)
        b = aten.cos(x)      becomes      a = aten.sin(x)
        return (a,)                       return (a,)
    """
    copied = program.copy()
    for node in reversed(list(copied.graph.nodes)):
        if node.op == "call_function" and not node.users:
            copied.graph.erase_node(node)
    kept = []
    for slot, node in zip(copied.inputs, copied.placeholders, strict=True):
        if slot.role is Role.CONSTANT and not node.users:
            copied.graph.erase_node(node)
        else:
            kept.append(slot)
    constants = {slot: value for slot, value in copied.constants.items() if slot in kept}
    return replace(copied, inputs=tuple(kept), constants=constants)


def restrict_results(program: Program, keep: list[int]) -> Program:
    """Returns the program that computes only the results at these positions; calls that only others need stay."""
    copied = program.copy()
    output = copied.output
    returned = copied.returned
    output.args = (tuple(returned[index] for index in keep),)
    return replace(copied, results=tuple(program.results[index] for index in keep))


def compute_only(program: Program, keep: list[int]) -> Program:
    """Returns the program of the results at these positions, with all inputs: small for few results of a large one."""
    wanted = [program.returned[index] for index in keep]
    live, pending = set(wanted), list(wanted)
    while pending:
        new = [argument for argument in pending.pop().all_input_nodes if argument not in live]
        live.update(new)
        pending.extend(new)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in live or node.op == "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    graph.output(tuple(env[node] for node in wanted))
    return replace(program, graph=graph, results=tuple(program.results[index] for index in keep))


def drop_unused_inputs(program: Program, *, roles: tuple[Role, ...] = tuple(Role)) -> Program:
    """Removes inputs of some roles that nothing uses. All roles: for programs that only decide, such as guards."""
    copied = program.copy()
    kept = []
    for slot, node in zip(copied.inputs, copied.placeholders, strict=True):
        if node.users or slot.role not in roles:
            kept.append(slot)
        else:
            copied.graph.erase_node(node)
    draws = {slot: draw for slot, draw in copied.draws.items() if slot in kept}
    return replace(copied, inputs=tuple(kept), draws=draws)
