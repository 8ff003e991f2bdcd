"""Block recomputation: the same values from less memory."""

import torch
from live_training import Training, normal, plain_sgd, squared_error
from memory import peak_of
from mode_cases import CASES, mlp
from recorded import assert_same, call, sample
from torch import nn

from gimli_compile.checker import verify
from gimli_compile.live_bytes import made_bytes, peak_bytes
from gimli_compile.passes.rematerialization import recompute_blocks


def gradient_of(training):
    _, _, fn = training.functionalized()
    fn.step(fn.init(), training.batches[0], None, training.meta)
    return fn.programs["grad"].latest


def deep(depth=24, width=8, size=64):
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    batch = (normal(size, width), normal(size, width))
    return Training(lambda: nn.Sequential(*layers), plain_sgd, squared_error, [batch])


def test_the_same_values_from_less_memory():
    program = gradient_of(deep())
    code, meta = program.code, [dict(node.meta) for node in program.graph.nodes]
    made = recompute_blocks(program)
    verify(made)
    assert (program.copy().code, [dict(node.meta) for node in program.graph.nodes]) == (code, meta)
    values = sample(program)
    with torch.no_grad():
        assert_same(call(made, values), call(program, values))
    assert peak_bytes(made) < 0.6 * peak_bytes(program)


def test_the_peak_is_about_the_root_of_the_depth():
    shallow, deeper = (peak_bytes(recompute_blocks(gradient_of(deep(depth)))) for depth in (16, 64))
    grads = 48 * (8 * 8 + 8) * 8  # of the deeper network's further layers
    assert deeper - grads < 2.5 * shallow


def test_nothing_forward_is_computed_more_than_twice():
    program = gradient_of(deep())
    count = lambda p: sum(node.target is torch.ops.aten.addmm.default for node in p.graph.nodes)  # noqa: E731
    assert count(program) == 24
    assert 24 < count(recompute_blocks(program)) <= 47


def test_what_runs_takes_what_was_estimated():
    """The text that frees its values holds no more than the shapes say, up to what is not counted there."""
    for program in (gradient_of(deep()), recompute_blocks(gradient_of(deep()))):
        given = sample(program)
        values = [given[slot.path] for slot in program.inputs]
        with torch.no_grad():
            peak = peak_of(lambda run=program.function, values=values: run(*values))
        assert 0.9 * peak_bytes(program) <= peak <= 1.1 * peak_bytes(program)
    assert peak_bytes(program) < made_bytes(program)


def test_a_small_program_stays_as_it_is():
    program = gradient_of(Training(mlp, plain_sgd, squared_error, CASES["mlp"].batches))
    assert recompute_blocks(program) is program
