"""First-order programs."""

from __future__ import annotations

import torch

from gimli_compile.metadata import insert_call
from gimli_compile.program import Program
from gimli_compile.slot import Role

aten = torch.ops.aten


def stop_inner_gradients(program: Program) -> Program:
    """Treats the inner gradients as constants: first-order MAML (Finn et al. 2017, section 5.2).

    return (loss, grad)     becomes     detach = aten.detach.default(grad)
                                        return (loss, detach)

    A whole train step has them inside, where they are marked (`meta["inner_gradient"]`).
    """
    copied = program.copy()
    for node in copied.graph.nodes:
        if node.meta.get("inner_gradient"):
            node.target = aten.detach.default
            node.meta.update(stop=True, inner_gradient=False)
    output = copied.output
    returned = list(copied.returned)
    with copied.graph.inserting_before(output):
        for index, slot in enumerate(copied.results):
            if slot.role is Role.GRAD and returned[index].target is not aten.detach.default:
                stop = insert_call(copied.graph, aten.detach.default, (returned[index],), like=returned[index])
                stop.meta["stop"] = True
                returned[index] = stop
    output.args = (tuple(returned),)
    return copied
