"""The yardstick for whole training loops: the live eager loop, finite differences of it, and loops written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from eager_reference import finite_difference, get_number, hyper_leaves, relative_error, set_number
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

import gimli_compile as gimli

VALUES = 1e-12
GRADIENTS = 1e-6


@dataclass(frozen=True)
class Training:
    """A training loop that can be made anew: the model, its optimizer, the loss and the batches, in float64.

    The loss takes `meta` if there is one. `seed` is that of the draws of the loop. `step` takes one live step of the
    optimizer along what `evaluate` returns, and returns the loss before it; `train_step` is given to `functionalize` in
    place of the loss; `options` are further ones of it.
    """

    model: Callable[[], Any]
    optimizer: Any
    loss: Any
    batches: list[Any]
    meta: Any = None
    seed: int = 3
    prepare: Callable[[torch.nn.Module], Any] = field(default=lambda model: None)
    step: Any = None
    train_step: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def start(self) -> tuple[Any, Any]:
        """Returns the model and the optimizer, always with the same values."""
        torch.manual_seed(1)
        model = self.model().double()
        self.prepare(model)
        return model, self.optimizer(model.parameters())

    def loss_of(self, model, batch, meta):
        return self.loss(model, batch) if self.meta is None else self.loss(model, batch, meta)

    def functionalized(self):
        """Returns the live objects and what `functionalize` makes of them."""
        model, optimizer = self.start()
        return model, optimizer, self.functionalize(model, optimizer)

    def functionalize(self, model, optimizer):
        """Functionalizes with the loss or the train step."""
        if self.train_step is not None:
            return gimli.functionalize(model, optimizer, train_step=self.train_step, **self.options)
        return gimli.functionalize(model, optimizer, self.loss, **self.options)


def sgd(params):
    return torch.optim.SGD(params, lr=0.07, momentum=0.8, weight_decay=0.02)


def plain_sgd(params):
    return torch.optim.SGD(params, lr=0.07)


def adamw(params):
    """AdamW with an eps that keeps its step smooth on the scale of finite differences."""
    return torch.optim.AdamW(params, lr=0.03, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.05)


OPTIMIZERS = {"sgd": sgd, "adamw": adamw}


# ---------------------------------------------------------------------- the live loop


@dataclass(frozen=True)
class History:
    """What a loop went through: parameters and buffers after each step, the loss before it."""

    params: list[dict[str, torch.Tensor]]
    buffers: list[dict[str, torch.Tensor]]
    losses: list[torch.Tensor]


def copied(named):
    return {name: tensor.detach().clone() for name, tensor in named}


def live_step(training, model, optimizer, batch, meta):
    """Takes one step of the live loop; buffers that are to stay are put back by hand."""
    before = copied(model.named_buffers()) if training.options.get("buffers") == "freeze" else {}
    loss = _live_step(training, model, optimizer, batch, meta)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before.get(name, buffer))
    return loss


def _live_step(training, model, optimizer, batch, meta):
    if training.train_step is not None:
        arguments = (model, optimizer, batch) if training.meta is None else (model, optimizer, batch, meta)
        return training.train_step(*arguments).detach().clone()
    if training.step is not None:
        return training.step(optimizer, lambda: training.loss_of(model, batch, meta)).detach().clone()
    optimizer.zero_grad()
    loss = training.loss_of(model, batch, meta)
    loss.backward()
    optimizer.step()
    return loss.detach().clone()


def run_live(training, change=lambda model, optimizer: None, meta=None, batches=None):
    """Runs the live eager loop on new objects, which `change` may change first."""
    model, optimizer = training.start()
    with torch.no_grad():
        change(model, optimizer)
    return continue_live(training, model, optimizer, meta, batches)


def continue_live(training, model, optimizer, meta=None, batches=None):
    """Runs the live eager loop on these objects."""
    history = History([], [], [])
    torch.manual_seed(training.seed)
    for batch in training.batches if batches is None else batches:
        history.losses.append(live_step(training, model, optimizer, batch, training.meta if meta is None else meta))
        history.params.append(copied(model.named_parameters()))
        history.buffers.append(copied(model.named_buffers()))
    return history


def run_steps(training, fn, state, hyper=None, meta=None, batches=None):
    """Runs the functional loop by `step`."""
    history = History([], [], [])
    torch.manual_seed(training.seed)
    for batch in training.batches if batches is None else batches:
        state, loss = fn.step(state, batch, hyper, training.meta if meta is None else meta)
        history.losses.append(loss)
        history.params.append(state.params)
        history.buffers.append(state.buffers)
    return history


def assert_equal_tensors(got, expected, tolerance=VALUES):
    """Compares dicts of tensors: the same names, dtypes, shapes, and values up to a relative error."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        error = relative_error(got[name], value)
        assert error <= tolerance, f"{name} is off by {error:.1e}"


def assert_equal_histories(got, expected, tolerance=VALUES):
    for t, loss in enumerate(expected.losses):
        assert_equal_tensors({"loss": got.losses[t]}, {"loss": loss}, tolerance)
        assert_equal_tensors(got.params[t], expected.params[t], tolerance)
        assert_equal_tensors(got.buffers[t], expected.buffers[t], tolerance)


# ---------------------------------------------------------------------- nothing live changes


class Untouched:
    """Everything that capture must leave alone, as it was when this was made."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.before = self._look()
        self.random = torch.get_rng_state()

    def _look(self):
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        each = pytree.tree_leaves(self.optimizer)
        state = [one.state_dict() for one in each if hasattr(one, "state_dict")]
        state = pytree.tree_map_only(torch.nn.Module, lambda module: (id(module), module.state_dict()), state)
        return {
            "ids": {name: id(tensor) for name, tensor in tensors.items()},
            "values": copied(tensors.items()),
            "grads": {name: None if t.grad is None else t.grad.clone() for name, t in tensors.items()},
            "requires": {name: t.requires_grad for name, t in tensors.items()},
            "attributes": [(id(m), m.training, sorted(vars(m))) for m in self.model.modules()],
            "optimizer": copy.deepcopy(state),
        }

    def check(self):
        """Compares everything bit for bit."""
        now = self._look()
        for key in ("ids", "requires", "attributes"):
            assert now[key] == self.before[key], key
        for key in ("values", "grads", "optimizer"):
            flat, structure = pytree.tree_flatten(now[key])
            flat_before, structure_before = pytree.tree_flatten(self.before[key])
            assert structure == structure_before, key
            for value, before in zip(flat, flat_before, strict=True):
                same = torch.equal(value, before) if isinstance(value, torch.Tensor) else value == before
                assert same, key


def assert_still_trains(training, model, optimizer):
    """The live objects train on as if nothing had happened."""
    assert_equal_histories(continue_live(training, model, optimizer), run_live(training), tolerance=0.0)


# ---------------------------------------------------------------------- values


def check_values(training):
    """`step` equals the live eager loop at every step, and nothing live is changed by it."""
    expected = run_live(training)
    model, optimizer = training.start()
    untouched = Untouched(model, optimizer)
    fn = training.functionalize(model, optimizer)
    state = fn.init()
    untouched.check()
    got = run_steps(training, fn, state)
    untouched.check()
    assert_equal_histories(got, expected)
    assert_equal_histories(run_steps(training, fn, fn.init()), expected)  # from the captured programs alone
    return fn


# ---------------------------------------------------------------------- gradients


def random_like(tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def random_directions(tree, seed):
    """Returns a pytree of random tensors for the floating tensors of a pytree, 0 for everything else."""
    leaves, structure = pytree.tree_flatten(tree)
    made = [random_like(leaf, seed + i) if is_floating(leaf) else 0 for i, leaf in enumerate(leaves)]
    return pytree.tree_unflatten(made, structure)


def is_floating(leaf):
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def moved(tree, along, offset):
    """Returns a pytree moved by `offset` in a direction."""
    return pytree.tree_map(lambda leaf, way: leaf.detach() + offset * way if is_floating(leaf) else leaf, tree, along)


def objective(params, losses) -> Any:
    """A random projection of the last parameters and of the losses of all steps."""
    total = 0.0
    for index, value in enumerate(params.values()):
        total = total + (random_like(value, 100 + index) * value).sum()
    for index, loss in enumerate(losses):
        total = total + (1.0 + 0.5 * index) * loss
    return total


def live_objective(training, **options):
    history = run_live(training, **options)
    return float(objective(history.params[-1], history.losses))


def unrolled_objective(training, fn, state, hyper, meta, batches, **options):
    torch.manual_seed(training.seed)
    state, losses = fn.unroll(state, batches, hyper, meta, **options)
    return objective(state.params, losses)


@dataclass(frozen=True)
class Inputs:
    """Leaves to differentiate an unroll with respect to."""

    state: Any
    hyper: Any
    meta: Any
    batches: Any

    def named(self):
        """Returns the floating leaves by name."""
        found = {f"params.{name}": value for name, value in self.state.params.items()}
        found.update({f"hyper.{path}": leaf for path, leaf in hyper_leaves(self.hyper).items()})
        found.update({f"meta.{i}": leaf for i, leaf in enumerate(pytree.tree_leaves(self.meta)) if is_floating(leaf)})
        leaves = enumerate(pytree.tree_leaves(self.batches))
        found.update({f"batches.{i}": leaf for i, leaf in leaves if is_floating(leaf)})
        return found


def differentiable_inputs(training, fn):
    """Returns copies of everything that an unroll starts from, all of it requiring a gradient."""
    meta, batches = pytree.tree_map(
        lambda leaf: leaf.detach().clone() if is_floating(leaf) else leaf, (training.meta, training.batches)
    )
    inputs = Inputs(fn.init(), fn.hyperparameters(), meta, batches)
    for leaf in inputs.named().values():
        leaf.requires_grad_()
    return inputs


def unrolled_gradients(training, fn, *, create_graph=False, **options):
    """Returns the inputs of an unroll and the gradient of its objective in each of them, by name (zeros for none)."""
    inputs = differentiable_inputs(training, fn)
    total = unrolled_objective(training, fn, inputs.state, inputs.hyper, inputs.meta, inputs.batches, **options)
    named = inputs.named()
    grads = torch.autograd.grad(
        total, list(named.values()), allow_unused=True, materialize_grads=True, create_graph=create_graph
    )
    return inputs, dict(zip(named, grads, strict=True))


def check_recomputation_and_tasks(training):
    """Steps that are computed again have the same gradients, bit for bit; tasks have the values of loops of their own."""
    fn = training.functionalized()[2]
    _, stored = unrolled_gradients(training, fn)
    _, recomputed = unrolled_gradients(training, fn, checkpoint=2)
    assert_equal_tensors(recomputed, stored)
    many = [tuple(torch.stack([part, 0.5 * part + 0.1]) for part in batch) for batch in training.batches]
    state, _ = fn.unroll(fn.init(), many, tasks=True)
    for task in range(2):
        expected = run_live(training, batches=[tuple(part[task] for part in batch) for batch in many])
        assert_equal_tensors({n: p[task] for n, p in state.params.items()}, expected.params[-1])


def check_gradients(training, hypers=(), skip=(), fn=None, batch=True, **options):
    """The gradients of `unroll` equal central differences of the live eager loop.

    They are checked along one random direction each for parameters, meta and batches, and for every number in `hypers`.
    """
    fn = training.functionalized()[2] if fn is None else fn
    inputs, grads = unrolled_gradients(training, fn, **options)
    errors = {path: hyper_error(training, path, grads) for path in hypers}
    if "params" not in skip:
        errors["params"] = params_error(training, inputs, grads)
    if training.meta is not None and "meta" not in skip:
        errors["meta"] = tree_error(training, "meta", grads)
    if batch and "batches" not in skip and any(name.startswith("batches") for name in grads):
        errors["batches"] = tree_error(training, "batches", grads)
    worst = {name: error for name, error in errors.items() if not error <= GRADIENTS}
    assert not worst, worst


def slope_error(slope, function, scale=0.1):
    expected = finite_difference(function, scale, lowest=5e-6 * scale)
    return abs(slope - expected) / max(abs(slope), abs(expected), 1e-3)


def hyper_error(training, path, grads):
    base = hyper_value(training, path)

    def function(offset):
        return live_objective(training, change=lambda _, optimizer: set_number(optimizer, path, base + offset))

    room = 1 - base if 0.5 < base < 1 else max(abs(base), 1e-3)
    return slope_error(float(grads[f"hyper.{path}"]), function, room)


def hyper_value(training, path):
    return get_number(training.start()[1], path)


def params_error(training, inputs, grads):
    along = {name: random_like(value, 200 + i) for i, (name, value) in enumerate(inputs.state.params.items())}
    slope = sum(float((grads[f"params.{name}"] * way).sum()) for name, way in along.items())

    def function(offset):
        def change(model, _):
            for name, parameter in model.named_parameters():
                parameter.add_(offset * along[name])

        return live_objective(training, change=change)

    return slope_error(slope, function)


def tree_error(training, what, grads):
    tree = getattr(training, what)
    along = random_directions(tree, 300)
    ways = enumerate(pytree.tree_leaves(along))
    slope = sum(float((grads[f"{what}.{i}"] * way).sum()) for i, way in ways if isinstance(way, torch.Tensor))

    def function(offset):
        return live_objective(training, **{what: moved(tree, along, offset)})

    return slope_error(slope, function)


# ---------------------------------------------------------------------- loops written by hand


def sgd_by_hand(
    training, params, batches, meta, *, lr, momentum=0.0, weight_decay=0.0, truncate=None, order=2, trained=None
):
    """Trains with SGD in plain tensor arithmetic and `create_graph`; returns the last parameters and the losses.

    `lr` is a number, a tensor, or a dict with one for each parameter.
    """
    model, _ = training.start()
    buffers = copied(model.named_buffers())
    trained = [name for name, p in model.named_parameters() if p.requires_grad] if trained is None else trained
    rates = lr if isinstance(lr, dict) else dict.fromkeys(params, lr)
    params, velocity, losses = dict(params), {}, []
    torch.manual_seed(training.seed)
    for index, batch in enumerate(batches):
        if truncate is not None and index == len(batches) - truncate:
            params = {name: p.detach().requires_grad_() for name, p in params.items()}
            velocity = {name: v.detach() for name, v in velocity.items()}
            losses = [loss.detach() for loss in losses]
        params = {
            name: p if p.requires_grad else p.detach().requires_grad_(name in trained) for name, p in params.items()
        }
        with _reparametrize_module(model, {**params, **buffers}, tie_weights=True):
            loss = training.loss_of(model, batch, meta)
        grads = torch.autograd.grad(
            loss, [params[n] for n in trained], create_graph=order == 2, retain_graph=True, allow_unused=True
        )
        for name, grad in zip(trained, grads, strict=True):
            if grad is not None:
                grad = grad + weight_decay * params[name]
                velocity[name] = momentum * velocity[name] + grad if name in velocity else grad
                params[name] = params[name] - rates[name] * velocity[name]
        losses.append(loss)
    return params, losses


def gradients_by_hand(training, fn, **options):
    """Returns the gradients of the objective by `sgd_by_hand`, named as `unrolled_gradients` names them."""
    inputs = differentiable_inputs(training, fn)
    group = inputs.hyper[0]
    params, losses = sgd_by_hand(
        training,
        inputs.state.params,
        inputs.batches,
        inputs.meta,
        lr=group["lr"],
        momentum=group["momentum"],
        weight_decay=group["weight_decay"],
        **options,
    )
    unused = ("hyper.groups.0.dampening",)
    wanted = {name: leaf for name, leaf in inputs.named().items() if name not in unused}
    total = objective(params, losses)
    grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, grads, strict=True))


def check_against_hand(training, fn=None, tolerance=1e-10, hand=None, **options):
    """The gradients of `unroll` equal those of the loop written by hand."""
    fn = training.functionalized()[2] if fn is None else fn
    _, got = unrolled_gradients(training, fn, **options)
    expected = gradients_by_hand(training, fn, **({} if hand is None else hand))
    assert_close_gradients({name: got[name] for name in expected}, expected, tolerance)


def assert_close_gradients(got, expected, tolerance=1e-10):
    """Compares gradients by name, each relative to the largest of all that share its first word."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        kind = name.split(".")[0]
        scale = max(float(v.abs().max()) for n, v in expected.items() if n.split(".")[0] == kind and v.numel())
        error = float((got[name] - value).abs().max()) / max(scale, 1e-12)
        assert error <= tolerance, f"{name} is off by {error:.1e} of {scale:.1e}"


# ---------------------------------------------------------------------- data


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def regression(steps, *, size=5, inputs=3, outputs=2):
    """Returns batches of inputs and targets."""
    return [(normal(size, inputs, seed=2 * t), normal(size, outputs, seed=2 * t + 1)) for t in range(steps)]


def images(steps, *, size=4, channels=1, side=6, classes=2):
    """Returns batches of images and labels."""
    made = []
    for t in range(steps):
        labels = torch.arange(size) % classes
        made.append((normal(size, channels, side, side, seed=t), labels))
    return made


def tokens(steps, *, size=3, length=4, vocabulary=6):
    """Returns batches of token sequences."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocabulary, (size, length), generator=generator) for _ in range(steps)]


def squared_error(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def train_step(model, optimizer, batch):
    """A whole step on the squared error."""
    optimizer.zero_grad()
    loss = squared_error(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def with_optimizer(training, optimizer):
    return replace(training, optimizer=optimizer)
