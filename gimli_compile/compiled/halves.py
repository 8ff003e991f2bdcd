"""A pure function as two graphs: its values with what the backward pass needs, and the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from gimli_compile.compiled.simplification import simplify
from gimli_compile.metadata import FAKE

Tensor = torch.Tensor
Function = Callable[..., Sequence[Tensor]]
Lanes = tuple[int | None, ...] | None  # for each input, the dimension that the tasks are in; None: there are no tasks

_SLOW = {getattr(torch.ops.aten, name).default for name in ("tanh", "erf", "log", "sin", "cos")}


@dataclass(frozen=True)
class Halves:
    """The graphs of a function and of its backward pass.

    `plain` computes the results, each tensor once: `places` says where each result of the function is among them.
    `saving` computes the results and then residuals. `backward` takes `residuals`, which are places in inputs and
    values of `saving` together, then the adjoints of the results `active`, then an accumulator for each of `summed`. It
    returns the adjoints of the inputs `found`; to those of the inputs `summed`, accumulators are added. `results` are
    fake tensors.
    """

    plain: fx.GraphModule
    saving: fx.GraphModule
    backward: fx.GraphModule | None
    places: tuple[int, ...]
    residuals: tuple[int, ...]
    active: tuple[int, ...]
    found: tuple[int, ...]
    summed: tuple[int, ...]
    results: tuple[Tensor, ...]


def trace(function: Function, examples: Sequence[Tensor]) -> fx.GraphModule:
    """Returns the graph of a pure function on inputs of the form of `examples`; nothing runs."""
    fakes = [_fake(example) for example in examples]
    with FAKE, torch.no_grad():
        module = make_fx(_positional(function, len(fakes)))(*fakes)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def halves(
    function: Function, examples: Sequence[Tensor], wanted: Sequence[int], summed: frozenset[int], lanes: Lanes
) -> Halves:
    """Splits a function into its halves.

    Args:
        function: takes one tensor for each example, returns tensors. Pure.
        examples: inputs, of which only the form matters; with `lanes`, all tasks together.
        wanted: the inputs that are differentiated.
        summed: inputs whose adjoints are added up over the steps of a loop.
        lanes: the dimension of the tasks of each input, if there are tasks.
    """
    start = trace_results(function, examples, wanted, lanes)
    if not start.active:
        return start.without_adjoints()
    results, active = start.results, start.active
    joint, found = _joint(start.forward, start.single, wanted, active)
    tangents = [results[index] for index in active]
    whole = with_contiguous_results(over_tasks(joint, lanes, found, len(active)), [*examples, *tangents])
    name_inputs(simplify(without_detach(whole)), len(examples))
    _compute_slow_functions_once(whole)
    saving, backward = min_cut_rematerialization_partition(whole, None, num_fwd_outputs=len(results))
    residuals = keep_fresh_only(saving, len(examples), len(results))
    added = tuple(index for index in found if index in summed)
    accumulate(backward, [position for position, index in enumerate(found) if index in summed])
    return Halves(start.plain, saving, backward, start.places, residuals, active, found, added, results)


@dataclass(frozen=True)
class Start:
    """What both ways to the adjoint begin with: `forward` for one task, on inputs like `single`; see `Halves`."""

    forward: fx.GraphModule
    single: list[Tensor]
    plain: fx.GraphModule
    places: tuple[int, ...]
    active: tuple[int, ...]
    results: tuple[Tensor, ...]

    def without_adjoints(self) -> Halves:
        """Returns the halves where nothing depends on what is differentiated."""
        return Halves(self.plain, self.plain, None, self.places, (), (), (), (), self.results)


def trace_results(function: Function, examples: Sequence[Tensor], wanted: Sequence[int], lanes: Lanes) -> Start:
    """Traces what a function computes, and finds out which results depend on the inputs `wanted`."""
    given = examples if lanes is None else [_one(example, dim) for example, dim in zip(examples, lanes, strict=True)]
    single = list(given)
    forward = trace(function, single)
    places = _return_once(forward)
    active = _active(forward, single, wanted)
    mapped = forward if lanes is None else torch.func.vmap(forward, in_dims=lanes)
    plain = simplify(without_detach(with_contiguous_results(mapped, examples)))
    return Start(forward, single, plain, places, active, tuple(node.meta["val"] for node in outputs(plain)))


def _fake(example: Tensor) -> Tensor:
    with FAKE:
        return torch.empty(example.shape, dtype=example.dtype, device=example.device)


def _one(example: Tensor, dim: int | None) -> Tensor:
    fake = _fake(example)
    return fake if dim is None else fake.select(dim, 0)


def _positional(function: Function, count: int) -> Function:
    """Gives a function one named parameter for each input: their names become those of the graph's inputs."""
    names = ", ".join(f"primals_{index}" for index in range(count))
    return eval(f"lambda {names}: function(*({names}{',' if count else ''}))", {"function": function})


def outputs(module: fx.GraphModule) -> Sequence[Any]:
    """Returns the nodes that a graph returns."""
    return next(iter(module.graph.find_nodes(op="output"))).args[0]


def without_detach(module: fx.GraphModule) -> fx.GraphModule:
    """Takes out what only says that nothing is differentiated any further."""
    for node in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default)):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()
    return module


def _return_once(module: fx.GraphModule) -> tuple[int, ...]:
    """Lets a graph return each value once; returns the place of each former result."""
    output = next(iter(module.graph.find_nodes(op="output")))
    distinct = list(dict.fromkeys(output.args[0]))
    places = tuple(distinct.index(node) for node in output.args[0])
    output.args = (tuple(distinct),)
    module.recompile()
    return places


def contiguous(function: Function) -> Function:
    """A loop's values have one layout in every step."""
    return lambda *inputs: [result.contiguous() for result in function(*inputs)]


def with_contiguous_results(function: Function, examples: Sequence[Tensor]) -> fx.GraphModule:
    """Returns the graph of a function with contiguous results; a graph that has such results is copied."""
    if isinstance(function, fx.GraphModule) and all(node.meta["val"].is_contiguous() for node in outputs(function)):
        graph = fx.Graph()
        graph.output(graph.graph_copy(function.graph, {}))
        return _make_graph_module(function, graph)
    return trace(contiguous(function), examples)


def _active(forward: fx.GraphModule, examples: Sequence[Tensor], wanted: Sequence[int]) -> tuple[int, ...]:
    """Returns the results that depend on the wanted inputs."""
    inputs = [_fake(example) for example in examples]
    with FAKE, torch.enable_grad():
        for index in wanted:
            inputs[index].requires_grad_()
        results = forward(*inputs)
    return tuple(index for index, result in enumerate(results) if result.requires_grad)


def _joint(
    forward: fx.GraphModule, examples: Sequence[Tensor], wanted: Sequence[int], active: tuple[int, ...]
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Returns the graph of results and adjoints, and the inputs that have an adjoint."""
    found: list[int] = []

    def run(*values: Tensor) -> list[Tensor]:
        inputs = list(values[: len(examples)])
        for index in wanted:
            inputs[index] = inputs[index].detach().requires_grad_()
        with torch.enable_grad():
            results = forward(*inputs)
        sources = [inputs[index] for index in wanted]
        seeds = values[len(examples) :]
        grads = torch.autograd.grad([results[index] for index in active], sources, seeds, allow_unused=True)
        found[:] = [index for index, grad in zip(wanted, grads, strict=True) if grad is not None]
        return [*(result.detach() for result in results), *(grad for grad in grads if grad is not None)]

    with FAKE, torch.no_grad():
        results = forward(*map(_fake, examples))
    return trace(run, [*examples, *(results[index] for index in active)]), tuple(found)


def over_tasks(joint: fx.GraphModule, lanes: Lanes, found: tuple[int, ...], others: int) -> Function:
    """Maps what ends with the adjoints of the inputs `found` over tasks; what all tasks share gets the sum of theirs.

    `others` is the number of inputs besides those of the function, which all lead with the task.
    """
    if lanes is None:
        return joint
    mapped = torch.func.vmap(joint, in_dims=(*lanes, *[0] * others))

    def run(*values: Tensor) -> list[Tensor]:
        made = list(mapped(*values))
        for position, index in enumerate(found, len(made) - len(found)):
            dim = lanes[index]
            made[position] = made[position].sum(0) if dim is None else made[position].movedim(0, dim)
        return made

    return run


def name_inputs(module: fx.GraphModule, primals: int) -> None:
    """Gives the adjoints of results the names by which the partitioner knows them."""
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if index >= primals:
            node.target = f"tangents_{index - primals}"
            node._rename(node.target)
    module.recompile()


def _compute_slow_functions_once(module: fx.GraphModule) -> None:
    """Lets the partitioner keep rather than compute again what takes the CPU longer than to load it."""
    for node in module.graph.nodes:
        if node.target in _SLOW and node.meta["val"].device.type == "cpu":
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def keep_fresh_only(saving: fx.GraphModule, inputs: int, results: int) -> tuple[int, ...]:
    """Lets a graph return each residual once and no input; returns where the residuals are to be found."""
    placeholders = list(saving.graph.find_nodes(op="placeholder"))
    assert len(placeholders) == inputs
    output = next(iter(saving.graph.find_nodes(op="output")))
    returned = list(output.args[0])
    kept, saved = returned[:results], returned[results:]
    places = {node: index for index, node in reversed(list(enumerate([*placeholders, *kept])))}
    for node in saved:
        if node not in places:
            places[node] = inputs + len(kept)
            kept.append(node)
    output.args = (tuple(kept),)
    saving.recompile()
    return tuple(places[node] for node in saved)


def accumulate(backward: fx.GraphModule, positions: Sequence[int]) -> None:
    """Adds an accumulator to some results of a graph."""
    graph = backward.graph
    output = next(iter(graph.find_nodes(op="output")))
    returned = list(output.args[0])
    last = list(graph.find_nodes(op="placeholder"))[-1]
    for position in positions:
        with graph.inserting_after(last):
            last = graph.placeholder(f"accumulator_{position}")
        last.meta["val"] = _fake(returned[position].meta["val"])
        with graph.inserting_before(output):
            added = graph.call_function(torch.ops.aten.add.Tensor, (last, returned[position]))
        added.meta["val"] = _fake(returned[position].meta["val"])
        returned[position] = added
    output.args = (tuple(returned),)
    backward.recompile()
