"""The paper's requirements on captured programs: verdicts, cuts, source lines."""

import inspect
from typing import Any

import lion_pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import gimli_compile as gimli


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def batch():
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def requirements(loss=mse, model=None, make=lambda p: optim.SGD(p, lr=0.1), **given):
    model = mlp() if model is None else model
    fn = gimli.functionalize(model, make(model.parameters()), loss)
    return fn.requirements(batch=batch(), **given)


def verdicts(found):
    return found.I.holds, found.II.holds, found.III_a.holds, found.III_b.holds


def line_of(function, code):
    """Returns `file:line` of a line of a function in this file."""
    lines, start = inspect.getsourcelines(function)
    return f"test_requirements.py:{start + next(i for i, line in enumerate(lines) if code in line)}"


# ---------------------------------------------------------------------- verdicts


def test_everything_holds_for_sgd_on_a_smooth_loss():
    found = requirements()
    assert verdicts(found) == (True, True, True, True)
    assert found.holds is True
    assert found.hyper["groups.0.lr"].flow.path == ("neg", "addcmul")
    assert found.III_b.reasons[0].startswith("initialization: differentiable: addmm, ")
    assert not (found.I.cuts or found.II.cuts or found.III_a.cuts or found.III_b.cuts)


def test_sign_cuts_the_gradient_but_not_the_learning_rate():
    """A step along the sign of a momentum is differentiable in its length and in the weight decay, in nothing else."""
    found = requirements(make=lambda p: lion_pytorch.Lion(p, lr=0.1, weight_decay=0.1))
    assert verdicts(found) == (True, False, True, True)
    assert found.holds is False
    (reason,) = found.II.reasons
    assert reason.startswith("grads[0.weight], grads[0.bias], grads[2.weight] and 5 more: to the new parameters only")
    assert "`sign` at lion_pytorch/lion_pytorch.py:" in reason and "sgn_() (node sign of update 1 of 2" in reason
    assert {cut.operator for cut in found.II.cuts} == {"sign"}
    holds = {path: reach.holds for path, reach in found.hyper.items()}
    assert holds == {
        "groups.0.lr": True,
        "groups.0.betas.0": False,
        "groups.0.betas.1": False,
        "groups.0.weight_decay": True,
    }
    for name in ("groups.0.betas.0", "groups.0.betas.1"):
        assert str(found.hyper[name]).startswith("only through a cut: `sign` at lion_pytorch/lion_pytorch.py:")


def test_state_carries_a_hyperparameter_to_a_later_step():
    """Rprop's learning rate is read once, into state, from which later steps move the parameters."""
    found = requirements(make=lambda p: optim.Rprop(p, lr=0.1))
    assert found.II.holds is False
    assert found.hyper["groups.0.lr"].holds
    assert found.hyper["groups.0.etas.1"].holds


@pytest.mark.parametrize(
    "make", [optim.Adam, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.NAdam], ids=lambda make: make.__name__
)
def test_smooth_optimizers_have_no_cuts(make):
    """Roots that are guarded at zero, bias corrections and counters are not taken for cuts."""
    found = requirements(make=make)
    assert verdicts(found) == (True, True, True, True)
    assert found.II.reasons == ()


def constant_gradient(model, batch):
    return (model(batch[0]) * batch[1]).sum()


def absolute(model, batch):
    return F.l1_loss(model(batch[0]), batch[1])


def hinge(model, batch):
    return F.relu(1 - model(batch[0]) * batch[1]).mean()


def likelihood(model, batch):
    return F.nll_loss(model(batch[0]), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("loss", "cut"),
    [(constant_gradient, None), (absolute, "sign"), (hinge, "threshold_backward"), (likelihood, "nll_loss_backward")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_piecewise_linear_losses_of_a_linear_model(loss, cut):
    """MAML needs a second derivative, and these have none; the learning rate can be learned all the same."""
    found = requirements(loss, nn.Linear(4, 1).double())
    assert verdicts(found) == (True, True, True, False)
    assert found.holds is True
    text = found.III_b.reasons[0]
    if cut is None:
        assert "no path: the gradient does not depend on the parameters" in text
    else:
        assert f"only through a cut: `{cut}` at " in text and "the loss is piecewise linear" in text
        assert line_of(loss, "return") in text
    assert requirements(loss).III_b.holds is True


def stopped(model, batch):
    hidden = model[1](model[0](batch[0]))
    target = model[2](hidden).detach()
    return ((model[2](hidden) - 2 * target) ** 2).mean()


def severed(model, batch):
    hidden = model[1](model[0](batch[0]))
    return (model[2](hidden.detach()) ** 2).mean()


def without_gradient(model, batch):
    with torch.no_grad():
        hidden = torch.tanh(batch[0] @ model[0].weight.mT + model[0].bias)
    return (model[2](hidden) ** 2).mean()


def test_detach_in_the_loss_is_named():
    """A stop on one of several paths is mentioned, with the line; the requirement holds."""
    found = requirements(stopped)
    assert verdicts(found) == (True, True, True, True)
    (reason,) = found.I.reasons
    assert reason.startswith("along some of the paths there is no gradient: `detach` at ")
    assert line_of(stopped, ".detach()") in reason
    assert "target = model[2](hidden).detach()" in reason


@pytest.mark.parametrize(("loss", "code"), [(severed, ".detach()"), (without_gradient, "torch.tanh")])
def test_detach_of_all_paths_is_named(loss, code):
    """Parameters that the loss reaches through a stop only: L_val is constant in them."""
    found = requirements(loss)
    assert found.I.holds is False
    (reason,) = found.I.reasons
    assert reason.startswith("params[0.weight], params[0.bias]: to the loss only through a cut: `detach` at ")
    assert line_of(loss, code) in reason


def test_unused_parameters_are_mentioned():
    model = mlp()
    found = requirements(lambda model, batch: model[0](batch[0]).square().mean(), model)
    assert found.I.holds is True
    assert found.I.reasons == ("params[2.weight], params[2.bias]: not used by the loss",)


# ---------------------------------------------------------------------- meta-parameters of the loss


def weighted(model, batch, meta):
    rounded = torch.round(meta["rounded"])
    chosen = (model(batch[0]) > meta["threshold"]).double()
    errors = (model(batch[0]) - batch[1]) ** 2
    return (errors * meta["weight"]).mean() + rounded * errors.sum() + (chosen * errors).mean() + meta["added"]


def metas(*names):
    every = {"weight": torch.ones(6, 1), "rounded": torch.tensor(1.0), "threshold": torch.tensor(0.0)}
    every["added"] = torch.tensor(0.0)
    return {key: every[key].double() for key in names}


def test_meta_parameters_of_the_loss():
    names = ("weight", "rounded", "threshold", "added")
    found = requirements(weighted, meta=metas(*names))
    assert found.III_b.holds is False
    assert {name: reach.holds for name, reach in found.meta.items()} == dict.fromkeys(names, False) | {"weight": True}
    assert "differentiable: " in str(found.meta["weight"])
    assert str(found.meta["rounded"]).startswith("only through a cut: `round` at ")
    assert line_of(weighted, "torch.round") in str(found.meta["rounded"])
    assert line_of(weighted, "threshold") in str(found.meta["threshold"])
    assert str(found.meta["added"]) == "no path"
    assert found.initialization is not None and found.initialization.holds
    assert [reason.split(":")[0] for reason in found.III_b.reasons] == [
        "meta[rounded]",
        "meta[threshold]",
        "meta[added]",
    ]


def test_meta_parameters_that_all_reach_the_gradient():
    def loss(model, batch, meta):
        return (mse(model, batch) * torch.exp(meta)).mean()

    found = requirements(loss, meta=torch.zeros((), dtype=torch.float64))
    assert found.III_b.holds is True
    assert list(found.meta) == ["meta"]
    lines = str(found).splitlines()
    assert lines[lines.index("Meta-parameters of the loss, to the gradient:") + 1].startswith(
        "  meta  differentiable: "
    )
    assert lines[-1].startswith("  theta_0  differentiable: ")


def test_meta_parameters_behind_a_stop_on_one_path():
    def loss(model, batch, meta):
        return (model(batch[0]).square() * (meta + meta.detach())).mean()

    found = requirements(loss, meta=torch.ones((), dtype=torch.float64))
    assert found.III_b.holds is True
    assert line_of(loss, "detach") in found.III_b.reasons[0]


def test_without_a_batch_the_loss_is_unknown_until_a_step():
    model = mlp()
    fn = gimli.functionalize(model, optim.SGD(model.parameters(), lr=0.1), mse)
    found = fn.requirements()
    assert verdicts(found) == (None, True, True, None)
    assert found.holds is None
    assert "call `fn.step` on a batch first" in found.I.reasons[0]
    assert "III(b)  undecided" in str(found)
    fn.step(fn.init(), batch())
    assert verdicts(fn.requirements()) == (True, True, True, True)


# ---------------------------------------------------------------------- hyperparameters


def test_hyperparameters_without_a_path_say_why():
    found = requirements(make=lambda p: optim.SGD(p, lr=0.1, momentum=0.0, weight_decay=0.0))
    text = "no path: at 0 the step leaves it out; pass `hyper` with this entry requiring a gradient to keep it in"
    assert str(found.hyper["groups.0.weight_decay"]) == text
    assert str(found.hyper["groups.0.dampening"]) == "no path: baked: the program is that of 0"
    assert found.III_a.reasons == ("differentiable in groups.0.lr",)


def test_hyperparameters_to_learn_are_those_that_require_a_gradient():
    """A weight decay of zero that is to be learned is in the program, and III(a) is about it alone."""
    model = mlp()
    fn = gimli.functionalize(model, optim.SGD(model.parameters(), lr=0.1), mse)
    hyper = fn.hyperparameters()
    hyper[0]["weight_decay"].requires_grad_()
    found = fn.requirements(hyper=hyper, batch=batch())
    assert found.hyper["groups.0.weight_decay"].holds
    assert found.III_a.holds is True
    assert found.III_a.reasons == ()


def test_a_hyperparameter_to_learn_that_is_cut():
    model = mlp()
    fn = gimli.functionalize(model, lion_pytorch.Lion(model.parameters(), lr=0.1), mse)
    hyper = fn.hyperparameters()
    beta, _ = hyper[0]["betas"]
    beta.requires_grad_()
    found = fn.requirements(hyper=hyper)
    assert found.III_a.holds is False
    assert found.III_a.reasons[0].startswith("hyper[groups.0.betas.0]: only through a cut: `sign` at lion_pytorch/")


class Stepwise(optim.Optimizer):
    """Steps along a rounded gradient; has numbers that decide a branch, count a loop, and are not used."""

    def __init__(self, params, lr=0.1, patience=3.5, repeats=2, unused=2.0):
        super().__init__(params, {"lr": lr, "patience": patience, "repeats": repeats, "unused": unused})

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            scale = 2.0 if group["patience"] > 3 else 1.0
            for p in [p for p in group["params"] for _ in range(group["repeats"])]:
                p.sub_(group["lr"] * scale * torch.floor(p.grad))


def test_branches_and_unused_numbers():
    found = requirements(make=Stepwise)
    assert verdicts(found) == (True, False, True, True)
    assert str(found.hyper["groups.0.patience"]) == "no path: it only decides a branch: hyper_groups_0_patience > 3"
    assert str(found.hyper["groups.0.repeats"]) == "no path: it only decides a branch: hyper_groups_0_repeats == 2"
    assert str(found.hyper["groups.0.unused"]) == "no path: unused"
    assert "`floor` at " in found.II.reasons[0]
    assert line_of(Stepwise.step, "torch.floor") in found.II.reasons[0]


class Hidden(optim.Optimizer):
    """Turns a number into text and back, which no capture follows; has no other number."""

    def __init__(self, params):
        super().__init__(params, {"rate": 0.1})

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(float(f"{group['rate']:.3f}") * p.grad)


def test_baked_numbers_are_named():
    with pytest.warns(gimli.BakedValueWarning):
        found = requirements(make=Hidden)
    assert str(found.hyper["groups.0.rate"]).startswith("no path: baked: ")
    assert found.III_a.holds is False
    assert found.III_a.reasons == ("differentiable in no hyperparameter",)
    assert found.holds is True


class Noisy(optim.Optimizer):
    """Adds noise to its step."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "sigma": 0.01})

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad + group["sigma"] * torch.randn_like(p)))


def test_stochastic_optimizers_are_reparameterized():
    """Footnote 3: draws are inputs, and the step is differentiable."""
    found = requirements(make=Noisy)
    assert found.II.holds is True
    assert "reparameterization" in found.II.reasons[0]
    assert found.hyper["groups.0.sigma"].holds


def test_state_after_steps_decides_the_variants():
    """From a later state, RAdam's rectified step is the one looked at, which depends on the second beta."""
    model = mlp()
    fn = gimli.functionalize(model, optim.RAdam(model.parameters(), lr=0.1), mse)
    assert not fn.requirements(batch=batch()).hyper["groups.0.betas.1"].holds
    state = fn.init()
    for _ in range(8):
        state, _ = fn.step(state, batch())
    assert fn.requirements(batch=batch(), state=state).hyper["groups.0.betas.1"].holds


# ---------------------------------------------------------------------- report


def test_report():
    text = str(requirements(make=lambda p: lion_pytorch.Lion(p, lr=0.1)))
    lines = text.splitlines()
    assert lines[0] == "Requirements for meta-learning: lion_pytorch.lion_pytorch.Lion over Sequential"
    assert lines[1] == "I       holds           L_val is differentiable in theta"
    assert lines[2].startswith("II      does not hold   opt is differentiable in theta, G and the state")
    assert lines[3].startswith("        - grads[0.weight], grads[0.bias], grads[2.weight] and 5 more: to the new")
    assert "all     does not hold   I, II, and III(a) or III(b)" in lines
    assert "  groups.0.lr            differentiable: neg, addcmul" in lines


def test_requirements_change_nothing():
    """The analysis is read-only: parameters, state, random numbers and the live objects stay as they are."""
    model = mlp()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer, mse)
    data = batch()
    before = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    fn.requirements(batch=data)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
