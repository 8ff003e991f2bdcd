"""Loops that run in C++ on lean programs: what Python's loop gives, bit for bit, and what the live code gives."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.utils import _pytree as pytree

import gimli_compile as gimli
from gimli_compile.compiled import backends, lean, native, replays
from gimli_compile.compiled.backends import compile_with_inductor, entry_of
from gimli_compile.compiled.halves import trace
from gimli_compile.compiled.lean import give_memory_back, lean_text
from gimli_compile.compiled.unrolling import LoopCompiler
from tests.test_compiled_loops import CASES, Case, adamw, assert_agree, differentiated, held

pytestmark = pytest.mark.skipif(not backends.has_compiler(), reason="Inductor needs a C++ compiler")


def wide(width: int) -> nn.Module:
    """Returns a model with a square matrix of weights."""
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


LOOPS = {
    "adamw": CASES["adamw"],
    "lookahead": CASES["lookahead"],
    "meta and batches, tasks": CASES["meta and batches, tasks"],
    "checkpoint 2": CASES["checkpoint 2"],
    "recomputed": Case(optimizer=adamw, options={"checkpoint": 2}),
    "mixed": Case(options={"backward": "mixed"}),
    "tasks": Case(tasks=3, optimizer=adamw),
    "truncate": CASES["truncate"],
    "a tape beyond the caches": Case(model=lambda: wide(96), tasks=16),
    "train step": CASES["train step"],
    "held gradients, recomputed": Case(train_step=held, options={"checkpoint": "step"}),
}


REPLAYED = (
    "adamw",
    "lookahead",
    "recomputed",
    "mixed",
    "tasks",
    "a tape beyond the caches",
    "train step",
    "held gradients, recomputed",
)  # which take no more than the driver
KINDS = {"play": "forward", "play_back": "backward"}  # of what the driver does for calls like an earlier one


@pytest.fixture(params=["read", "replayed"])
def way(request, monkeypatch):
    """Whether calls are read anew, or replayed where one like them ran before."""
    if request.param == "read":
        monkeypatch.setattr(LoopCompiler, "replay", lambda *_: None)
    return request.param


@pytest.fixture
def runs(way, monkeypatch):
    """Counts the loops that the driver ran, forward and back; "played" counts those that were replayed."""
    counts = {"forward": 0, "backward": 0, "played": 0}

    class Counting:
        def __getattr__(self, name: str):
            kind = KINDS.get(name, name)
            counts[kind] = counts.get(kind, 0) + 1
            counts["played"] = counts.get("played", 0) + (name == "play")
            return getattr(driver, name)

    driver = native.driver()
    monkeypatch.setattr(native, "driver", Counting)
    monkeypatch.setattr(replays, "driver", Counting)
    return counts


def in_python(monkeypatch, run):
    """Runs something with Python's loop."""
    with monkeypatch.context() as patch:
        patch.setattr(native.NativeLoop, "can_run", lambda *_, **__: False)
        patch.setattr(LoopCompiler, "replay", lambda *_: None)
        return run()


def compiled(case):
    fn = case.functionalized()
    tasks = {} if case.tasks is None else {"tasks": True}
    fn.unroll(fn.init(), case.batches(), meta=case.meta, **tasks)
    return fn, differentiated(fn.hyperparameters())


@pytest.mark.parametrize("name", LOOPS)
def test_the_driver_gives_what_the_loop_in_python_gives(name, runs, way, monkeypatch):
    case = LOOPS[name]
    fn, hyper = compiled(case)
    expected = case.run(fn, hyper)
    fast = fn.compile("inductor")
    case.run(fast, hyper)  # programs compare themselves with their graphs: in Python
    assert runs["forward"] == runs["backward"] == 0
    case.run(fast, hyper)
    loops = 2 if "truncate" in case.options else 1
    assert runs["backward"] == 1 and runs["forward"] == loops and not runs["played"]
    found = case.run(fast, hyper)
    assert runs["backward"] == 2 and runs["forward"] == 2 * loops
    assert runs["played"] == (way == "replayed" and name in REPLAYED)
    same = in_python(monkeypatch, lambda: case.run(fast, hyper))
    tolerance = 1e-13 if case.tasks and runs["played"] else 0  # tasks are added up in another order
    for one, other, live in zip(found, same, expected, strict=True):
        assert_agree(one, other, tolerance)
        assert_agree(one, live, 1e-10)


def test_float32_and_a_tape_for_the_loop_in_python(runs, monkeypatch):
    """What the driver kept can be gone back through in Python, which is so where an adjoint did not run yet."""
    case = Case()
    fn = case.functionalized(torch.float32)
    fn.unroll(fn.init(), case.batches(torch.float32))
    hyper = differentiated(fn.hyperparameters())
    fast = fn.compile("inductor")
    expected = case.run(fn, hyper, torch.float32)
    for options in ({}, {"checkpoint": 2}):
        case = Case(options=options)
        case.run(fast, hyper, torch.float32)
        found = case.run(fast, hyper, torch.float32)
        runs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(native.NativeLoop, "can_run_back", lambda *_: False)
            patch.setattr(LoopCompiler, "replay", lambda *_: None)
            same = case.run(fast, hyper, torch.float32)
        assert runs["forward"] == 1 and "backward" not in runs
        for one, other, live in zip(found, same, expected, strict=True):
            assert_agree(one, other, 0)
            assert_agree(one, live, 1e-5)


@pytest.fixture(scope="module")
def fast():
    """A compiled function whose programs ran."""
    case = Case(optimizer=adamw)
    fn, hyper = compiled(case)
    made = fn.compile("inductor")
    for _ in range(2):
        case.run(made, hyper)
    return case, made, hyper


def unrolled(fast, batches=None):
    case, fn, hyper = fast
    state = fn.init()
    state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    last, _ = fn.unroll(state, case.batches() if batches is None else batches, hyper)
    return state, last


@pytest.mark.parametrize("changed", ["parameters", "batches", "hyperparameters"])
def test_what_is_changed_before_the_backward_pass_is_noticed(fast, changed, runs):
    batches = fast[0].batches()
    state, last = unrolled(fast, batches)
    assert runs["forward"] == 1
    with torch.no_grad():
        values = {
            "parameters": state.params["0.weight"],
            "batches": batches[0],
            "hyperparameters": fast[2][0]["betas"][1],
        }
        values[changed].mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.params["0.weight"].sum().backward()


def test_results_may_be_changed(fast, way):
    """They are no part of the tape."""
    state, last = unrolled(fast)
    expected = torch.autograd.grad(last.params["0.weight"].sum(), state.params["0.weight"], retain_graph=True)
    outcome = last.params["0.weight"].sum()
    with torch.no_grad():
        for value in (*last.params.values(), *last.opt_state.values()):
            value.zero_()
    assert_agree(torch.autograd.grad(outcome, state.params["0.weight"]), expected, 0)


def test_a_tape_goes_with_the_graph(fast, monkeypatch, way):
    """The backward pass frees it, or the last tensor that the loop gave: nothing refers to itself."""
    holders = []
    make = native.holder_of
    for module in (native, replays):
        monkeypatch.setattr(module, "holder_of", lambda tape: holders.append(weakref.ref(made := make(tape))) or made)
    gc.disable()
    try:
        state, last = unrolled(fast)
        assert holders[-1]() is not None
        outcome = last.params["0.weight"].sum()
        torch.autograd.grad(outcome, state.params["0.weight"], retain_graph=True)
        torch.autograd.grad(outcome, state.params["0.weight"])
        assert holders[-1]() is None and last is not None
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(outcome, state.params["0.weight"])
        state, last = unrolled(fast)
        del state, last
        assert holders[-1]() is None
    finally:
        gc.enable()


def test_hooks_on_saved_tensors_see_those_of_the_loop(fast, runs):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: packed.append(value) or value, lambda value: value):
        state, last = unrolled(fast)
    assert runs["forward"] == 0 and len(packed) > 20
    found = torch.autograd.grad(last.params["0.weight"].sum(), state.params["0.weight"])
    state, last = unrolled(fast)
    assert runs["forward"] == 1
    assert_agree(found, torch.autograd.grad(last.params["0.weight"].sum(), state.params["0.weight"]), 0)


def test_without_gradients(fast, runs, way):
    case, fn, _ = fast
    fn = fn.compile("inductor")
    with torch.no_grad():
        fn.unroll(fn.init(), case.batches())
        assert runs["forward"] == 0
        fn.unroll(fn.init(), case.batches())
        found, losses = fn.unroll(fn.init(), case.batches())
    assert runs["forward"] == 2 and runs["played"] == (2 if way == "replayed" else 0)
    _, last = unrolled(fast)
    assert_agree(list(found.params.values()), list(last.params.values()), 1e-14)
    assert losses.shape == (5,)


def test_what_has_other_operators_runs_in_python(runs):
    case = CASES["max-pool"]
    fn, hyper = compiled(case)
    fast = fn.compile("inductor")
    results = [case.run(fast, hyper) for _ in range(2)]
    assert runs["forward"] == 0
    assert_agree(pytree.tree_leaves(results[0]), pytree.tree_leaves(results[1]), 0)


def test_a_text_that_says_more_is_not_lean():
    begin, end = "void inductor_entry_impl(", "} // inductor_entry_impl"
    known = f"#include <torch/csrc/inductor/cpp_wrapper/cpu.h>\n{begin}) {{ py::gil_scoped_release_simple release; "
    assert lean_text(f"{known} auto buf0 = std::move(inputs[0]); {end}") is not None
    assert lean_text(f"{known} aoti_torch_cpu_cumsum(buf0, 0); {end}") is None
    assert lean_text("something else") is None


def matrices(rows, columns, batch=()):
    """Yields sizes of what is stored, and how to see a matrix in it: as it is, transposed, a part, every other row."""
    yield (*batch, rows, columns), lambda x: x
    yield (*batch, columns, rows), lambda x: x.mT
    yield (*batch, rows + 3, columns + 2), lambda x: x[..., 3:, 1:-1]
    yield (*batch, columns + 1, 2 * rows), lambda x: x[..., 1:, ::2].mT


def sweep():
    """Yields kind, stored sizes and views of left and right, and the size of what is added."""
    sizes = [(16, 32, 64), (5, 16, 64), (16, 64, 5), (1, 7, 1), (3, 1, 40), (17, 9, 33), (40, 10, 1), (1, 20, 18)]
    sizes += [(37, 50, 1), (3, 90, 1), (80, 300, 20), (20, 400, 80)]  # one column, turned, in parts
    for rows, inner, columns in sizes:
        for left, right in itertools.product(matrices(rows, inner), matrices(inner, columns)):
            yield torch.mm, left, right, None
        yield torch.addmm, *(next(matrices(*s)) for s in ((rows, inner), (inner, columns))), (columns,)
        yield torch.addmm, *(next(matrices(*s)) for s in ((rows, inner), (inner, columns))), (rows, 1)
    for rows, inner, columns in ((10, 40, 40), (10, 1, 40), (10, 40, 1), (40, 10, 3)):
        for left, right in itertools.product(matrices(rows, inner, (6,)), matrices(inner, columns, (6,))):
            yield torch.bmm, left, right, None
        batched = [next(matrices(*s, (6,))) for s in ((rows, inner), (inner, columns))]
        yield torch.baddbmm, *batched, (6, rows, columns)
        yield torch.baddbmm, *batched, (columns,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products(dtype):
    """All kinds of small products, of matrices and views of them with offsets, in one program."""
    cases = list(sweep())

    def function(*inputs: Any) -> Any:
        given = iter(inputs)
        results = []
        kind: Any
        for kind, (_, left), (_, right), added in cases:
            a, b = left(next(given)), right(next(given))
            results.append(kind(a, b) if added is None else kind(next(given), a, b))
        return results

    torch.manual_seed(0)
    shapes = [shape for _, left, right, added in cases for shape in (left[0], right[0], *([added] if added else []))]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes]
    program = compile_with_inductor(trace(function, inputs))
    results = program(list(inputs))
    assert entry_of(program)
    exact = function(*(value.double() for value in inputs))
    for (kind, left, right, added), found, expected in zip(cases, results, exact, strict=True):
        tolerance = 1e-14 if dtype == torch.float64 else 2e-6
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        assert error < tolerance, (kind, left[0], right[0], added, error)


def test_large_products_and_other_types():
    """Beyond some size, and for types without a kernel, torch multiplies."""

    def function(a, b, c, d):
        return [torch.mm(a, b), torch.addmm(a, a, b.mT), torch.mm(c, d.mT), torch.bmm(a[None], b[None])]

    torch.manual_seed(0)
    inputs = [torch.randn(400, 400), torch.randn(400, 400), *(torch.randint(9, (4, 4)) for _ in range(2))]
    program = compile_with_inductor(trace(function, inputs))
    results = program(list(inputs))
    assert entry_of(program)
    assert_agree([one.double() for one in results], [one.double() for one in function(*inputs)], 1e-5)


def around(*sizes: torch.Tensor) -> torch.Tensor:
    """Returns numbers of both signs, small and large ones, and what is no number."""
    special = torch.tensor([0.0, 1e-45, 3e38, float("inf"), float("nan"), 0.625])
    x = torch.cat([torch.logspace(-38, 2, 40001), special, *sizes])
    return torch.cat([x, -x])


def assert_right(found: torch.Tensor, exact: torch.Tensor, units: float) -> None:
    """Compares with numbers in float64, in units in the last place of float32."""
    number = ~exact.isnan()
    near = exact.float().abs()
    unit = torch.nextafter(near, torch.tensor(float("inf"))).double() - near.double()
    finite = near.isfinite()
    assert ((found.double() - exact).abs() / unit)[finite].max() <= units
    assert torch.equal(found[number & ~finite], exact.float()[number & ~finite])
    assert bool(found[~number].isnan().all())
    assert torch.equal(found[number].signbit(), exact[number].signbit())


@pytest.mark.parametrize("bits", [None, 256])
def test_elementary_functions_are_right_to_the_last_places(bits):
    """Of every size, on both sides of where a formula changes and of what overflows or underflows."""
    x = around(torch.linspace(0.5, 0.75, 20001), torch.linspace(0, 12, 40001), torch.linspace(80, 110, 40001))
    with inductor_config.patch({"cpp.simdlen": bits}):
        program = compile_with_inductor(trace(lambda a: [a.tanh(), a.exp(), (-a).exp(), a.sigmoid()], [x]))
        tanh, exp, reciprocal, sigmoid = program([x])
    assert entry_of(program)
    assert_right(tanh, x.double().tanh(), 2)
    assert_right(exp, x.double().exp(), 1)
    assert_right(reciprocal, (-x.double()).exp(), 1)
    normal = ~(x < -87)  # below, where the exponential overflows, torch's formula is zero as well
    assert_right(sigmoid[normal], x.double().sigmoid()[normal], 3)
    assert bool((sigmoid[~normal] < 2e-38).all())


@pytest.mark.parametrize("bits", [None, 256])
def test_lean_programs_call_no_library_for_exponentials(bits):
    """Neither `exp` nor what is made of it, of vectors in float32."""
    x = torch.randn(1024)
    texts = []
    build = lean._LeanCode.build
    with inductor_config.patch({"cpp.simdlen": bits}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean._LeanCode, "build", lambda text, *rest: texts.append(text) or build(text, *rest))
        compile_with_inductor(trace(lambda a: [a.tanh() + a.exp() * a.sigmoid()], [x]))
    program = next(text for text in texts if "cpp_fused_" in text).split("#define assert_size_stride")[1]
    assert "gimli::exp(" in program and "gimli::tanh(" in program
    kernels = program[program.index("cpp_fused_") :]
    assert ".exp()" not in kernels and ".tanh()" not in kernels


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_of_many_rows_on_several_threads(threads):
    """Threads share the rows of one matrix, or the matrices of a batch."""

    def function(a, b, bias, many, others):
        return [torch.mm(a, b), torch.addmm(bias, a, b), torch.mm(a.mT, a), torch.bmm(many, others)]

    torch.manual_seed(0)
    shapes = (1221, 20), (20, 80), (80,), (25, 40, 40), (25, 40, 21)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    program = compile_with_inductor(trace(function, inputs))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = program(list(inputs))
    finally:
        torch.set_num_threads(before)
    assert entry_of(program)
    for found, expected in zip(results, function(*inputs), strict=True):
        assert_agree(found, expected, 1e-13)


@pytest.mark.parametrize("checked", [True, False], ids=["by Inductor", "by us"])
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "not lean"])
def test_other_strides_are_refused(lean, checked):
    """Inductor of torch 2.11 lets no program look at its inputs."""

    def add(a, b):
        return [(a + b).exp() if lean else (a + b).cumsum(0)]

    a = torch.randn(3, 4)
    with inductor_config.patch(size_asserts=checked):
        program = compile_with_inductor(trace(add, [a, a.clone()]))
    torch.testing.assert_close(program([a.clone(), a.clone()]), add(a, a))
    assert bool(entry_of(program)) == lean
    for other in (torch.randn(4, 3).t(), torch.randn(3, 5)[:, :4], torch.randn(4, 4), torch.randn(12)):
        with pytest.raises(RuntimeError, match=r"other sizes or strides|expected (size|ndim)"):
            program([a.clone(), other])
    torch.testing.assert_close(program([a.clone(), a.clone()]), add(a, a))


def test_memory_is_given_back_on_request(runs):
    fn, hyper = compiled(CASES["adamw"])
    fast = fn.compile("inductor")
    first = [CASES["adamw"].run(fast, hyper) for _ in range(3)][-1]
    give_memory_back()
    for again, before in zip(CASES["adamw"].run(fast, hyper), first, strict=True):
        assert_agree(again, before, 0)
    assert runs["forward"] == 3


def test_a_long_loop_takes_the_memory_of_the_last_one(runs):
    """Of a tape of more than 32 MiB, nearly nothing is allocated again."""
    steps, tasks = 80, 8
    case = Case(model=lambda: wide(96), tasks=tasks)
    fn = case.functionalized()
    torch.manual_seed(2)
    batches = torch.randn(tasks, steps, 5, 4).double(), torch.randint(3, (tasks, steps, 5))
    fast = fn.compile("inductor")

    def run() -> None:
        state = fast.init()
        state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
        last, _ = fast.unroll(state, batches, tasks=True)
        torch.autograd.grad(last.params["2.weight"].sum(), state.params["2.weight"])

    give_memory_back()
    for _ in range(3):
        run()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        run()
    assert runs["forward"] == runs["backward"] == 3
    matrices = tasks * 96 * 96 * 8  # bytes
    events = profile.events() or []
    sizes = [event.self_cpu_memory_usage for event in events if event.self_cpu_memory_usage >= matrices]
    assert events
    assert sum(sizes) < 20 * matrices  # results, their adjoints, copies for each task; the tape has one for each step
    give_memory_back()


def one_number(loss):
    """Returns the functions of a model with a single bias, and the same compiled."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    return fn, fn.compile("inductor")


def begun(fn):
    state = fn.init()
    state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    return state


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_that_are_negative_only_by_a_bit_of_the_tensor(steps, runs):
    """The gradient of an imaginary part behind a conjugate: the memory of such a tensor holds the other sign."""
    fn, fast = one_number(lambda model, batch: model(batch).square().mean())
    x = torch.randn(steps, 5, 4, dtype=torch.float64)

    def mirrored(value):
        return (torch.complex(torch.zeros_like(value), value).conj() * (2 + 3j)).real.sum()

    expected: Any = None
    for of in (lambda last, _: mirrored(last.params["bias"]), lambda _, losses: mirrored(losses)):
        for which in (fn, fast, fast, fast):
            state = begun(which)
            outcome = of(*which.unroll(state, x))
            found = torch.autograd.grad(outcome, list(state.params.values()))
            expected = found if which is fn else expected
            assert_agree(found, expected, 1e-12)
    assert runs["backward"]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_of_unsigned_types(dtype, runs):
    """Their sizes are not those of the types that torch began with."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1].long()))
    fast = fn.compile("inductor")
    batches = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(3, (3, 5)).to(dtype)
    expected: Any = None
    for which in (fn, fast, fast, fast):
        state = begun(which)
        last, losses = which.unroll(state, batches)
        values = [*last.params.values(), losses]
        values += torch.autograd.grad(losses.sum(), list(state.params.values()))
        expected = values if which is fn else expected
        assert_agree(values, expected, 1e-12)
    assert runs["backward"] == 2


def guess(model, optimizer, batch):
    optimizer.zero_grad()
    found = model(batch)
    found.square().mean().backward()
    optimizer.step()
    return found.detach()


@pytest.mark.parametrize("sizes", [(5, 5, 3), (3, 5, 5)])
def test_results_of_other_sizes_do_not_stack(sizes):
    """The driver would read what is behind the smaller ones, or leave out the end of the larger ones."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), train_step=guess)
    fast = fn.compile("inductor")
    batches = [torch.randn(size, 4, dtype=torch.float64) for size in sizes]
    for _ in range(4):
        with pytest.raises(RuntimeError, match="expects each tensor to be equal size"), torch.no_grad():
            fast.unroll(fast.init(), batches)
