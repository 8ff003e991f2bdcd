"""Records plain Python functions as raw programs, and runs and prints programs for tests."""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from gimli_compile.checker import verify
from gimli_compile.concolic import Number, make_number
from gimli_compile.interception import Interception
from gimli_compile.program import Program
from gimli_compile.recording import DATA, HOST, Recorder, Region
from gimli_compile.slot import Role, Slot


@dataclass
class Trace:
    """What one recording gave: the program, what the function returned, and what the recorder noted beside."""

    program: Program
    value: Any
    recorder: Recorder

    @property
    def outcomes(self):
        return [guard.outcome for guard in self.recorder.guards]

    @property
    def baked(self):
        return [entry.what for entry in self.recorder.baked]


def trace(function, tensors=None, numbers=None, *, region=Region.OPTIMIZER, around: Any = nullcontext):
    """Calls `function` with copies of named tensors and with concolic numbers, and records what it does.

    Results of the program: the tensors and numbers that the function returned (`output[0]`...), the final value of
    every tensor that it changed (`state[name]`), and the guards. `around` makes a context, from the recorder, that the call runs in.
    """
    recorder = Recorder("test")
    given, made = {}, {}
    for name, value in (tensors or {}).items():
        given[name] = value.detach().clone()
        recorder.add_input(Slot(Role.STATE, name), given[name], DATA)
    for name, value in (numbers or {}).items():
        tensor = torch.tensor(float(value), dtype=torch.float64)
        recorder.add_input(Slot(Role.HYPER, name), tensor, HOST)
        made[name] = make_number(value, tensor, recorder)
    versions = {name: value._version for name, value in given.items()}
    mode = Interception(recorder) if numbers is not None else nullcontext()
    with around(recorder), recorder, recorder.in_region(region), mode:
        value = function(**given, **made)
    results = {}
    with recorder, torch.no_grad():
        returned = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
        for index, item in enumerate(returned):
            if isinstance(item, (torch.Tensor, Number)):
                tensor = item.tensor if isinstance(item, Number) else item
                results[Slot(Role.OUTPUT, str(index))] = recorder.node_of(tensor)
        for name, tensor in given.items():
            if tensor._version != versions[name]:
                results[Slot(Role.STATE, name)] = recorder.node_of(tensor)
        for index, guard in enumerate(recorder.guards):
            results[Slot(Role.GUARD, str(index))] = guard.node
    recorder.graph.output(tuple(results.values()))
    program = Program(
        "a recorded function",
        "function",
        recorder.graph,
        tuple(recorder.inputs),
        tuple(results),
        dict(recorder.constants),
        dict(recorder.draws),
    )
    verify(program)
    return Trace(program, value, recorder)


def record(function, tensors, **options):
    """Returns the raw program of a function of named tensors."""
    return trace(function, tensors, **options).program


def call(program, values):
    """Runs a program on copies of values that are given by the path of the slot; the results are by path as well."""
    bound = {slot: values[slot.path] for slot in program.inputs if slot.path in values}
    return {str(slot): value for slot, value in program({s: v.clone() for s, v in bound.items()}).items()}


def eager(function, values):
    """Runs a function as `call` runs its program: what it returned, and the tensors it changed."""
    given = {name: value.clone() for name, value in values.items()}
    versions = {name: value._version for name, value in given.items()}
    value = function(**given)
    returned = value if isinstance(value, (tuple, list)) else () if value is None else (value,)
    results = {f"output[{index}]": item for index, item in enumerate(returned)}
    results.update({f"state[{name}]": t for name, t in given.items() if t._version != versions[name]})
    return results


def sample(program, seed=0):
    """Returns random values, by path, for the inputs of a program that neither constants nor draws provide.

    Floating values are multiples of 1/16, never 0: sums of products are then exact in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for slot, node in zip(program.inputs, program.placeholders, strict=True):
        form = node.meta["val"]
        if slot.role is Role.CONSTANT:
            continue
        if form.dtype.is_floating_point:
            value = torch.randn(form.shape, generator=generator, dtype=torch.float64).mul(16).round().div(16)
            value = value.where(value != 0, 0.5)
        else:
            value = torch.randint(0, 2, form.shape, generator=generator).to(form.dtype)
        values[slot.path] = torch.empty_strided(form.shape, form.stride(), dtype=form.dtype).copy_(value)
    return values


def projection(results, seed=1):
    """Returns a fixed random linear function of the floating results."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for value in results.values():
        if value.dtype.is_floating_point:
            total = total + (torch.randn(value.shape, generator=generator, dtype=torch.float64) * value).sum()
    return total


def derivatives(run, values):
    """Returns first and second derivatives of a random projection of `run(values)`, by the names of the values."""
    leaves = {n: v.detach().clone().requires_grad_() for n, v in values.items() if v.dtype.is_floating_point}
    first = _gradients(projection(run({**values, **leaves})), leaves)
    second = _gradients(projection(first, seed=2), leaves)
    found = {f"first {name}": value.detach() for name, value in first.items()}
    return {**found, **{f"second {name}": value.detach() for name, value in second.items()}}


def _gradients(total, leaves):
    """Returns the gradients by name; zeros for what `total` does not depend on."""
    if not total.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), **options), strict=True))


def assert_same(found, expected, *, tolerance=0.0):
    """Asserts that two mappings hold the same tensors: names, dtypes, shapes; values up to a part of the largest one."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        finite = value.detach().double()[value.isfinite()].abs()
        allowed = tolerance * max(1.0, finite.max().item()) if finite.numel() else 0.0
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=allowed, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def text(program):
    """Returns the code of a program without line numbers and columns, for golden texts."""
    code = re.sub(r"^( *# ).*?:\d+ in [\w<>]+: ", r"\1", program.code, flags=re.MULTILINE)
    return re.sub(r"(?<=\S) +# ", "  # ", code)
