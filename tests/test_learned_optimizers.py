"""Optimizers that own modules: their parameters are hyperparameters, found without being declared."""

import re

import pytest
import torch
from learned_optimizers import (
    OPTIMIZERS,
    Adapting,
    Cells,
    Custom,
    InGroups,
    Learned,
    Noisy,
    Perceptron,
    Stacked,
    held_tensors,
    network,
)
from live_training import (
    GRADIENTS,
    Training,
    assert_equal_tensors,
    check_values,
    continue_live,
    live_objective,
    normal,
    objective,
    params_error,
    random_like,
    regression,
    run_live,
    slope_error,
    squared_error,
)
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

STEPS = 8


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def training_of(name, steps=STEPS):
    return Training(mlp, OPTIMIZERS[name], squared_error, regression(steps))


def tensors_of(hyper):
    """Returns the learned tensors among the hyperparameters, made to require a gradient."""
    return {path: t.requires_grad_() for path, t in {**hyper.modules, **hyper.attributes}.items()}


def learned_slopes(training, fn, **options):
    """Returns the gradient of the objective of an unroll in every learned tensor and in the initial parameters."""
    state, hyper = fn.init(), fn.hyperparameters()
    leaves = {f"hyper.{path}": t for path, t in tensors_of(hyper).items()}
    leaves["hyper.groups.0.lr"] = hyper[0]["lr"].requires_grad_()
    leaves.update({f"params.{name}": p.requires_grad_() for name, p in state.params.items()})
    torch.manual_seed(training.seed)
    state, losses = fn.unroll(state, training.batches, hyper, **options)
    grads = torch.autograd.grad(
        objective(state.params, losses), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


def live_difference(training, along):
    """Returns the objective of the live loop as a function of how far its own tensors are moved."""

    def function(offset):
        def change(_, optimizer):
            held = held_tensors(optimizer)
            for path, way in along.items():
                held[path].add_(offset * way)

        return live_objective(training, change=change)

    return function


def learned_errors(training, grads):
    """Returns the errors along random directions: of each tensor, and of all together."""
    held = held_tensors(training.start()[1])
    paths = [path for path in held if f"hyper.{path}" in grads]
    ways = {path: random_like(held[path], 400 + i) for i, path in enumerate(paths)}
    slopes = {path: float((grads[f"hyper.{path}"] * way).sum()) for path, way in ways.items()}
    errors = {path: slope_error(slopes[path], live_difference(training, {path: ways[path]})) for path in paths[:2]}
    errors["all"] = slope_error(sum(slopes.values()), live_difference(training, ways))
    return errors


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_equal_eager(name):
    check_values(training_of(name))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_modules_are_left_alone(name):
    training = training_of(name, steps=2)
    _, optimizer, fn = training.functionalized()
    before = {path: (id(t), t.detach().clone()) for path, t in held_tensors(optimizer).items()}
    learned_slopes(training, fn)
    for path, tensor in held_tensors(optimizer).items():
        assert id(tensor) == before[path][0]
        assert tensor.requires_grad and tensor.grad is None
        assert torch.equal(tensor, before[path][1])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_equal_eager_from_the_middle_of_training(name):
    training = training_of(name)
    model, optimizer = training.start()
    continue_live(training, model, optimizer)
    fn = gimli.functionalize(model, optimizer, training.loss)
    torch.manual_seed(training.seed)
    state, losses = fn.unroll(fn.init(), training.batches)
    live = continue_live(training, model, optimizer)
    assert_equal_tensors(state.params, live.params[-1])
    assert_equal_tensors(dict(enumerate(losses)), dict(enumerate(live.losses)))


# ---------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_equal_differences_of_eager(name, checkpoint):
    training = training_of(name, steps=5)
    _, _, fn = training.functionalized()
    grads = learned_slopes(training, fn, checkpoint=checkpoint)
    errors = learned_errors(training, grads)
    if checkpoint is None:
        inputs = type("Inputs", (), {"state": fn.init()})
        errors["params"] = params_error(training, inputs, grads)
    assert {path: error for path, error in errors.items() if not error <= GRADIENTS} == {}


RECURRENT = ("cells", "lstm", "gru", "rnn", "stacked", "attending")


def of_weights(training, fn):
    """Returns the objective as a function of all learned tensors, those tensors, and a direction."""
    hyper = fn.hyperparameters()
    trained = held_tensors(fn.optimizer)
    weights = {path: v for path, v in {**hyper.modules, **hyper.attributes}.items() if path in trained}

    def function(values):
        given = gimli.Hyperparameters(
            hyper.groups,
            {**hyper.attributes, **{path: values[path] for path in hyper.attributes if path in trained}},
            {path: values[path] for path in hyper.modules},
        )
        torch.manual_seed(training.seed)
        state, losses = fn.unroll(fn.init(), training.batches, given)
        return objective(state.params, losses)

    return function, weights, {path: random_like(value, 500 + i) for i, (path, value) in enumerate(weights.items())}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's, of itself
@pytest.mark.parametrize("name", RECURRENT)
def test_forward_mode_equals_reverse_mode(name):
    training = training_of(name, steps=3)
    _, _, fn = training.functionalized()
    function, weights, along = of_weights(training, fn)
    tangent = torch.func.jvp(function, (weights,), (along,))[1]
    grads = torch.func.grad(function)(weights)
    slope = sum((grads[path] * way).sum() for path, way in along.items())
    assert float(tangent) == pytest.approx(float(slope), rel=1e-9)


@pytest.mark.parametrize("name", RECURRENT)
def test_second_derivatives_equal_differences_of_first_ones(name):
    training = training_of(name, steps=3)
    _, _, fn = training.functionalized()
    function, weights, along = of_weights(training, fn)

    def slope(offset):
        grads = torch.func.grad(function)({path: w + offset * along[path] for path, w in weights.items()})
        return float(sum((grads[path] * random_like(way, 9)).sum() for path, way in along.items()))

    leaves = {path: w.clone().requires_grad_() for path, w in weights.items()}
    first = torch.autograd.grad(
        function(leaves), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = torch.stack([(g * random_like(g, 9)).sum() for g in first]).sum()
    second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    curvature = sum(float((s * along[path]).sum()) for path, s in zip(leaves, second, strict=True))
    assert slope_error(curvature, slope) <= GRADIENTS


@pytest.mark.parametrize("name", ["lstm", "gru", "cells", "attending"])
def test_single_precision_takes_operators_with_all_derivatives(name):
    """In float32 torch prefers fused kernels on the CPU, which lack second derivatives."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    for module in vars(optimizer).values():
        if isinstance(module, nn.Module):
            module.float()
    fn = gimli.functionalize(model, optimizer, squared_error)
    hyper = fn.hyperparameters()
    leaves = list(tensors_of(hyper).values())
    assert {leaf.dtype for path, leaf in hyper.modules.items()} == {torch.float32}
    batches = [tuple(part.float() for part in batch) for batch in regression(3)]
    _, losses = fn.unroll(fn.init(), batches, hyper)
    first = torch.autograd.grad(losses[-1], leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    second = torch.autograd.grad(torch.stack([(g * g).sum() for g in first]).sum(), leaves, allow_unused=True)
    assert any(s is not None and float(s.abs().max()) > 0 for s in second)


# ---------------------------------------------------------------------- names and forms


def hyper_of(make):
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = make(model.parameters())
    fn = gimli.functionalize(model, optimizer, squared_error)
    return optimizer, fn, fn.hyperparameters()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_tensor_is_found_under_its_own_path(name):
    optimizer, _, hyper = hyper_of(OPTIMIZERS[name])
    held = {path: t for path, t in held_tensors(optimizer).items() if not path.startswith("adapted")}
    found = {**hyper.modules, **{p: t for p, t in hyper.attributes.items() if t.dim() or p in held}}
    assert_equal_tensors(found, held, 0.0)
    assert not any(t.requires_grad for t in found.values())
    assert set(found) <= set(hyper.by_path())


def test_paths_and_kinds():
    _, fn, hyper = hyper_of(Custom)
    names = ["rule_of.gain", *(f"rule_of.inner.net.{i}.{part}" for i in (0, 2) for part in ("weight", "bias"))]
    assert list(hyper.modules) == names
    assert list(hyper.attributes) == ["rule_of.decay"]
    assert list(fn.init().opt_state) == ["rule_of.average", "rule_of.calls"]
    _, fn, hyper = hyper_of(Noisy)
    assert hyper.attributes == {}
    buffers = ["net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"]
    assert list(fn.init().opt_state) == buffers
    _, _, hyper = hyper_of(InGroups)
    assert [list(group) for group in hyper] == [["lr"], ["lr"], ["lr"]]
    assert next(iter(hyper.modules)) == "groups.0.net.0.weight"
    assert list(hyper.modules)[-1] == "groups.2.net.0.bias"
    _, _, hyper = hyper_of(Cells)
    assert list(hyper.attributes) == ["log_scale"]


def test_weights_that_the_step_trains_are_state():
    _, fn, hyper = hyper_of(Adapting)
    assert {path.split(".")[0] for path in hyper.modules} == {"fixed"}
    assert {path.split(".")[0] for path in fn.init().opt_state} == {"adapted"}


def test_the_first_step_is_a_variant_of_its_own():
    training = training_of("stacked")
    _, _, fn = training.functionalized()
    fn.unroll(fn.init(), training.batches)
    assert len(fn.programs["update"].variants) == 2
    _, _, fn = training_of("lstm").functionalized()
    fn.unroll(fn.init(), training.batches)
    assert len(fn.programs["update"].variants) == 2


def test_a_program_names_weights_as_the_modules_do():
    _, fn, _ = hyper_of(Perceptron)
    assert re.search(r"\n    hyper_net_0_weight, +# f64\[5, 2\]\n", fn.programs["update"].code)


def test_live_parameters_can_be_given():
    """The modules' own parameters as hyperparameters: a meta-optimizer over `net.parameters()` trains them in place."""
    training = training_of("perceptron", steps=5)
    _, optimizer, fn = training.functionalized()
    expected = learned_slopes(training, fn)
    hyper = fn.hyperparameters()
    for name, parameter in optimizer.net.named_parameters():
        hyper.modules[f"net.{name}"] = parameter
    state, losses = fn.unroll(fn.init(), training.batches, hyper)
    objective(state.params, losses).backward()
    for name, parameter in optimizer.net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"hyper.net.{name}"], rtol=1e-12, atol=0)
    torch.optim.SGD(optimizer.net.parameters(), lr=0.1).step()
    for name, parameter in optimizer.net.named_parameters():
        assert torch.equal(fn.hyperparameters().modules[f"net.{name}"], parameter)


def test_an_optimizer_that_is_a_module_itself():
    class Both(Perceptron, nn.Module):  # pyright: ignore[reportIncompatibleMethodOverride]
        def __init__(self, params):
            nn.Module.__init__(self)
            super().__init__(params)

    _, _, hyper = hyper_of(Both)
    assert list(hyper.modules) == [f"net.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")]
    check_values(Training(mlp, Both, squared_error, regression(3)))


@pytest.mark.parametrize("path", ["net.0.weight", "net.2.bias"])
def test_another_shape_is_refused(path):
    _, fn, hyper = hyper_of(Perceptron)
    hyper.modules[path] = torch.zeros(7)
    with pytest.raises(gimli.InputError, match=rf"hyper\[{path}\] has shape \(7,\), but the optimizer's is"):
        fn.unroll(fn.init(), regression(2), hyper)


# ---------------------------------------------------------------------- tasks, requirements, writing back


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("name", ["perceptron", "cells", "stacked", "custom", "in-groups"])
def test_tasks_equal_a_loop(name, checkpoint):
    training = training_of(name, steps=4)
    _, _, fn = training.functionalized()
    count = 3
    batches = [normal(count, 4, 6, 3, seed=1), normal(count, 4, 6, 2, seed=2)]
    hyper = fn.hyperparameters()
    leaves = list(tensors_of(hyper).values())
    state, losses = fn.unroll(fn.init(), tuple(batches), hyper, tasks=True, checkpoint=checkpoint)
    together = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    runs = [fn.unroll(fn.init(), tuple(part[i] for part in batches), hyper) for i in range(count)]
    alone = torch.autograd.grad(
        torch.stack([loss for _, loss in runs]).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for index, (one, loss) in enumerate(runs):
        torch.testing.assert_close(losses[index], loss, rtol=1e-11, atol=1e-12)
        for key, value in one.params.items():
            torch.testing.assert_close(state.params[key][index], value, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [Perceptron, Cells, Stacked, lambda ps: torch.optim.Adam(ps, lr=0.1)])
def test_hyperparameters_for_each_task(make):
    """Every task has modules and numbers of its own; what the user did not give is shared."""
    _, fn, hyper = hyper_of(make)
    each = []
    for index in range(3):
        modules = {path: value * (1 - 0.1 * index) for path, value in hyper.modules.items()}
        groups = [{**group, "lr": group["lr"] * (1 + index)} for group in hyper]
        each.append(gimli.Hyperparameters(groups, hyper.attributes, modules))
    stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *each)
    batches = regression(4)
    _, losses = fn.unroll(fn.init(), batches, stacked, tasks=(None, None, 0, None))
    for index, own in enumerate(each):
        torch.testing.assert_close(losses[index], fn.unroll(fn.init(), batches, own)[1], rtol=1e-11, atol=1e-12)
    with pytest.raises(gimli.InputError, match="`tasks` says that dimension 0 is the task's"):
        fn.unroll(fn.init(), batches, hyper, tasks=(None, None, 0, None))


def test_requirements_name_the_weights():
    training = training_of("perceptron")
    _, _, fn = training.functionalized()
    hyper = fn.hyperparameters()
    tensors_of(hyper)
    found = fn.requirements(hyper, batch=training.batches[0])
    assert found.holds
    assert all(found.hyper[f"net.{i}.{part}"].holds for i in (0, 2) for part in ("weight", "bias"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_training_continues_from_what_load_into_wrote(name):
    training = training_of(name)
    half = len(training.batches) // 2
    expected = run_live(training, batches=training.batches)
    _, _, fn = training.functionalized()
    torch.manual_seed(training.seed)
    state, _ = fn.unroll(fn.init(), training.batches[:half])
    random_state = torch.get_rng_state()
    model, optimizer = training.start()
    ids = {path: id(t) for path, t in held_tensors(optimizer).items()}
    fn.load_into(model, optimizer, state)
    assert {path: id(t) for path, t in held_tensors(optimizer).items()} == ids
    torch.set_rng_state(random_state)
    for batch in training.batches[half:]:
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()
    assert_equal_tensors(dict(model.named_parameters()), expected.params[-1])
    got, _ = fn.unroll(fn.init(), training.batches[:half])  # what was written shares nothing with the programs
    if name != "noisy":
        assert_equal_tensors(got.params, state.params, 0.0)


class Hidden(Learned):
    """A network that no attribute leads to."""

    def __init__(self, params, net):
        super().__init__(params)
        self.apply = lambda grad: net(grad)

    def rule(self, group, p):
        return self.apply(p.grad.reshape(-1, 1))


def test_weights_that_no_attribute_leads_to():
    """They are used by reference, as in eager; computed again, their gradient would be lost, and that is refused."""
    nets = []

    def make(params):
        nets.append(network(1, 3, 1))
        return Hidden(params, nets[-1])

    training = Training(mlp, make, squared_error, regression(5))
    check_values(training)
    _, _, fn = training.functionalized()
    weight = nets[-1][0].weight
    along = random_like(weight, 7)
    state, losses = fn.unroll(fn.init(), training.batches)
    (grad,) = torch.autograd.grad(objective(state.params, losses), weight)

    def live(offset):
        return live_objective(training, change=lambda *_: nets[-1][0].weight.add_(offset * along))

    assert slope_error(float((grad * along).sum()), live) <= GRADIENTS
    with pytest.raises(gimli.InputError, match=r"the loss or the optimizer uses a tensor of shape \(3, 1\)"):
        fn.unroll(fn.init(), training.batches, checkpoint=2)


def test_weights_behind_parametrizations():
    def make(params):
        optimizer = Perceptron(params)
        first, second = optimizer.net[0], optimizer.net[2]
        torch.nn.utils.parametrizations.weight_norm(first)
        torch.nn.utils.parametrizations.spectral_norm(second)
        return optimizer

    training = Training(mlp, make, squared_error, regression(5))
    fn = check_values(training)
    assert "net.0.parametrizations.weight.original1" in fn.hyperparameters().modules
    grads = learned_slopes(training, fn)
    errors = learned_errors(training, grads)
    assert {path: error for path, error in errors.items() if not error <= GRADIENTS} == {}
