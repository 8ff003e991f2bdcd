"""Complex parameters: optimizers step on their real and imaginary parts, through views."""

from typing import Any

import pytest
import torch
from torch import nn

import gimli_compile as gimli
from gimli_compile.compiled.backends import has_compiler

MAKERS = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "Adam with amsgrad": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.7),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


def weight(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.complex(*torch.randn(2, 3, 2, generator=generator, dtype=torch.float64))


def live(make, lr, steps):
    param = nn.Parameter(weight())
    optimizer = make([param])
    optimizer.param_groups[0]["lr"] = lr
    for step in range(steps):
        param.grad = weight(step + 1)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("name", MAKERS)
def test_values_and_the_derivative_in_the_learning_rate(name):
    make = MAKERS[name]
    param = nn.Parameter(weight())
    fn = gimli.functionalize([param], make([param]))
    state, hyper = fn.init(), fn.hyperparameters()
    lr = hyper[0]["lr"].item()
    hyper[0]["lr"].requires_grad_()
    params, opt_state = state.params, state.opt_state
    for step in range(4):
        params, opt_state = fn.update(params, {"0": weight(step + 1)}, opt_state, hyper)
    torch.testing.assert_close(params["0"].detach(), live(make, lr, 4), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(params["0"].abs().square().sum(), hyper[0]["lr"])

    def objective(rate):
        return float(live(make, rate, 4).abs().square().sum())

    expected = (objective(lr + 1e-5) - objective(lr - 1e-5)) / 2e-5
    assert float(slope) == pytest.approx(expected, rel=1e-6)


class Spectrum(nn.Module):
    """Complex and real parameters."""

    def __init__(self):
        super().__init__()
        self.z, self.real = nn.Parameter(weight()[0]), nn.Linear(2, 1).double()

    def forward(self, x):
        return self.real(x) + torch.view_as_real(self.z * self.z).sum(-1)


def fit(model, optimizer, batch):
    optimizer.zero_grad()
    found = model(batch)
    loss = found.square().mean()
    loss.backward()
    optimizer.step()
    return {"loss": loss, "spectrum": torch.fft.fft(found.double().sum(0))}


OUTCOMES = {
    "parameters": lambda last, _: last.params["z"].abs().sum(),
    "a conjugate": lambda last, _: (last.params["z"].conj() * (2 + 3j)).real.sum(),
    "results": lambda _, found: (found["spectrum"].conj() * (2 + 3j)).real.sum(),
}


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", OUTCOMES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
def test_compiled_loops_differentiate_complex_parameters_and_results(name, backend, steps):
    torch.manual_seed(0)
    model = Spectrum()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), train_step=fit)
    fast, batches = fn.compile(backend), torch.randn(steps, 5, 2, dtype=torch.float64)
    expected = []
    for which in (fn, fast, fast, fast):
        state = which.init()
        state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
        outcome = OUTCOMES[name](*which.unroll(state, batches))
        found = torch.autograd.grad(outcome, list(state.params.values()))
        expected = expected or found
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OUTCOMES)
def test_recomputed_loops_differentiate_complex_parameters_and_results(name):
    """In segments, which are one node of the autograd graph each; for many tasks as well."""
    torch.manual_seed(0)
    model = Spectrum()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), train_step=fit)
    batches = torch.randn(3, 5, 2, dtype=torch.float64)

    def slopes(of_tasks=None, **options: Any):
        state = fn.init()
        state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
        given = batches if of_tasks is None else batches.expand(of_tasks, *batches.shape)
        outcome = OUTCOMES[name](*fn.unroll(state, given, tasks=of_tasks is not None, **options))
        return torch.autograd.grad(outcome / (of_tasks or 1), list(state.params.values()))

    expected = slopes()
    for checkpoint in ("step", 2):
        torch.testing.assert_close(slopes(checkpoint=checkpoint), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(slopes(2, checkpoint=checkpoint), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backward", ["forward", "implicit"])
def test_modes_without_complex_derivatives_say_so(backward):
    """They left such results out, as if nothing depended on them."""
    model = Spectrum()

    def loss(model, batch, meta):
        return (model(batch) * meta).square().mean()

    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    meta, batches = torch.ones((), dtype=torch.float64, requires_grad=True), torch.ones(3, 5, 2, dtype=torch.float64)
    options: Any = {"implicit": gimli.Implicit(residual=10.0)} if backward == "implicit" else {}
    with pytest.raises(gimli.CaptureError, match="cannot differentiate in complex numbers"):
        fn.unroll(fn.init(), batches, meta=meta, backward=backward, **options)
    with torch.no_grad():
        fn.unroll(fn.init(), batches, meta=meta, backward=backward, **options)
