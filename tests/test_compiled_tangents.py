"""Forward and implicit mode in compiled loops: the gradients of the uncompiled ones, and of the live loop."""

from __future__ import annotations

import pytest
import torch
from live_training import normal, relative_error, with_optimizer
from mode_cases import CASES, OPTIMIZERS
from torch.utils import _pytree as pytree

import gimli_compile as gimli
from gimli_compile.compiled.backends import has_compiler
from gimli_compile.compiled.tangent_steps import TangentSteps
from tests import test_implicit_mode as implicit_mode
from tests.test_compiled_loops import Case, adamw, assert_agree, normalized
from tests.test_forward_mode import gradients
from tests.test_run_refusals import TRAININGS

META = implicit_mode.META


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
def test_inductor_is_equal():
    training = with_optimizer(CASES["weighted"], OPTIMIZERS["adamw"])
    _, _, fn = training.functionalized()
    fast = fn.compile("inductor")
    expected = gradients(training, fn)
    for _ in range(2):
        for own, wanted in zip(gradients(training, fast, backward="forward"), expected, strict=True):
            assert relative_error(own, wanted) <= 1e-9


@pytest.mark.parametrize("dims", [True, (0, 0, None, None), (None, 0, 0, None)], ids=str)
def test_many_tasks_with_noise(dims):
    case = Case(model=normalized, tasks=3)
    fn = case.functionalized()

    def run(one, **options):
        state, hyper = fn.init(), fn.hyperparameters()
        rate = hyper[0]["lr"]
        if dims is not True and dims[2] == 0:
            hyper = pytree.tree_map_only(torch.Tensor, lambda value: torch.stack([value] * 3), hyper)
            rate = hyper[0]["lr"]
        if dims is not True and dims[0] == 0:
            state = pytree.tree_map_only(torch.Tensor, lambda value: torch.stack([value, value + 1e-3, value]), state)
        bias = list(state.params.values())[-1]
        leaves = [rate.requires_grad_(), bias.requires_grad_()]
        torch.manual_seed(5)
        after, losses = one.unroll(state, case.batches(), hyper, tasks=dims, **options)
        total = (normal(*losses.shape) * losses).sum() + sum(
            (normal(*p.shape) * p).sum() for p in after.params.values()
        )
        total = total + sum(value.sum() for value in after.buffers.values() if value.is_floating_point())
        return [losses, *after.params.values()], torch.autograd.grad(total, leaves)

    expected = run(fn)
    for found, wanted in zip(run(fn.compile("eager"), backward="forward"), expected, strict=True):
        assert_agree(found, wanted, 1e-10)


def test_one_program_for_all_steps_and_all_numbers(monkeypatch):
    """Adam's first step, which makes the state, takes one of its own."""
    built = []
    compile_step = TangentSteps._compile

    def counted(self, *args):
        built.append(args)
        return compile_step(self, *args)

    monkeypatch.setattr(TangentSteps, "_compile", counted)
    case = Case(optimizer=adamw)
    fn = case.functionalized()
    fast, (x, y) = fn.compile("eager"), case.batches()
    for rate, steps in ((0.1, 3), (0.05, 3), (0.2, 12)):
        order = torch.arange(steps) % 5
        found = []
        for one, mode in ((fn, "reverse"), (fast, "forward")):
            hyper = fn.hyperparameters()
            hyper[0]["lr"] = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
            _, losses = one.unroll(fn.init(), (x[order], y[order]), hyper, backward=mode)
            found.append(torch.autograd.grad(losses[-1], hyper[0]["lr"])[0])
        assert_agree(found[1:], found[:1], 1e-11)
    assert len(built) == 2


def test_the_gradient_cannot_be_differentiated():
    fn = Case().functionalized()
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    _, losses = fn.compile("eager").unroll(fn.init(), Case().batches(), hyper, backward="forward")
    (found,) = torch.autograd.grad(losses[-1], rate, create_graph=True)
    with pytest.raises(gimli.InputError, match="is differentiated"):
        found.backward()


LINES = {
    "operator": r"conv_tbc\S* has no forward-mode[\s\S]*# the convolution",
    "custom function": r"Squaring` cannot be mapped[\s\S]*# the custom function[\s\S]*generate_vmap_rule",
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_what_has_no_forward_derivative_is_named_with_its_line(name, backend):
    training = TRAININGS[name]
    _, _, fn = training.functionalized()
    one, hyper = fn if backend is None else fn.compile(backend), fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    with pytest.raises(gimli.CaptureError, match=LINES[name]) as caught:
        one.unroll(fn.init(), training.batches, hyper, backward="forward")
    assert "test_run_refusals.py:" in str(caught.value)


def test_tasks_over_a_custom_function_without_a_rule_are_refused_with_its_line():
    training = TRAININGS["custom function"]
    _, _, fn = training.functionalized()
    batches = pytree.tree_map(lambda *parts: torch.stack([torch.stack(parts)] * 2), *training.batches)
    with pytest.raises(gimli.CaptureError, match=LINES["custom function"]):
        fn.unroll(fn.init(), batches, tasks=True)


# ---------------------------------------------------------------------- implicit


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler"))],
)
def test_implicit_gradients_are_those_of_the_uncompiled_loop(backend):
    fn = implicit_mode.start(weight_decay=0.1, momentum=0.5)
    expected = implicit_mode.gradients(fn, 200, META, backward="implicit")
    fast = fn.compile(backend)
    for _ in range(2):
        got = implicit_mode.gradients(fast, 200, META, backward="implicit")
        for own, wanted in zip(got, expected, strict=True):
            assert float((own - wanted).abs().max()) <= 1e-9 * (1 + float(wanted.abs().max()))


def test_an_implicit_gradient_equals_the_closed_form():
    fn = implicit_mode.start(weight_decay=0.1).compile("eager")
    got = implicit_mode.gradients(fn, 300, META, backward="implicit", implicit=gimli.Implicit("cg", 20, 1e-12))
    leaves = [META.clone(), implicit_mode.X.clone(), implicit_mode.Y.clone(), torch.tensor(0.1, dtype=torch.float64)]
    meta, x, y, decay = (leaf.requires_grad_() for leaf in leaves)
    expected = torch.autograd.grad(implicit_mode.closed_form(meta, x, y, decay), (meta, x, y, decay))
    for own, wanted in zip((*got[:3], got[4]), expected, strict=True):
        assert relative_error(own, wanted) <= 1e-6


def test_a_compiled_loop_that_has_not_converged_is_refused():
    fn = implicit_mode.start().compile("eager")
    with pytest.raises(gimli.InputError, match="has not converged"):
        implicit_mode.gradients(fn, 2, META, backward="implicit")
