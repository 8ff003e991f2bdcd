"""What building a program costs, in counts that do not depend on the machine."""

import pytest
import torch
from torch import fx
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen import common
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.scheduler import Scheduler

from gimli_compile.compiled import backends, fusion_memory
from gimli_compile.compiled.backends import compile_with_inductor, run_in_python
from gimli_compile.compiled.dtype_rules import dtype_rules_made_once
from gimli_compile.compiled.functions import Builder, CompiledFunction
from gimli_compile.compiled.halves import trace


def counted(monkeypatch, owner, name):
    """Returns a list that gets an entry for each call of a method."""
    calls, method = [], getattr(owner, name)

    def count(*args, **options):
        calls.append(name)
        return method(*args, **options)

    monkeypatch.setattr(owner, name, count)
    return calls


def with_one_number(number, *tensors):
    return [tensor * number + tensor.sin() for tensor in tensors]


def inputs(count):
    return [torch.tensor(2.0), *(torch.linspace(-1, 1, 3 * (5 + size)).view(3, -1) for size in range(count))]


needs_compiler = pytest.mark.skipif(not backends.has_compiler(), reason="Inductor needs a C++ compiler")


@needs_compiler
def test_what_all_loops_use_does_not_make_pairs_of_all_of_them(monkeypatch):
    """A learning rate did: a transformer of 8 blocks has a hundred parameters, whose loops were compared two by two."""
    calls = counted(monkeypatch, Scheduler, "can_fuse")
    tried = []
    for count in (20, 60):
        calls.clear()
        program = compile_with_inductor(trace(with_one_number, inputs(count)))
        tried.append(len(calls))
        for found, expected in zip(program(inputs(count)), with_one_number(*inputs(count)), strict=True):
            torch.testing.assert_close(found, expected)
    assert tried[1] < 4 * tried[0]


@needs_compiler
def test_rules_of_types_are_made_once(monkeypatch):
    made = counted(monkeypatch, DtypePropagationOpsHandler, "__init__")
    compile_with_inductor(trace(with_one_number, inputs(3)))
    assert len(made) == 1
    assert vars(common)["DtypePropagationOpsHandler"] is DtypePropagationOpsHandler


@needs_compiler
def test_memory_of_fusions_is_what_inductor_says_and_asked_where_it_counts(monkeypatch):
    """Two products, of which each loop reads one last, could share memory; what they are multiplied by is one number."""
    general, choose, found, asked = fusion_memory._general, InductorChoices.can_fuse, [], []
    assert general is not None

    def compare(scheduler, *nodes):
        found.append(scheduler.can_fusion_increase_peak_memory(*nodes[:2]))
        assert found[-1] == general(scheduler, *nodes[:2])
        return choose(scheduler, *nodes)

    def count(*given):
        asked.append(given)
        return general(*given)

    monkeypatch.setattr(InductorChoices, "can_fuse", staticmethod(compare))
    monkeypatch.setattr(fusion_memory, "_general", count)

    def products(number, first, second, *tensors):
        return [(first @ first) * number, (second @ second) * number, *with_one_number(number, *tensors)]

    square = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    given = [torch.tensor(2.0), square, square.T.contiguous(), *inputs(5)[1:]]
    program = compile_with_inductor(trace(products, given))
    for one, expected in zip(program([value.clone() for value in given]), products(*given), strict=True):
        torch.testing.assert_close(one, expected)
    assert True in found and 0 < len(asked) < len(found)
    assert Scheduler.can_fusion_increase_peak_memory is general


def test_inductor_without_such_rules_is_left_alone(monkeypatch):
    monkeypatch.delattr(common, "DtypePropagationOpsHandler")
    with dtype_rules_made_once():
        assert not hasattr(common, "DtypePropagationOpsHandler")


def test_graphs_are_written_when_they_run(monkeypatch):
    """A graph of thousands of nodes takes a tenth of a second to write, and was written after each of twenty changes."""
    written = counted(monkeypatch, fx.Graph, "python_code")
    examples = inputs(2)
    build = Builder(run_in_python, verify=False)
    options = {"summed": frozenset([0]), "lanes": None, "build": build, "what": "test"}
    made = CompiledFunction(with_one_number, examples, [0, 1], **options)
    assert len(written) <= 5
    for found, expected in zip(made.saving(examples), with_one_number(*examples), strict=False):
        assert torch.equal(found, expected)
