"""Kinds of models, each trained for a few steps: values against the live eager loop, gradients against differences of it."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    OPTIMIZERS,
    Training,
    Untouched,
    adamw,
    assert_close_gradients,
    assert_equal_histories,
    assert_equal_tensors,
    check_against_hand,
    check_gradients,
    check_values,
    continue_live,
    images,
    normal,
    plain_sgd,
    regression,
    run_live,
    run_steps,
    sgd,
    squared_error,
    tokens,
    unrolled_gradients,
    with_optimizer,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gimli_compile as gimli

HYPERS = {
    "sgd": ("groups.0.lr", "groups.0.momentum", "groups.0.weight_decay"),
    "adamw": ("groups.0.lr", "groups.0.betas.0", "groups.0.betas.1", "groups.0.weight_decay"),
}


def cross_entropy(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


MLP = Training(mlp, sgd, squared_error, regression(4))


# ---------------------------------------------------------------------- models


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 2),
        nn.BatchNorm2d(2, momentum=None),
        nn.Softplus(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 2),
    )


def evaluating():
    """A convolutional network in eval mode, with running statistics that are not those of the start."""
    model = convolutional().double()
    for x, _ in images(2):
        model(x + 0.3)
    return model.eval()


def without_running_statistics():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten(), nn.Linear(32, 2)
    )


class Tied(nn.Module):
    """A language model whose output weights are those of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.hidden = nn.Linear(3, 3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.embedding.weight

    def forward(self, sequence):
        return self.head(torch.tanh(self.hidden(self.embedding(sequence))))


def next_token(model, sequence):
    return F.cross_entropy(model(sequence)[:, :-1].flatten(0, 1), sequence[:, 1:].flatten())


class TwoPaths(nn.Module):
    """One submodule that is reached by two paths."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.again = nn.ModuleDict({"block": self.block, "other": nn.Linear(3, 2)})

    def forward(self, x):
        return self.again["other"](self.again["block"](self.block(x)))


class Hooked(nn.Module):
    """Hooks of every kind on modules, and one on an activation."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.first.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
        self.first.register_forward_hook(lambda module, args, out: out.sin())
        self.second.register_full_backward_hook(lambda module, incoming, outgoing: (incoming[0] * 0.7,))
        self.second.register_full_backward_pre_hook(lambda module, outgoing: (outgoing[0] * 1.3,))

    def forward(self, x):
        hidden = self.first(x)
        hidden.register_hook(lambda grad: grad + 0.2 * grad**3)
        return self.third(torch.tanh(self.second(hidden)))


def old_weight_norm():
    return nn.Sequential(weight_norm_of_old(nn.Linear(3, 4)), nn.Tanh(), weight_norm_of_old(nn.Linear(4, 2), dim=1))


def weight_norm_of_old(module, **options):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(module, **options)


def new_weight_norm():
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def orthogonal():
    layer = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley", use_trivialization=False)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


class Symmetric(nn.Module):
    def forward(self, value):
        return value.triu() + value.triu(1).transpose(-1, -2)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, value):
        return self.scale * value


def custom_parametrization():
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Scaled())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


def old_spectral_norm():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def new_spectral_norm():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class Partly(nn.Module):
    """One frozen layer, one layer and one parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.frozen, self.used, self.unused = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(5, 5)
        self.spare = nn.Parameter(torch.ones(2))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.used(torch.tanh(self.frozen(x)))


class Listed(nn.Module):
    """Parameters that are registered, and read from a plain list and a nested dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4, 2), (2,)))
        self.weights = [self.a, (self.b,)]
        self.others = {"bias": {"c": self.c}}

    def forward(self, x):
        return torch.tanh(x @ self.weights[0]) @ self.weights[1][0] + self.others["bias"]["c"]


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.recurrent = kind(2, 3, batch_first=True, **options)
        self.out = nn.LazyLinear(2)

    def forward(self, x):
        return self.out(self.recurrent(x)[0][:, -1])


def initialized(model):
    model(normal(1, 3, 2).float())
    return model


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, activation="gelu")
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.layer(x).mean(1))


class ScaledDotProduct(nn.Module):
    """Causal attention written by hand around torch's fused function."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1))


def sequences(width):
    return [(normal(3, 4, width, seed=2 * t), normal(3, 2, seed=2 * t + 1)) for t in range(3)]


def sequence_model(make, width):
    return Training(make, sgd, squared_error, sequences(width))


TRAININGS = {
    "mlp": MLP,
    "convolutional": Training(convolutional, sgd, cross_entropy, images(3)),
    "evaluating": Training(evaluating, sgd, cross_entropy, images(3)),
    "batch_statistics_only": Training(without_running_statistics, sgd, cross_entropy, images(3)),
    "tied": Training(Tied, sgd, next_token, tokens(3)),
    "two_paths": Training(TwoPaths, sgd, squared_error, regression(3)),
    "hooks": Training(Hooked, sgd, squared_error, regression(3)),
    "new_weight_norm": Training(new_weight_norm, sgd, squared_error, regression(3)),
    "old_weight_norm": Training(old_weight_norm, sgd, squared_error, regression(3)),
    "orthogonal": Training(orthogonal, sgd, squared_error, regression(3)),
    "custom_parametrization": Training(custom_parametrization, sgd, squared_error, regression(3)),
    "partly": Training(Partly, sgd, squared_error, regression(3)),
    "listed": Training(Listed, sgd, squared_error, regression(3)),
    "layer_norm": Training(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)),
        sgd,
        squared_error,
        regression(3),
    ),
    "group_norm": Training(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 2)),
        sgd,
        cross_entropy,
        images(3),
    ),
    "instance_norm": Training(
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(32, 2),
        ),
        sgd,
        cross_entropy,
        images(3),
    ),
    "gru": sequence_model(lambda: initialized(Recurrent(nn.GRU)), 2),
    "lstm": sequence_model(lambda: initialized(Recurrent(nn.LSTM, num_layers=2, bidirectional=True)), 2),
    "rnn": sequence_model(lambda: initialized(Recurrent(nn.RNN, nonlinearity="tanh")), 2),
    "attention": sequence_model(Attention, 4),
    "transformer": sequence_model(Transformer, 4),
    "scaled_dot_product": sequence_model(ScaledDotProduct, 4),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name, optimizer):
    check_values(with_optimizer(TRAININGS[name], OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name, optimizer):
    check_gradients(with_optimizer(TRAININGS[name], OPTIMIZERS[optimizer]), HYPERS[optimizer])


# ---------------------------------------------------------------------- forward


@pytest.mark.parametrize("name", TRAININGS)
def test_forward_equals_the_model(name):
    training = TRAININGS[name]
    model, optimizer = training.start()
    batch = training.batches[0]
    x = batch[0] if isinstance(batch, tuple) else batch
    fn = gimli.functionalize(model, optimizer)
    state = fn.init()
    untouched = Untouched(model, optimizer)
    out, buffers = fn.forward(state.params, state.buffers, x)
    again, _ = fn.forward(state.params, state.buffers, x)
    called = fn(state, x)
    untouched.check()
    expected = model(x)
    assert_equal_tensors(
        {"out": out, "again": again, "called": called}, dict.fromkeys(("out", "again", "called"), expected)
    )
    assert_equal_tensors(buffers, dict(model.named_buffers()))


class Structured(nn.Module):
    """Takes and returns nested structures."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs, *, scale=1.0, mask=None):
        out = self.layer(inputs["x"]) * scale
        return {"out": out if mask is None else out * mask, "rest": (out.mean(), None, "text", 3)}


def test_forward_takes_and_returns_structures():
    model = Structured().double()
    fn = gimli.functionalize(model, plain_sgd(model.parameters()))
    state = fn.init()
    x, mask = normal(4, 3), normal(4, 2, seed=1)
    calls: list[dict[str, Any]] = [{}, {"scale": 2.0}, {"scale": normal(2, seed=2), "mask": mask}]
    for options in calls:
        got, expected = fn(state, {"x": x}, **options), model({"x": x}, **options)
        assert_equal_tensors(
            {"out": got["out"], "mean": got["rest"][0]}, {"out": expected["out"], "mean": expected["rest"][0]}
        )
        assert got["rest"][1:] == expected["rest"][1:]


def test_forward_follows_train_and_eval():
    model = convolutional().double()
    fn = gimli.functionalize(model, plain_sgd(model.parameters()))
    state = fn.init()
    x, _ = images(1)[0]
    for training in (True, False, True):
        model.train(training)
        reference = convolutional().double()
        reference.load_state_dict(model.state_dict())
        reference.train(training)
        out, buffers = fn.forward(state.params, state.buffers, x)
        assert_equal_tensors({"out": out}, {"out": reference(x)})
        assert_equal_tensors(buffers, dict(reference.named_buffers()))


# ---------------------------------------------------------------------- running statistics


def test_running_statistics_after_the_loop_are_those_of_eager():
    training = TRAININGS["convolutional"]
    _, _, fn = training.functionalized()
    state, _ = fn.unroll(fn.init(), training.batches)
    expected = run_live(training).buffers[-1]
    assert_equal_tensors(state.buffers, expected)
    assert state.buffers["1.num_batches_tracked"].dtype == torch.int64
    assert int(state.buffers["1.num_batches_tracked"]) == len(training.batches)


def test_eval_mode_leaves_running_statistics_alone():
    training = TRAININGS["evaluating"]
    _, _, fn = training.functionalized()
    start = fn.init()
    state, _ = fn.unroll(start, training.batches)
    assert_equal_tensors(state.buffers, start.buffers, tolerance=0.0)


def test_running_statistics_carry_no_gradient():
    training = TRAININGS["convolutional"]
    _, _, fn = training.functionalized()
    state = fn.init()
    for value in state.params.values():
        value.requires_grad_()
    state, _ = fn.unroll(state, training.batches)
    assert [name for name, value in state.buffers.items() if value.requires_grad] == []


# ---------------------------------------------------------------------- dropout


def dropping():
    return nn.Sequential(
        nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 8), nn.AlphaDropout(0.3), nn.Linear(8, 2)
    )


DROPOUT = Training(dropping, sgd, squared_error, regression(4))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dropout_draws_the_sequence_of_eager(optimizer):
    training = with_optimizer(DROPOUT, OPTIMIZERS[optimizer])
    check_values(training)
    check_gradients(training, HYPERS[optimizer])


def test_dropout_draws_anew_in_every_step():
    training = replace(DROPOUT, batches=[DROPOUT.batches[0]] * 3)
    model, _optimizer, fn = training.functionalized()
    same = fn.init()
    torch.manual_seed(0)
    losses = [float(fn.step(same, training.batches[0])[1]) for _ in range(3)]
    assert len(set(losses)) == 3
    torch.manual_seed(0)
    expected = [float(training.loss(model, training.batches[0]).detach()) for _ in range(3)]
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("checkpoint", ["step", 2, "sqrt"])
def test_recomputation_uses_the_same_draws(checkpoint):
    _model, _optimizer, fn = DROPOUT.functionalized()
    _, expected = unrolled_gradients(DROPOUT, fn)
    _, got = unrolled_gradients(DROPOUT, fn, checkpoint=checkpoint)
    assert_close_gradients(got, expected, tolerance=1e-14)  # sums over steps are taken in another order


def test_recomputation_leaves_the_generator_alone():
    _, _, fn = DROPOUT.functionalized()
    state = fn.init()
    for value in state.params.values():
        value.requires_grad_()
    torch.manual_seed(0)
    state, losses = fn.unroll(state, DROPOUT.batches, checkpoint="step")
    before = torch.get_rng_state()
    losses.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_capture_leaves_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model, optimizer = MLP.start()
    torch.set_rng_state(before)
    fn = gimli.functionalize(model, optimizer, squared_error)
    fn.unroll(fn.init(), MLP.batches, fn.hyperparameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_in_eval_mode_draws_nothing():
    training = replace(DROPOUT, prepare=lambda model: model.eval())
    check_values(training)
    _, _, fn = training.functionalized()
    before = torch.get_rng_state()
    fn.step(fn.init(), training.batches[0])
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- one tensor under two names


def test_tied_parameters_are_one_parameter():
    training = TRAININGS["tied"]
    model, optimizer, fn = training.functionalized()
    state, _ = fn.unroll(fn.init(), training.batches)
    assert "head.weight" not in state.params
    fn.load_into(model, optimizer, state)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, state.params["embedding.weight"])


def test_tied_buffers_are_one_buffer():
    class Counting(nn.Module):
        seen: torch.Tensor
        inner: Any

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))
            self.inner = nn.Module()
            self.inner.register_buffer("same", self.seen)

        def forward(self, x):
            self.seen.add_(1.0)
            return self.layer(x) * (1 + self.inner.same)

    check_values(Training(Counting, sgd, squared_error, regression(3)))


# ---------------------------------------------------------------------- power iteration


@pytest.mark.parametrize("make", [old_spectral_norm, new_spectral_norm])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_spectral_norm_values(make, optimizer):
    check_values(Training(make, OPTIMIZERS[optimizer], squared_error, regression(4)))


@pytest.mark.parametrize("make", [old_spectral_norm, new_spectral_norm])
@pytest.mark.parametrize("optimizer", [sgd, plain_sgd])
def test_spectral_norm_stops_the_gradient_through_its_vectors(make, optimizer):
    check_against_hand(Training(make, optimizer, squared_error, regression(4)))


# ---------------------------------------------------------------------- derivatives of the user's own


class Round(torch.autograd.Function):
    """Rounds, with the derivative of the identity."""

    @staticmethod
    def forward(ctx, value):
        return torch.round(value * 4) / 4

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


class Bent(torch.autograd.Function):
    """Rounds, with a derivative that depends on the input."""

    @staticmethod
    def forward(ctx, value, sharpness):
        ctx.save_for_backward(value)
        ctx.sharpness = sharpness
        return torch.round(value)

    @staticmethod
    def backward(ctx, *grads):
        (value,) = ctx.saved_tensors
        return grads[0] * (1 - torch.tanh(ctx.sharpness * value) ** 2), None


class Pair(torch.autograd.Function):
    """Two inputs, two outputs, and a set-up of its own for the context."""

    @staticmethod
    def forward(left, right):
        return left * right, left + right

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        product, total = grads
        left, right = ctx.saved_tensors
        return 2 * product * right + total, product * left - 3 * total


class Quantized(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.function = function

    def forward(self, x):
        return self.second(torch.tanh(self.function(self.first(x))))


FUNCTIONS = {
    "identity": lambda value: Round.apply(value),
    "bound_at_import": Round.apply,
    "of_the_input": lambda value: Bent.apply(2 * value, 0.7),
    "two_results": lambda value: torch.tanh(cast(Any, sum(Pair.apply(value, value.cos())))),
}


@pytest.mark.parametrize("optimizer", [plain_sgd, sgd])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_custom_functions_keep_their_own_backward(name, optimizer):
    training = Training(lambda: Quantized(FUNCTIONS[name]), optimizer, squared_error, regression(4))
    check_values(training)
    check_against_hand(training)


# ---------------------------------------------------------------------- where tensors hide


class Holding(nn.Module):
    """Its parameter is registered, and read from an object that torch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.hidden = cast(Any, type("Box", (), {})())
        self.hidden.weight = self.layer.weight

    def forward(self, x):
        return F.linear(torch.tanh(x), self.hidden.weight, self.layer.bias)


def test_parameters_inside_other_objects_are_found_or_refused():
    training = Training(Holding, sgd, squared_error, regression(3))
    try:
        check_values(training)
    except gimli.CaptureError:
        return
    check_gradients(training, HYPERS["sgd"])


def test_parameter_list_and_dict():
    class Containers(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.ParameterList([torch.randn(3, 4), torch.randn(4, 2)])
            self.named = nn.ParameterDict({"bias": torch.randn(2)})

        def forward(self, x):
            return torch.tanh(x @ self.items[0]) @ self.items[1] + self.named["bias"]

    training = Training(Containers, adamw, squared_error, regression(3))
    check_values(training)
    check_gradients(training, HYPERS["adamw"])


def test_hooks_on_parameters_act():
    def clipped(model):
        model[0].weight.register_hook(lambda grad: 0.3 * torch.tanh(grad))

    training = replace(MLP, prepare=clipped)
    check_values(training)
    check_gradients(training, HYPERS["sgd"])


def test_hooks_after_accumulation_act():
    def scaled(model):
        def hook(parameter):
            parameter.grad.mul_(0.5)

        model[0].weight.register_post_accumulate_grad_hook(hook)

    check_values(replace(MLP, prepare=scaled))


def test_captures_in_the_middle_of_training():
    for name in ("mlp", "convolutional", "tied"):
        for make in OPTIMIZERS.values():
            training = with_optimizer(TRAININGS[name], make)
            expected = run_live(replace(training, batches=[*training.batches, *training.batches]))
            model, optimizer, fn = training.functionalized()
            continue_live(training, model, optimizer)
            got = run_steps(training, fn, fn.init())
            for part in ("params", "buffers", "losses"):
                del getattr(expected, part)[: len(training.batches)]
            assert_equal_histories(got, expected)


def test_float32_trains_as_eager_does():
    model, reference = mlp(), mlp()
    reference.load_state_dict(model.state_dict())
    optimizer = sgd(reference.parameters())
    fn = gimli.functionalize(model, sgd(model.parameters()), squared_error)
    state = fn.init()
    for x, y in regression(3):
        optimizer.zero_grad()
        squared_error(reference, (x.float(), y.float())).backward()
        optimizer.step()
        state, _ = fn.step(state, (x.float(), y.float()))
        assert_equal_tensors(state.params, dict(reference.named_parameters()), tolerance=5e-7)
