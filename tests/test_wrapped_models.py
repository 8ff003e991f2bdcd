"""Models inside what torch makes of them: compiled, scripted, traced, exported, replicated, lazily initialized."""

import pytest
import torch
from live_training import Training, check_gradients, check_values, regression, sgd, squared_error
from torch import nn

import gimli_compile as gimli

HYPERS = ("groups.0.lr", "groups.0.momentum")
# torch says so itself whenever these are called
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported):DeprecationWarning"),
]


class Block(nn.Module):
    """Batch normalization, a loop, and a branch on the training flag."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        for _ in range(2):
            h = h + torch.sin(h)
        return self.last(h) if self.training else self.last(h) * 2.0


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.drop = nn.Linear(3, 2), nn.Dropout(0.4)

    def forward(self, x):
        return self.drop(torch.tanh(self.first(x)))


class Detaching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2)

    def forward(self, x):
        h = self.first(x)
        return h * h.detach()


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, nn.Linear(2, 2)

    def forward(self, x):
        return self.out(self.inner(x))


class CompiledForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    @torch.compile(backend="aot_eager")
    def forward(self, x):
        return torch.tanh(self.layer(x))


def compiled_in_place():
    model = Block()
    model.compile(backend="aot_eager")
    return model


def lazy():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    model(torch.zeros(1, 3))
    return model


def plain():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def evaluating():
    return torch.jit.script(Block()).eval()


MODELS = {
    "compiled": lambda: torch.compile(Block(), backend="aot_eager"),
    "compiled_part": lambda: Outer(torch.compile(Block(), backend="aot_eager")),
    "compiled_in_place": compiled_in_place,
    "compiled_forward": CompiledForward,
    "scripted": lambda: torch.jit.script(Block()),
    "scripted_part": lambda: Outer(torch.jit.script(Block())),
    "scripted_dropout": lambda: torch.jit.script(Noisy()),
    "evaluating": evaluating,
    "traced": lambda: torch.jit.trace(plain().double(), torch.ones(5, 3, dtype=torch.float64)),
    "symbolically_traced": lambda: torch.fx.symbolic_trace(Block()),
    "data_parallel": lambda: nn.DataParallel(Block()),
    "lazy": lazy,
}


def training(name):
    return Training(MODELS[name], sgd, squared_error, regression(3))


@pytest.mark.parametrize("name", MODELS)
def test_values_equal_the_live_loop(name):
    check_values(training(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(training(name), HYPERS)


def test_a_scripted_model_follows_train_and_eval():
    model, _, fn = training("scripted").functionalized()
    state, x = fn.init(), regression(1)[0][0]
    for mode in (True, False, True):
        model.train(mode)
        out, _ = fn.forward(state.params, state.buffers, x)
        assert torch.allclose(out, model(x), rtol=1e-12)
        state.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def test_a_scripted_module_keeps_its_tensors():
    model, _, fn = training("scripted_part").functionalized()
    before = {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    fn.step(fn.init(), regression(1)[0])
    assert before == {name: id(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: Outer(torch.jit.script(model))])
def test_scripted_code_that_detaches_is_refused(make):
    model = make(Detaching()).double()
    with pytest.raises(gimli.InputError, match="`Detaching` calls `detach`"):
        gimli.functionalize(model, sgd(model.parameters()), squared_error)
