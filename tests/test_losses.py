"""Kinds of losses: with meta-parameters, with stopped gradients, with derivatives inside, with tensors from around."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    OPTIMIZERS,
    Training,
    assert_close_gradients,
    check_against_hand,
    check_gradients,
    check_values,
    differentiable_inputs,
    finite_difference,
    live_objective,
    moved,
    normal,
    objective,
    plain_sgd,
    random_directions,
    regression,
    relative_error,
    run_live,
    sgd,
    sgd_by_hand,
    slope_error,
    squared_error,
    unrolled_gradients,
    unrolled_objective,
    with_optimizer,
)
from torch import nn

import gimli_compile as gimli

HYPERS = {
    "sgd": ("groups.0.lr", "groups.0.momentum", "groups.0.weight_decay"),
    "adamw": ("groups.0.lr", "groups.0.betas.0", "groups.0.betas.1", "groups.0.weight_decay"),
}


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def classification(steps, *, size=5):
    return [(normal(size, 3, seed=t), torch.arange(size) % 2) for t in range(steps)]


# ---------------------------------------------------------------------- meta-parameters


def weighted(model, batch, meta):
    """One learned weight for each example."""
    x, y = batch
    return (F.softmax(meta, 0) * ((model(x) - y) ** 2).mean(1)).sum()


def penalized(model, batch, meta):
    """A nested pytree of learned coefficients, one of them unused."""
    x, y = batch
    out = model(x)
    penalty = sum((p**2).sum() for p in model.parameters())
    slope, offset = meta["affine"]
    return ((out * slope + offset - y) ** 2).mean() * meta["scale"].exp() + meta["more"][0]["decay"] * penalty


LEARNED = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def learned(model, batch, meta):
    """A loss that is itself a network, its parameters given by `meta`."""
    x, y = batch
    joined = torch.cat([model(x), y], dim=1)
    return torch.func.functional_call(LEARNED, meta, (joined,)).square().mean()


def relabelled(model, batch, meta):
    """Learned soft labels."""
    x, y = batch
    return F.cross_entropy(model(x), F.softmax(meta["labels"], 1)) + 0.3 * F.mse_loss(model(x), y)


def learned_parameters():
    torch.manual_seed(4)
    return {name: torch.randn_like(p.detach()) for name, p in LEARNED.named_parameters()}


META = {
    "weighted": Training(mlp, sgd, weighted, regression(3), normal(5, seed=50)),
    "penalized": Training(
        mlp,
        sgd,
        penalized,
        regression(3),
        {
            "affine": (normal(2, seed=51), normal(2, seed=52)),
            "scale": torch.tensor(0.2, dtype=torch.float64),
            "more": [{"decay": torch.tensor(0.05, dtype=torch.float64)}, torch.ones(2, dtype=torch.float64)],
        },
    ),
    "learned": Training(mlp, sgd, learned, regression(3), learned_parameters()),
    "relabelled": Training(mlp, sgd, relabelled, regression(3), {"labels": normal(5, 2, seed=53)}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", META)
def test_meta_parameters(name, optimizer):
    training = with_optimizer(META[name], OPTIMIZERS[optimizer])
    check_values(training)
    check_gradients(training, HYPERS[optimizer])


def test_unused_meta_parameters_get_no_gradient():
    training = META["penalized"]
    _, _, fn = training.functionalized()
    inputs = differentiable_inputs(training, fn)
    total = unrolled_objective(training, fn, inputs.state, inputs.hyper, inputs.meta, inputs.batches)
    grads = torch.autograd.grad(total, [inputs.meta["more"][1], inputs.meta["scale"]], allow_unused=True)
    assert grads[0] is None
    assert grads[1] is not None


def test_numbers_in_meta_are_part_of_the_program():
    """A number is no tensor: each of its values has a program of its own."""

    def scaled(model, batch, meta):
        return squared_error(model, batch) * meta["factor"] * (2.0 if meta["twice"] else 1.0)

    for factor, twice in ((0.5, False), (1.5, True), (0.5, True)):
        check_values(Training(mlp, sgd, scaled, regression(3), {"factor": factor, "twice": twice}))
    model, optimizer = Training(mlp, sgd, scaled, regression(3), {}).start()
    fn = gimli.functionalize(model, optimizer, scaled)
    state, batch = fn.init(), regression(1)[0]
    base = float(fn.step(state, batch, meta={"factor": 1.0, "twice": False})[1])
    for factor, twice in ((0.5, False), (1.5, True), (0.5, True)):
        loss = float(fn.step(state, batch, meta={"factor": factor, "twice": twice})[1])
        assert loss == pytest.approx(base * factor * (1 + twice), rel=1e-14)


def test_a_loss_without_meta():
    training = Training(mlp, sgd, squared_error, regression(3))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


def test_a_loss_whose_meta_has_a_default():
    def optional(model, batch, meta=None):
        return squared_error(model, batch) * (1.0 if meta is None else meta)

    check_values(Training(mlp, sgd, optional, regression(3)))
    check_values(Training(mlp, sgd, optional, regression(3), torch.tensor(0.5, dtype=torch.float64)))


def test_a_callable_object_is_a_loss():
    class Loss:
        def __init__(self, power):
            self.power = power

        def __call__(self, model, batch, meta):
            x, y = batch
            return (model(x) - y).abs().pow(self.power).mean() * meta

    training = Training(mlp, sgd, Loss(3.0), regression(3), torch.tensor(0.5, dtype=torch.float64))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


# ---------------------------------------------------------------------- the batch


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_distills_a_data_set(optimizer):
    """One synthetic batch, used in every step, is learned by the gradient of a validation loss."""
    x, y = regression(1)[0]
    held_out = regression(2)[1]
    training = Training(mlp, OPTIMIZERS[optimizer], squared_error, [(x, y)] * 4)
    _model, optimizer, fn = training.functionalized()
    leaves = (x.clone().requires_grad_(), y.clone().requires_grad_())
    state, _ = fn.unroll(fn.init(), [leaves] * 4)
    got = torch.autograd.grad(((fn(state, held_out[0]) - held_out[1]) ** 2).mean(), leaves)

    along = random_directions((x, y), 60)

    def validation(offset):
        live, live_optimizer = training.start()
        for _ in range(4):
            live_optimizer.zero_grad()
            squared_error(live, moved((x, y), along, offset)).backward()
            live_optimizer.step()
        return float(squared_error(live, held_out).detach())

    slope = sum(float((g * way).sum()) for g, way in zip(got, along, strict=True))
    assert slope_error(slope, validation) <= 1e-6


def test_batches_may_be_any_pytree():
    """Tensors are inputs; numbers and flags belong to the program."""

    def loss(model, batch):
        x, y = batch["pair"]
        error = (model(x) * batch["scale"] - y) ** 2
        return error.mean() if batch["mean"] else error.sum()

    batches = [
        {"pair": pair, "scale": scale, "mean": mean}
        for pair, scale, mean in zip(regression(4), (0.5, 0.5, 0.7, 0.5), (True, False, True, True), strict=True)
    ]
    training = Training(mlp, sgd, loss, batches)
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


# ---------------------------------------------------------------------- gradients that the user stops


def bootstrapped(model, batch):
    """A target made by the model itself, with `detach`."""
    x, y = batch
    out = model(x)
    return ((out - 0.5 * out.detach().sin() - y) ** 2).mean()


def detached_by_data(model, batch):
    x, y = batch
    out = model(x)
    return ((out - 0.5 * out.data.sin() - y) ** 2).mean()


def teacher(model, batch):
    """A teacher under `no_grad`: the model's own averaged weights."""
    x, y = batch
    with torch.no_grad():
        target = torch.tanh(model(x)) * 0.5 + 0.1 * model[0].weight.mean()
    return ((model(x) - target - y) ** 2).mean()


@torch.no_grad()
def soft_target(model, x):
    return F.softmax(model(x) * 2.0, -1)


def decorated(model, batch):
    x, _ = batch
    return F.cross_entropy(model(x), soft_target(model, x))


def straight_through(model, batch):
    """The one-hot of the largest output forward, the softmax backward."""
    x, y = batch
    soft = F.softmax(model(x), -1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    chosen = hard - soft.detach() + soft
    return ((chosen * y) ** 2).mean() + 0.1 * (soft * y).mean()


def gumbel(model, batch):
    x, y = batch
    return ((F.gumbel_softmax(model(x), tau=0.7, hard=True) - y) ** 2).mean()


def gumbel_soft(model, batch):
    x, y = batch
    return ((F.gumbel_softmax(model(x), tau=0.7) - y) ** 2).mean()


def detached_inside_a_computation(model, batch):
    """A normalization whose statistics are constants of the gradient; in place, through a view."""
    x, y = batch
    out = model(x)
    out = (out - out.mean(0).detach()) / (out.std(0).detach() + 0.5)
    kept = out.clone()
    kept[:, 0].mul_(out[:, 1].detach())
    return ((kept - y) ** 2).mean()


def half_stopped(model, batch):
    """Only the parameters of the second layer learn from one of the terms."""
    x, y = batch
    hidden = model[1](model[0](x))
    return ((model[2](hidden.detach()) - y) ** 2).mean() + hidden.square().mean()


def changed_under_no_grad(model, batch):
    """Eager autograd does not see the change: the gradient is that of the value before it."""
    x, y = batch
    out = torch.tanh(model(x)) * 1.0
    with torch.no_grad():
        out.mul_(2.0)
    return ((out - y) ** 2).mean()


STOPPED = {
    "detach": bootstrapped,
    "data": detached_by_data,
    "no_grad": teacher,
    "decorator": decorated,
    "straight_through": straight_through,
    "gumbel_hard": gumbel,
    "gumbel_soft": gumbel_soft,
    "detach_in_place": detached_inside_a_computation,
    "half": half_stopped,
    "changed_under_no_grad": changed_under_no_grad,
}


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_gradients_stay_stopped(name):
    for optimizer in (plain_sgd, sgd):
        training = Training(mlp, optimizer, STOPPED[name], regression(4))
        check_values(training)
        check_against_hand(training)


@pytest.mark.parametrize("checkpoint", ["step", "sqrt"])
def test_recomputation_keeps_gradients_stopped(checkpoint):
    for loss in (bootstrapped, teacher, gumbel):
        check_against_hand(Training(mlp, sgd, loss, regression(4)), checkpoint=checkpoint)


def test_meta_is_stopped_where_the_user_stops_it():
    def loss(model, batch, meta):
        x, y = batch
        return ((model(x) * meta.detach() + meta - y) ** 2).mean()

    check_against_hand(Training(mlp, sgd, loss, regression(4), normal(2, seed=54)))


class Averaged(nn.Module):
    """A student, and a teacher that averages the student's weights in buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("average", self.layer.weight.detach().clone())

    def forward(self, x):
        return torch.tanh(self.layer(x))


def distilled(model, batch):
    x, y = batch
    with torch.no_grad():
        model.average.mul_(0.9).add_(model.layer.weight, alpha=0.1)
        target = torch.tanh(x @ model.average.T)
    return ((model(x) - y) ** 2).mean() + 0.5 * ((model(x) - target) ** 2).mean()


def test_an_averaged_teacher_is_threaded_as_a_buffer():
    training = Training(Averaged, sgd, distilled, regression(4))
    check_values(training)
    _, _, fn = training.functionalized()
    state = fn.init()
    for value in state.params.values():
        value.requires_grad_()
    state, _ = fn.unroll(state, training.batches)
    assert not state.buffers["average"].requires_grad


# ---------------------------------------------------------------------- derivatives inside the loss


def gradient_penalty(model, batch):
    x, y = batch
    x = x.clone().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return ((out - y) ** 2).mean() + 0.3 * ((slope.square().sum(1) + 0.1).sqrt() - 1).square().mean()


def gradient_penalty_on_the_batch(model, batch):
    """The batch itself is made to require a gradient, as WGAN-GP code often does."""
    x, y = batch
    x = x.detach().requires_grad_()
    out = model(x)
    slope = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True, retain_graph=True)[0]
    return ((out - y) ** 2).mean() + 0.3 * (slope.norm(2, dim=1) - 1).square().mean()


def functional_derivative(model, batch):
    """A derivative by torch.func inside the loss."""
    x, y = batch
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(x)
    return ((model(x) - y) ** 2).mean() + 0.1 * jacobian.square().mean()


def adversarial(model, batch):
    """A first-order inner gradient moves the input: no graph through it."""
    x, y = batch
    moved_x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(((model(moved_x) - y) ** 2).mean(), moved_x)
    return ((model(x + 0.1 * slope) - y) ** 2).mean()


def second_layer_sensitivity(model, batch):
    """The norm of the loss's own parameter gradient is part of the loss."""
    x, y = batch
    loss = ((model(x) - y) ** 2).mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 0.2 * sum(grad.square().sum() for grad in grads)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", [gradient_penalty, second_layer_sensitivity])
def test_a_gradient_penalty(loss, optimizer):
    training = Training(mlp, OPTIMIZERS[optimizer], loss, regression(3))
    check_values(training)
    check_gradients(training, HYPERS[optimizer])


def test_a_gradient_penalty_on_a_detached_batch():
    training = Training(mlp, sgd, gradient_penalty_on_the_batch, regression(3))
    check_values(training)
    check_gradients(training, HYPERS["sgd"], batch=False)  # the detach stops part of the batch's gradient


def test_a_functional_derivative_inside_the_loss():
    training = Training(mlp, sgd, functional_derivative, regression(3))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


def test_an_inner_gradient_without_a_graph_is_a_constant():
    def by_hand(model, batch):
        x, y = batch
        x_leaf = x.detach().clone().requires_grad_()
        tensors = {name: value.detach() for name, value in model.named_parameters()}
        out = torch.func.functional_call(model, tensors, (x_leaf,))
        (slope,) = torch.autograd.grad(((out - y) ** 2).mean(), x_leaf)
        return ((model(x + 0.1 * slope.detach()) - y.detach()) ** 2).mean() + 0.0 * y.sum()

    training = Training(mlp, sgd, adversarial, regression(3))
    check_values(training)
    _, _, fn = training.functionalized()
    inputs, got = unrolled_gradients(training, fn)
    group = inputs.hyper[0]
    params, losses = sgd_by_hand(
        replace(training, loss=by_hand),
        inputs.state.params,
        inputs.batches,
        None,
        lr=group["lr"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
    )
    names = [f"params.{name}" for name in inputs.state.params]
    expected = torch.autograd.grad(objective(params, losses), list(inputs.state.params.values()))
    assert_close_gradients({name: got[name] for name in names}, dict(zip(names, expected, strict=True)))


# ---------------------------------------------------------------------- tensors from around


def closing_over(tensor):
    def loss(model, batch):
        x, y = batch
        return ((model(x) * tensor.exp() - y) ** 2).mean()

    return loss


def test_gradient_flows_to_a_tensor_that_the_loss_closes_over():
    coefficient = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)
    training = Training(mlp, sgd, closing_over(coefficient), regression(3))
    _, _, fn = training.functionalized()
    state, losses = fn.unroll(fn.init(), training.batches)
    (got,) = torch.autograd.grad(objective(state.params, losses), coefficient)
    along = torch.tensor([1.0, -0.6], dtype=torch.float64)

    def function(offset):
        return live_objective(replace(training, loss=closing_over(coefficient.detach() + offset * along)))

    assert slope_error(float((got * along).sum()), function) <= 1e-6


def test_a_tensor_that_the_loss_closes_over_may_change_in_place():
    coefficient = torch.tensor([0.2, -0.3], dtype=torch.float64)
    training = Training(mlp, sgd, closing_over(coefficient), regression(3))
    fn = check_values(training)
    coefficient.mul_(2.0)
    state, losses = fn.unroll(fn.init(), training.batches)
    expected = run_live(training)
    assert relative_error(losses, torch.stack(expected.losses)) <= 1e-12
    assert objective(state.params, losses).item() == pytest.approx(live_objective(training), rel=1e-12)


def test_a_network_that_the_loss_closes_over_gets_gradients():
    """A learned loss that is an ordinary live module."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def loss(model, batch):
        x, y = batch
        return network(torch.cat([model(x), y], 1)).square().mean()

    training = Training(mlp, sgd, loss, regression(3))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    _, _, fn = training.functionalized()
    state, losses = fn.unroll(fn.init(), training.batches)
    objective(state.params, losses).backward()
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    along = random_directions(before, 70)

    def function(offset):
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(before[name] + offset * along[name])
        return live_objective(training)

    slope = sum(float((p.grad * along[name]).sum()) for name, p in network.named_parameters())
    expected = finite_difference(function, 0.1)
    assert abs(slope - expected) <= 1e-6 * max(abs(expected), 1e-3)


def test_a_penalty_on_a_list_of_the_live_parameters():
    """The list was made from the live model, outside of the loss; in the loss it means the model's parameters."""
    held = []

    def remember(model):
        held[:] = list(model.parameters())

    def loss(model, batch):
        return squared_error(model, batch) + 0.1 * sum((p**2).sum() for p in held)

    training = Training(mlp, sgd, loss, regression(3), prepare=remember)
    expected = run_live(training)
    model, optimizer = training.start()
    fn = gimli.functionalize(model, optimizer, loss)
    try:
        _state, losses = fn.unroll(fn.init(), training.batches)
    except gimli.CaptureError:
        return
    assert relative_error(losses, torch.stack(expected.losses)) <= 1e-12


def test_the_loss_may_call_the_live_model_by_another_name():
    held = []

    def loss(model, batch):
        x, y = batch
        return ((held[0](x) - y) ** 2).mean() + 0.1 * held[0][0].weight.square().sum()

    training = Training(mlp, sgd, loss, regression(3), prepare=lambda model: held.insert(0, model))
    model, optimizer = training.start()
    fn = gimli.functionalize(model, optimizer, loss)
    _state, losses = fn.unroll(fn.init(), training.batches)
    expected = run_live(training)
    assert relative_error(losses, torch.stack(expected.losses)) <= 1e-12


def test_noise_that_the_loss_draws():
    def noisy(model, batch):
        x, y = batch
        return ((model(x + 0.1 * torch.randn_like(x)) - y) ** 2 * torch.rand(5, 1, dtype=x.dtype)).mean()

    training = Training(mlp, sgd, noisy, regression(4))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


def test_noise_from_distributions():
    def sampled(model, batch, meta):
        x, y = batch
        prior = torch.distributions.Normal(meta[0], meta[1].exp())
        return ((model(x + prior.rsample((5, 3))) - y) ** 2).mean()

    training = Training(mlp, sgd, sampled, regression(4), normal(2, seed=55))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


# ---------------------------------------------------------------------- functions of torch


def column_scaled(out, y):
    scaled = torch.tanh(out) * 1.0
    scaled[:, 0].mul_(y[:, 1])
    scaled[1:3] = scaled[2:4].clone() * scaled[0].clone()
    return scaled


FUNCTIONS = {
    "mse": lambda out, y: F.mse_loss(out, y),
    "smooth_l1": lambda out, y: F.smooth_l1_loss(out, y, beta=0.4),
    "huber": lambda out, y: F.huber_loss(out, y, delta=0.7),
    "kl": lambda out, y: F.kl_div(F.log_softmax(out, 1), F.softmax(y, 1), reduction="batchmean"),
    "bce": lambda out, y: F.binary_cross_entropy(torch.sigmoid(out), torch.sigmoid(y)),
    "bce_logits": lambda out, y: F.binary_cross_entropy_with_logits(out, torch.sigmoid(y)),
    "smoothed": lambda out, y: F.cross_entropy(out, y.argmax(1), label_smoothing=0.1),
    "nll": lambda out, y: F.nll_loss(
        F.log_softmax(out, 1), y.argmax(1), weight=torch.tensor([0.3, 0.7], dtype=y.dtype)
    ),
    "cosine": lambda out, y: 1 - F.cosine_similarity(out, y).mean(),
    "norm": lambda out, y: torch.linalg.vector_norm(out - y, dim=1).mean(),
    "cdist": lambda out, y: torch.cdist(out, y).mean(),
    "prototypes": lambda out, y: torch.logsumexp(-((out[:, None] - y[None]) ** 2).sum(-1), 1).mean(),
    "gaussian_nll": lambda out, y: F.gaussian_nll_loss(out, y, F.softplus(out)),
    "einsum": lambda out, y: torch.einsum("bi,bj,ij->", out, y, torch.eye(2, dtype=y.dtype) + 0.3).square(),
    "indexing": lambda out, y: (
        out[torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])].square().sum() + out[1:3, ::2].sum()
    ),
    "sort": lambda out, y: (out.sort(0).values - y.sort(0).values).square().mean(),
    "cumulative": lambda out, y: (out.cumsum(0) - y.cumprod(0)).square().mean(),
    "in_place": lambda out, y: out.clone().mul_(y).add_(1.0).tanh_().square().mean(),
    "written": lambda out, y: torch.zeros(5, 3, dtype=y.dtype).index_copy(1, torch.tensor([0, 2]), out).square().mean(),
    "column_in_place": lambda out, y: column_scaled(out, y).square().mean(),
    "reshaped_in_place": lambda out, y: (
        out.clone().unsqueeze_(0).transpose_(1, 2).squeeze_(0).matmul(y).square().mean()
    ),
    "solved": lambda out, y: torch.linalg.solve(out.T @ out + torch.eye(2, dtype=y.dtype), y.T).square().mean(),
    "logdet": lambda out, y: torch.logdet(out.T @ out + torch.eye(2, dtype=y.dtype)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_torch(name):
    def loss(model, batch):
        x, y = batch
        return FUNCTIONS[name](model(x), y)

    training = Training(mlp, sgd, loss, regression(3))
    check_values(training)
    check_gradients(training, HYPERS["sgd"], batch=False)


def test_a_loss_of_several_calls_of_the_model():
    def contrastive(model, batch):
        x, y = batch
        left, right = F.normalize(model(x), dim=1), F.normalize(model(x.flip(0) * 0.9), dim=1)
        return F.cross_entropy(left @ right.T / 0.5, torch.arange(5)) + 0.0 * y.mean()

    training = Training(mlp, sgd, contrastive, regression(3))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


def test_batches_of_other_shapes_are_other_programs():
    batches = [(normal(size, 3, seed=size), normal(size, 2, seed=50 + size)) for size in (5, 4, 5, 3)]
    training = Training(mlp, sgd, squared_error, batches)
    fn = check_values(training)
    assert len(fn.programs["grad"]) == 3
    check_gradients(training, HYPERS["sgd"])


def test_classification_with_integer_labels():
    def loss(model, batch):
        x, labels = batch
        return F.cross_entropy(model(x), labels)

    training = Training(mlp, sgd, loss, classification(3))
    check_values(training)
    check_gradients(training, HYPERS["sgd"])
