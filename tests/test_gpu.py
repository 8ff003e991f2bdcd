"""The same programs on an accelerator: values and meta-gradients equal those of the CPU."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gimli_compile as gimli
from gimli_compile.compiled.backends import compile_with_inductor
from gimli_compile.compiled.halves import trace

pytestmark = pytest.mark.gpu


def meta_gradient(device, make):
    """Returns the losses, the last parameters and the hypergradients of three steps in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3)).double().to(device)
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(3, (3, 6))
    fn = gimli.functionalize(model, make(model.parameters()), lambda m, batch: cross_entropy(m(batch[0]), batch[1]))
    hyper = fn.hyperparameters()
    leaves = [value.requires_grad_() for value in hyper[0].values() if isinstance(value, torch.Tensor)]
    state, losses = fn.unroll(fn.init(), (x.to(device), y.to(device)), hyper)
    grads = torch.autograd.grad(losses[-1], leaves, allow_unused=True, materialize_grads=True)
    return [losses.detach().cpu(), *(p.detach().cpu() for p in state.params.values()), *(g.cpu() for g in grads)]


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
        lambda params: torch.optim.AdamW(params, lr=0.1, capturable=True),
        lambda params: torch.optim.RMSprop(params, lr=0.1, centered=True),
    ],
    ids=["sgd", "adam", "adamw-capturable", "rmsprop"],
)
def test_an_accelerator_gives_what_the_cpu_gives(make):
    there = meta_gradient("cuda", make)
    here = meta_gradient("cpu", lambda params: _on_cpu(make(params)))
    for value, expected in zip(there, here, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def _on_cpu(optimizer):
    for group in optimizer.param_groups:
        group["capturable"] = False
    return optimizer


@pytest.mark.parametrize("backend", ["eager", "torchscript", "inductor"])
def test_compiled_loops_equal_uncompiled_ones(backend):
    device = torch.accelerator.current_accelerator()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double().to(device)
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(3, (3, 6))
    fn = gimli.functionalize(
        model, torch.optim.Adam(model.parameters(), lr=0.1), lambda m, b: cross_entropy(m(b[0]), b[1])
    )

    def run(one):
        hyper = fn.hyperparameters()
        rate = hyper[0]["lr"].requires_grad_()
        state, losses = one.unroll(fn.init(), (x.to(device), y.to(device)), hyper)
        return [*state.params.values(), losses, torch.autograd.grad(losses[-1], rate)[0]]

    for found, expected in zip(run(fn.compile(backend)), run(fn), strict=True):
        assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


@pytest.mark.parametrize("options", [{}, {"backward": "mixed"}, {"checkpoint": "sqrt"}])
@pytest.mark.parametrize("make", [torch.optim.SGD, lambda params, lr: torch.optim.AdamW(params, lr, capturable=True)])
def test_loops_recorded_as_cuda_graphs_equal_others(make, options, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double().to("cuda")
    x, y = torch.randn(4, 6, 4, dtype=torch.float64, device="cuda"), torch.randint(3, (4, 6), device="cuda")
    optimizer = make(model.parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer, lambda m, b: cross_entropy(m(b[0]), b[1]))
    fast = fn.compile("inductor", mode="reduce-overhead")

    def run(one, rate, scale):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        state, losses = one.unroll(fn.init(), (scale * x, y), hyper, **options)
        return [*state.params.values(), losses, torch.autograd.grad(losses[-1], hyper[0]["lr"])[0]]

    for rate, scale in ((0.1, 1), (0.1, 1), (0.1, 1), (0.05, 2), (0.2, 0.5)):
        for found, expected in zip(run(fast, rate, scale), run(fn, rate, scale), strict=True):
            assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    assert not caplog.records  # nothing ran without a graph


def test_the_updates_of_all_parameters_share_kernels():
    """Adam over twelve parameters of four shapes: a kernel for each of eight, not for each."""
    torch.manual_seed(0)
    shapes = 3 * ((64, 32), (64,), (5, 64), (5,))
    start = [torch.randn(shape, device="cuda") for shape in shapes]
    examples = [torch.tensor(0.1, device="cuda"), *start, *start, *(p.abs() for p in start), *start]

    def adam(rate, *values):
        count, found = len(shapes), []
        for p, m, v, g in zip(*(values[k * count : (k + 1) * count] for k in range(4)), strict=True):
            first, second = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            found += [p - rate * first / (second.sqrt() + 1e-8), first, second]
        return found

    program = compile_with_inductor(trace(adam, examples))
    found = program([value.clone() for value in examples])  # also tries kernels of several sizes
    for value, expected in zip(found, adam(*examples), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    given = [value.clone() for value in examples]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        program(given)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() or [] if event.name.startswith("triton_")]
    assert 1 <= len(kernels) <= 3


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_loops_do_not_wait_for_the_device(mode):
    """Neither there nor back: what an optimizer counts lies on the CPU, or on the device with `capturable`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to("cuda")
    x, y = torch.randn(4, 6, 4, device="cuda"), torch.randint(3, (4, 6), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, capturable=mode == "reduce-overhead")
    fn = gimli.functionalize(model, optimizer, lambda m, b: cross_entropy(m(b[0]), b[1]))
    fast = fn.compile("inductor", mode=mode)
    start, hyper = fn.init(), fn.hyperparameters()
    hyper[0]["lr"] = torch.tensor(0.1, device="cuda", requires_grad=True)

    def run():
        state, losses = fast.unroll(start, (x, y), hyper)
        return torch.autograd.grad(losses[-1] + sum(p.sum() for p in state.params.values()), hyper[0]["lr"])[0]

    expected = [run() for _ in range(4)][-1]  # compiled, compared and recorded
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.testing.assert_close(found, expected)
