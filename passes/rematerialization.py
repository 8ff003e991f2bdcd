"""Block recomputation: a gradient program that keeps its blocks' inputs, and computes each block again when needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from gimli_compile.checker import verify
from gimli_compile.live_bytes import bytes_of, owner_of, peak_bytes
from gimli_compile.metadata import operator_name
from gimli_compile.program import Program
from gimli_compile.slot import Role

_BLOCKS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_WORTH_IT = 0.8


def recompute_blocks(program: Program) -> Program:
    """Cuts the forward part of a gradient program into blocks and computes each again in its backward part.

    What a later block uses is kept, everything else of a block goes when the block is done, and comes again, one block
    at a time and the last first (Chen et al. 2016; in the inner gradient: MixFlow-MG, arXiv 2505.00793). The cuts are
    where few bytes are live; of several numbers of blocks the one with the lowest peak is taken. A program that would
    need not much less memory stays as it is. Nothing later may merge common subexpressions.

        a = aten.sin(x)                          a = aten.sin(x)
        b = aten.exp(a)                          b = aten.exp(a)
        ...                          becomes     ...
        c = aten.mul(grad_b, b)                  b_1 = aten.exp(a)
                                                 c = aten.mul(grad_b, b_1)
    """
    forward = _forward_part(program)
    crossing = _crossing(forward)
    best, lowest = program, peak_bytes(program) * _WORTH_IT
    for blocks in _BLOCKS:
        cuts = _choose_cuts(forward, crossing, blocks)
        if cuts:
            made = _rebuilt(program, forward, cuts)
            peak = peak_bytes(made)
            if peak < lowest:
                best, lowest = made, peak
    verify(best)
    return best


def _forward_part(program: Program) -> list[fx.Node]:
    """Returns the calls that what is no gradient needs: the loss, the buffers and the conditions."""
    needed: set[fx.Node] = set()
    for slot, node in zip(program.results, program.returned, strict=True):
        if slot.role is not Role.GRAD:
            needed.add(node)
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in program.graph.nodes if node in needed and node.op == "call_function"]


def _crossing(forward: Sequence[fx.Node]) -> list[int]:
    """Returns the bytes that are computed up to each place of the forward part and used after it."""
    place = {node: index for index, node in enumerate(forward)}
    ends: dict[fx.Node, int] = {}
    for index, node in enumerate(forward):
        for used in node.all_input_nodes:
            ends[owner_of(used)] = index
    change = [0] * (len(forward) + 1)
    for owner, end in ends.items():
        if owner in place:
            change[place[owner]] += bytes_of(owner)
            change[end] -= bytes_of(owner)
    total, found = 0, []
    for delta in change[:-1]:
        total += delta
        found.append(total)
    return found


def _choose_cuts(forward: Sequence[fx.Node], crossing: Sequence[int], blocks: int) -> list[int]:
    """Returns the places after which to cut: no block has more than its share of bytes, and the least is kept."""
    sizes = [bytes_of(node) if owner_of(node) is node else 0 for node in forward]
    share = sum(sizes) / blocks
    before = [0]
    for size in sizes:
        before.append(before[-1] + size)
    places = [-1, *_low_places(crossing, sizes), len(forward) - 1]
    cost = {-1: 0.0}
    last: dict[int, int] = {}
    for index, end in enumerate(places[1:], 1):
        # A block of one stretch between two low places may be larger than its share: it cannot be cut.
        starts = [s for i, s in enumerate(places[:index]) if before[end + 1] - before[s + 1] <= share or i == index - 1]
        last[end] = min(starts, key=lambda start: (cost[start], start))
        cost[end] = cost[last[end]] + crossing[end]
    cuts, at = [], places[-1]
    while last[at] != -1:
        at = last[at]
        cuts.append(at)
    return cuts[::-1]


def _low_places(crossing: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Returns the places worth a cut: after a call that makes something, no fewer bytes cross on either side."""
    inner = range(1, len(crossing) - 1)
    return [i for i in inner if sizes[i] and crossing[i - 1] >= crossing[i] <= crossing[i + 1]]


def _rebuilt(program: Program, forward: Sequence[fx.Node], cuts: Sequence[int]) -> Program:
    """Returns the program with the forward part first, and what its backward part needs of a block computed again."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in program.placeholders:
        made[node] = graph.node_copy(node)
        made[node].meta = dict(node.meta)
    for node in forward:
        made[node] = _copy(graph, node, made)
    known = _kept(forward, cuts, program.returned) | set(program.placeholders)
    again = {node: made[node] for node in known}
    inside = set(forward)
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in inside:
            _compute_again(graph, node.all_input_nodes, again)
            again[node] = _copy(graph, node, again)
    results = tuple(made.get(node) or again[node] for node in program.returned)
    graph.output(results)
    return Program(
        program.title,
        program.name,
        graph,
        program.inputs,
        program.results,
        program.constants,
        program.draws,
        program.stage,
    )


def _compute_again(graph: fx.Graph, wanted: Iterable[fx.Node], again: dict[fx.Node, fx.Node]) -> None:
    """Adds copies of what some nodes need and is not there, arguments first."""
    pending = [node for node in wanted if node not in again]
    while pending:
        node = pending[-1]
        lacking = [source for source in node.all_input_nodes if source not in again]
        if lacking:
            pending += lacking
            continue
        pending.pop()
        if node not in again:
            again[node] = _copy(graph, node, again)


def _kept(forward: Sequence[fx.Node], cuts: Sequence[int], returned: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns what is kept of the forward part: what a later block uses, all of the last block, and the results."""
    block: dict[fx.Node, int] = {}
    for index, node in enumerate(forward):
        block[node] = sum(index > cut for cut in cuts)
    kept = {node for node in forward if block[node] == len(cuts)} | {node for node in returned if node in block}
    for node in forward:
        kept.update(used for used in node.all_input_nodes if used in block and block[used] < block[node])
    return kept


def _copy(graph: fx.Graph, node: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
    copied = graph.create_node(node.op, node.target, args, kwargs, name=operator_name(node.target))
    copied.meta = dict(node.meta)
    return copied
