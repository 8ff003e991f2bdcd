"""The update rule as formulas: the paper's closed forms, torch.optim's own numbers, and what is not element-wise."""

from typing import Any

import numpy as np
import pytest
import sympy
import torch
from matplotlib.mathtext import MathTextParser
from torch import nn, optim

import gimli_compile as gimli

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd with everything": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.03),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "maximize": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, maximize=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.02),
    "amsgrad": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.02, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.7, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.05),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "asgd": lambda p: optim.ASGD(p, lr=0.01),
}


class Pair(nn.Module):
    """Two float64 parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(3, dtype=torch.float64))


def train(model, optimizer, steps):
    """Takes steps along normal gradients and returns the last of them."""
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return {name: np.asarray(p.grad) for name, p in model.named_parameters()}


def evaluate(rule, values):
    """Returns the results of a rule for arrays by symbol name, with what was cut off computed first."""
    known = {rule.symbols[name]: value for name, value in values.items() if name in rule.symbols}
    for symbol, expr in rule.definitions.items():
        known[symbol] = compute(expr, known)
    return {name: compute(expr, known) for name, expr in rule.items()}


def compute(expr, known):
    return sympy.lambdify(list(known), expr, "numpy")(*known.values())


def named(values, parameter):
    """Returns values by the last part of their paths, those of another parameter left out."""
    return {
        path.rsplit(".", 1)[-1]: value.double().numpy()
        for path, value in values.items()
        if path.startswith(f"{parameter}.") or not path.startswith(("first.", "second."))
    }


def hyper_values(fn):
    """Returns hyperparameters as the rule names them."""
    group = {key: float(value) for key, value in fn.hyperparameters()[0].items() if isinstance(value, torch.Tensor)}
    for key, value in fn.hyperparameters()[0].items():
        if isinstance(value, tuple):
            group.update({f"{key[:-1]}_{i + 1}": float(item) for i, item in enumerate(value)})
    return group


@pytest.mark.parametrize("warm", [0, 3], ids=["first step", "later step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rule_reproduces_torch(name, warm):
    """Numbers put into the formulas give the optimizer's own step, state included."""
    model = Pair()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, warm)
    fn = gimli.functionalize(model, optimizer)
    state, hyper = fn.init(), hyper_values(fn)
    rule = fn.update_rule()
    assert rule.parameter == "first"
    grads = train(model, optimizer, 1)
    values = {"theta": state.params["first"].numpy(), "G": grads["first"]}
    after = fn.init()
    found = evaluate(
        rule if warm else fn.update_rule(variant=0), {**hyper, **named(state.opt_state, "first"), **values}
    )
    expected = {f"{key}'": value for key, value in named(after.opt_state, "first").items()}
    expected["theta'"] = after.params["first"].numpy()
    # Two of the optimizers keep float32 numbers beside float64 state, so that a product of them is rounded in eager.
    tolerance = 1e-6 if name in ("nadam", "asgd") else 1e-12
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(np.broadcast_to(found[key], value.shape), value, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- Appendix A


def linear_rule(make):
    model = nn.Linear(3, 2).double()
    return gimli.functionalize(model, make(model.parameters())).update_rule()


def test_sgd_derivatives_of_appendix_a():
    """SGD: the derivative of theta' in theta is 1 - alpha l'', in alpha -G, and the total one is the paper's sum."""
    rule = linear_rule(lambda p: optim.SGD(p, lr=0.1))
    theta, gradient, lr = (rule.symbols[name] for name in ("theta", "G", "lr"))
    loss, phi = sympy.Function("l"), sympy.Symbol("phi")
    inner = rule["theta'"].subs(gradient, loss(theta).diff(theta))
    assert sympy.simplify(inner.diff(theta) - (1 - lr * loss(theta).diff(theta, 2))) == 0
    assert rule["theta'"].diff(lr) == -gradient
    t, a, g = (sympy.Function(name)(phi) for name in ("t", "a", "g"))
    total = rule["theta'"].subs({theta: t, lr: a, gradient: g}).diff(phi)
    assert sympy.expand(total - (t.diff(phi) - g * a.diff(phi) - a * g.diff(phi))) == 0


def test_adagrad_derivative_of_appendix_a():
    """Adagrad: 1 - eta l''/sqrt(S) + eta G^2 l''/S^(3/2), S the new sum of squares, the past gradients held fixed."""
    rule = linear_rule(lambda p: optim.Adagrad(p, lr=0.1))
    theta, gradient, eta = (rule.symbols[name] for name in ("theta", "G", "lr"))
    loss, total = sympy.Function("l"), sympy.Symbol("S", positive=True)
    first, second = loss(theta).diff(theta), loss(theta).diff(theta, 2)
    ideal = rule["theta'"].subs({rule.symbols["eps"]: 0, rule.symbols["lr_decay"]: 0})
    derivative = ideal.subs(gradient, first).diff(theta).subs(rule.symbols["sum"], total - first**2)
    expected = 1 - eta * second / sympy.sqrt(total) + eta * first**2 * second / total ** sympy.Rational(3, 2)
    assert sympy.simplify(derivative - expected) == 0
    assert ideal.subs(rule.symbols["sum"], total - gradient**2) == theta - eta * gradient / sympy.sqrt(total)


def test_derivative_at_the_limit_of_eps():
    """With eps kept, the derivative has the paper's as its limit."""
    rule = linear_rule(lambda p: optim.Adagrad(p, lr=0.1))
    gradient, eta, eps = (rule.symbols[name] for name in ("G", "lr", "eps"))
    total = sympy.Symbol("S", positive=True)
    step = (
        rule["theta'"].subs(rule.symbols["lr_decay"], 0).diff(gradient).subs(rule.symbols["sum"], total - gradient**2)
    )
    limit = sympy.limit(step, eps, 0)
    expected = -eta / sympy.sqrt(total) + eta * gradient**2 / total ** sympy.Rational(3, 2)
    assert sympy.simplify(limit - expected) == 0


# ---------------------------------------------------------------------- text


def test_text_uses_the_new_state_and_the_mapping_the_inputs():
    """The text is the papers' algorithm, line by line; the expressions hold inputs only."""
    rule = linear_rule(lambda p: optim.Adam(p, lr=0.1))
    assert str(rule) == (
        "step' = step + 1\n"
        "exp_avg' = beta_1*exp_avg + G*(1 - beta_1)\n"
        "exp_avg_sq' = beta_2*exp_avg_sq + G**2*(1 - beta_2)\n"
        "theta' = theta - exp_avg'*lr/((1 - beta_1**step')*(eps + sqrt(exp_avg_sq')/sqrt(1 - beta_2**step')))"
    )
    assert list(rule) == ["theta'", "step'", "exp_avg'", "exp_avg_sq'"]
    assert set(rule.symbols) == {"theta", "G", "step", "exp_avg", "exp_avg_sq", "lr", "beta_1", "beta_2", "eps"}
    assert all(expr.free_symbols <= set(rule.symbols.values()) for expr in rule.values())
    assert not rule.definitions
    assert repr(rule) == "UpdateRule('weight': theta', step', exp_avg', exp_avg_sq')"


def test_first_step_is_a_variant():
    """Adam's first step from no state is a step along the sign, but for eps."""
    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, optim.Adam(model.parameters(), lr=0.1))
    rule = fn.update_rule(variant=0)
    theta, gradient, lr, eps = (rule.symbols[name] for name in ("theta", "G", "lr", "eps"))
    assert rule["theta'"] == theta - lr * gradient / (sympy.Abs(gradient) + eps)
    assert rule.conditions == fn.programs["update"].variants[0][1]
    with pytest.raises(gimli.InputError, match="variant=7 does not exist"):
        fn.update_rule(variant=7)


def test_guards_at_zero_are_not_shown():
    """The root that is guarded at zero reads as the root; its limit at a zero gradient is no step."""
    rule = linear_rule(lambda p: optim.RMSprop(p, lr=0.1))
    assert not rule["theta'"].has(sympy.Piecewise)
    zero = rule["theta'"].subs({rule.symbols["square_avg"]: 0, rule.symbols["G"]: 0})
    assert zero == rule.symbols["theta"]


def test_latex():
    """Jupyter gets aligned equations; each of them is valid TeX."""
    rule = linear_rule(lambda p: optim.AdamW(p, lr=0.1, amsgrad=True))
    text = rule._repr_latex_()
    assert text.startswith("$$\\begin{aligned}\n") and text.endswith("\n\\end{aligned}$$")
    lines = text.removeprefix("$$\\begin{aligned}\n").removesuffix("\n\\end{aligned}$$").split(" \\\\\n")
    assert lines[1] == "\\mathrm{exp\\_avg}' &= \\beta_{1}\\,\\mathrm{exp\\_avg} + G\\,\\left(1 - \\beta_{1}\\right)"
    assert lines[-1].startswith("\\theta' &= \\theta\\,\\left(")
    parser = MathTextParser("agg")
    for line in lines:
        parser.parse(f"${line.replace('&', '')}$")


def test_asgd_names_a_value_once():
    """A node that is two results is written out for the first."""
    rule = linear_rule(lambda p: optim.ASGD(p, lr=0.1))
    assert "ax' = theta'" in str(rule)
    assert rule["ax'"] == rule["theta'"]


# ---------------------------------------------------------------------- optimizers of one's own


class Own(optim.Optimizer):
    """Runs a function of parameter, gradient, state and group."""

    def __init__(self, params, rule, **defaults):
        super().__init__(params, {"lr": 0.1, **defaults})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.rule(p, p.grad, self.state[p], group))


def own_rule(function, **defaults):
    model = Pair()
    fn = gimli.functionalize(model, Own(model.parameters(), function, **defaults))
    return fn, fn.update_rule()


ELEMENTWISE = {
    "where": lambda p, g, s, h: torch.where(g > 0, p - h["lr"] * g, p + torch.exp(-g.abs())),
    "clamp": lambda p, g, s, h: (
        p - g.clamp(-0.5, 0.5) - g.clamp(min=0.1) - g.clamp_max(0.3) - torch.clamp(g, max=h["lr"])
    ),
    "extremes": lambda p, g, s, h: torch.maximum(p, g) - torch.minimum(p, 2 * g),
    "masked_fill": lambda p, g, s, h: p.masked_fill((g > 0) & (p < 0.3) | ~(g < 1), 0.25),
    "index_put": lambda p, g, s, h: p.index_put((g > 0,), torch.tensor(2.0, dtype=p.dtype)),
    "masks as numbers": lambda p, g, s, h: p - h["lr"] * (g * p > 0).to(g.dtype) * g - (p != g) * g,
    "rounding": lambda p, g, s, h: p + g.floor() + (3 * g).ceil() + (5 * g).trunc() + g.sign(),
    "casts": lambda p, g, s, h: p + (4 * g).to(torch.int64),
    "division": lambda p, g, s, h: torch.div(g, 0.3, rounding_mode="floor") + g.div(0.7, rounding_mode="trunc"),
    "whole division": lambda p, g, s, h: 4 // p,
    "remainder": lambda p, g, s, h: p + g.remainder(0.4),
    "functions": lambda p, g, s, h: g.tanh() + p.sin() * g.cos() + torch.sigmoid(g) + p.square().log1p() + g.expm1(),
    "logarithms": lambda p, g, s, h: (1 + p.abs()).log() + (1 + g.abs()).log2() + (2 + g.square()).log10(),
    "roots": lambda p, g, s, h: p.square().rsqrt() + (1 + g.square()).reciprocal() + g.abs() ** (1 / 3) + p.atan2(g),
    "combinations": lambda p, g, s, h: p.lerp(g, 0.3) + torch.addcdiv(p, g, 1 + p.square(), value=-0.5).addcmul(p, g),
    "scaled": lambda p, g, s, h: p.add(g, alpha=2).sub(g, alpha=h["lr"]) + torch.rsub(p, g, alpha=3),
    "made": lambda p, g, s, h: p - torch.full_like(g, 0.7) * g + torch.ones_like(p) - torch.zeros_like(p),
    "forms": lambda p, g, s, h: (
        p - g.clone().reshape(1, *g.shape).squeeze(0).unsqueeze(0).view(g.shape).expand(g.shape)
    ),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operators(name):
    """Each operator means to sympy what it means to torch."""
    fn, rule = own_rule(ELEMENTWISE[name])
    state = fn.init()
    grads = {key: torch.randn_like(value) for key, value in state.params.items()}
    params, _ = fn.update(state.params, grads, state.opt_state)
    values = {"theta": state.params["first"].numpy(), "G": grads["first"].numpy(), "lr": 0.1}
    found = evaluate(rule, values)["theta'"]
    np.testing.assert_allclose(found, params["first"].numpy(), rtol=1e-12, atol=1e-12)
    assert not rule["theta'"].atoms(sympy.core.function.AppliedUndef)


def test_reductions_are_functions_without_a_definition():
    """What is not element-wise gets a name, in which the options are, and the rest stays a formula."""
    _, rule = own_rule(lambda p, g, s, h: p - h["lr"] * g * p.norm() / (g - g.mean(-1, keepdim=True)).norm(1))
    text = str(rule["theta'"])
    assert "norm(theta)" in text and "norm[1](G - mean[-1, True](G))" in text
    assert rule["theta'"].diff(rule.symbols["lr"]).has(rule.symbols["G"])
    assert "\\operatorname{norm[1]}" in rule._repr_latex_()


def test_different_reductions_differ():
    """The same operator along another dimension is another function."""
    _, rule = own_rule(lambda p, g, s, h: p - g.sum(0, keepdim=True) + g.sum(-1, keepdim=True))
    assert len({applied.func for applied in rule["theta'"].atoms(sympy.core.function.AppliedUndef)}) == 2


def test_several_results_of_one_operator():
    """The parts of an operator with several results are functions of their own."""
    _, rule = own_rule(lambda p, g, s, h: p - g.max(-1, keepdim=True)[0] * torch.var_mean(g)[1])
    assert "max[-1, True][0](G)" in str(rule["theta'"])


def test_matrix_products_do_not_blow_up():
    """Newton-Schulz iterations use the last iterate many times over; the text stays readable."""

    def orthogonalize(p, g, s, h):
        x = g / g.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        return p - h["lr"] * x

    model = nn.Linear(3, 2, bias=False).double()
    rule = gimli.functionalize(model, Own(model.parameters(), orthogonalize)).update_rule()
    assert rule.definitions
    assert all(len(str(expr)) < 20_000 for expr in [*rule.values(), *rule.definitions.values()])
    earlier = set(rule.symbols.values())
    for symbol, expr in rule.definitions.items():
        assert expr.free_symbols <= earlier
        earlier.add(symbol)
    assert rule["theta'"].free_symbols <= earlier


def test_large_formulas_are_cut_and_still_right():
    """A formula that doubles twelve times is cut; computed in order, the parts give the step."""

    def doubling(p, g, s, h):
        x = p
        for _ in range(12):
            x = x + h["lr"] * torch.sin(x * g)
        return x

    fn, rule = own_rule(doubling)
    assert rule.definitions
    state = fn.init()
    grads = {key: torch.randn_like(value) for key, value in state.params.items()}
    params, _ = fn.update(state.params, grads, state.opt_state)
    values = {"theta": state.params["first"].numpy(), "G": grads["first"].numpy(), "lr": 0.1}
    np.testing.assert_allclose(evaluate(rule, values)["theta'"], params["first"].numpy(), rtol=1e-12)


def count_in_group(p, g, s, h):
    h["step"] = h.get("step", 0) + 1
    s["average"] = s.get("average", 0.0) + g
    return p - h["lr"] / h["step"] * s["average"]


def test_counters_are_whole_numbers():
    """Counters kept as ints are integers to sympy, so that their casts vanish."""
    model = nn.Linear(3, 2, bias=False).double()
    fn = gimli.functionalize(model, Own(model.parameters(), count_in_group, step=0))
    rule = fn.update_rule()
    assert rule.symbols["step"].is_integer
    assert rule["step'"] == rule.symbols["step"] + 1
    assert rule["average'"] == rule.symbols["average"] + rule.symbols["G"]


def test_names_of_other_parameters():
    """What belongs to another parameter carries its name."""

    class Coupled(optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None) -> Any:
            first, second = self.param_groups[0]["params"]
            for p in (first, second):
                self.state[p]["m"] = self.state[p].get("m", 0.0) + p.grad
            lr = self.param_groups[0]["lr"]
            first.sub_(lr * self.state[second]["m"].sum() * first.grad * second.grad)

    model = Pair()
    fn = gimli.functionalize(model, Coupled(model.parameters()))
    rule = fn.update_rule()
    assert rule.parameter == "first"
    assert set(rule.symbols) == {"theta", "G", "G[second]", "m", "m[second]", "lr"}
    with pytest.raises(gimli.InputError, match=r"does not change 'second'\nIt changes 'first'"):
        fn.update_rule(parameter="second")


def test_names_that_clash_are_whole():
    """A hyperparameter and state of one name are told apart."""

    def clash(p, g, s, h):
        s["lr"] = s.get("lr", 0.0) * 0.5 + g
        return p - h["lr"] * s["lr"]

    _, rule = own_rule(clash)
    assert {"state_first_lr", "hyper_groups_0_lr"} <= set(rule.symbols)


def test_parameter_can_be_chosen():
    """Another parameter's rule is the same formula."""
    model = Pair()
    fn = gimli.functionalize(model, optim.Adam(model.parameters()))
    first, second = fn.update_rule(), fn.update_rule(parameter="second")
    assert (first.parameter, second.parameter) == ("first", "second")
    assert second["exp_avg'"] == first["exp_avg'"]


def test_constants_are_numbers():
    """A number that the optimizer holds in a tensor of its own reads as the number."""
    factor = torch.tensor(0.375, dtype=torch.float64)
    _, rule = own_rule(lambda p, g, s, h: p - factor * g)
    assert rule["theta'"] == rule.symbols["theta"] - sympy.Rational(3, 8) * rule.symbols["G"]
