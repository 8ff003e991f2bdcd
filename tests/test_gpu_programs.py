"""How programs for a GPU are compiled, as far as this can be seen without one."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.exc import InductorError

from gimli_compile.compiled import backends
from gimli_compile.compiled.halves import trace
from gimli_compile.metadata import FAKE


def updates(rate, *values):
    half = len(values) // 2
    return [p - rate * g for p, g in zip(values[:half], values[half:], strict=True)]


def program_on(device):
    """Returns the graph of one step of gradient descent for three parameters; nothing has to be on the device."""
    with FAKE:
        examples = [torch.empty(shape, device=device) for shape in ((), *2 * ((4, 3), (5,), (7,)))]
    return trace(updates, examples)


@pytest.fixture
def compilations(monkeypatch):
    """Records whether kernels for many tensors were asked for; what `fails` names raises as Inductor does."""
    asked, fails = [], set()

    def compile_fx_inner(graph, examples, **options):
        asked.append(inductor_config.combo_kernels)
        assert inductor_config.combo_kernels_pointwise_only
        if asked[-1] in fails:
            raise InductorError(RuntimeError("no such kernel"), None)
        return lambda inputs: graph(*inputs)

    monkeypatch.setattr(backends, "compile_fx_inner", compile_fx_inner)
    return asked, fails


def test_updates_of_many_parameters_share_kernels_on_a_gpu(compilations):
    asked, _ = compilations
    backends.compile_with_inductor(program_on("cuda"))
    assert asked == [True]


def test_programs_that_cannot_share_kernels_are_compiled_without(compilations):
    asked, fails = compilations
    fails.add(True)
    program = backends.compile_with_inductor(program_on("cuda"))
    assert asked == [True, False]
    values = [torch.tensor(0.5), *(torch.full(shape, 3.0) for shape in 2 * ((4, 3), (5,), (7,)))]
    assert all(torch.equal(found, torch.full_like(found, 1.5)) for found in program(values))


def test_a_failure_that_has_another_reason_is_told(compilations):
    asked, fails = compilations
    fails |= {True, False}
    with pytest.raises(InductorError, match="no such kernel"):
        backends.compile_with_inductor(program_on("cuda"))
    assert asked == [True, False]


def test_programs_for_the_cpu_are_as_before(compilations):
    asked, _ = compilations
    backends.compile_with_inductor(program_on("cpu"))
    assert asked == [False]
