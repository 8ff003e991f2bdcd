"""Sparse gradients: look-ups in tables, and optimizers that write only the rows that were looked up."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_reference import central, relative_error
from torch import nn

import gimli_compile as gimli

ROWS, WIDTH = 7, 3


@pytest.fixture(autouse=True)
def checked_sparse_tensors():
    """Lets torch check every sparse tensor; it warns where nobody says whether it should."""
    with torch.sparse.check_sparse_tensor_invariants():
        yield


class Table(nn.Module):
    """A look-up, with a row for padding; `extra` adds a layer with a dense gradient."""

    def __init__(self, extra=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True, dtype=torch.float64, **options)
        self.head = nn.Linear(WIDTH, 1, dtype=torch.float64) if extra else None
        self.direction: Any = nn.Buffer(torch.randn(WIDTH, dtype=torch.float64))

    def looked_up(self, indices):
        return self.table(indices).sum(-2)

    def forward(self, indices):
        hidden = torch.tanh(self.looked_up(indices))
        return hidden @ self.direction if self.head is None else self.head(hidden).squeeze(-1)


class Twice(Table):
    """Two look-ups, whose sparse gradients are added."""

    def looked_up(self, indices):
        return self.table(indices[..., 0]) * self.table(indices[..., 1])


class Scaled(Table):
    """A look-up in what is computed from the parameter."""

    def looked_up(self, indices):
        return F.embedding(indices, self.table.weight * 2, sparse=True).sum(-2)


class Tied(Table):
    """The table is also used as a matrix: its gradient is dense."""

    def looked_up(self, indices):
        return super().looked_up(indices) @ self.table.weight.t() @ self.table.weight / 10


class Gathered(Table):
    """A gather whose gradient has entries for single elements."""

    def looked_up(self, indices):
        return torch.gather(self.table.weight, 0, indices.flatten()[:6].reshape(2, 3), sparse_grad=True)


class Bag(Table):
    """A bag for each row of the batch."""

    def __init__(self, extra=False, sparse=True, **options):
        super().__init__(extra)
        self.table = nn.EmbeddingBag(ROWS, WIDTH, sparse=sparse, dtype=torch.float64, **options)

    def looked_up(self, indices):
        return self.table(indices)


class WeightedBag(Bag):
    """Bags of different sizes, given by offsets, with a weight for each entry."""

    def looked_up(self, indices):
        flat = indices.flatten()
        weights = (flat + 1).to(torch.float64) / 4
        return self.table(flat, torch.tensor([0, 1, 1, 4]), per_sample_weights=weights)


MODELS = {
    "table": lambda: Table(),
    "padding": lambda: Table(padding_idx=2),
    "twice": lambda: Twice(),
    "scaled": lambda: Scaled(),
    "gathered": lambda: Gathered(),
    "sum": lambda: Bag(mode="sum", padding_idx=2),
    "mean": lambda: Bag(mode="mean"),
    "weighted": lambda: WeightedBag(mode="sum"),
    "head": lambda: Table(extra=True),
    "tied": lambda: Tied(),
}
OPTIMIZERS: dict[str, Any] = {
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
    "SparseAdam, maximize": lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, maximize=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.05, eps=1e-3),
}
PAIRS = [(m, o) for m in MODELS for o in OPTIMIZERS if m not in ("head", "tied") or not o.startswith("Sparse")]


def loss_fn(model, batch, meta):
    return (meta["scale"] * (model(batch) - meta["target"])).square().sum()


def meta_of(scale=1.0):
    return {"scale": torch.tensor(scale, dtype=torch.float64), "target": torch.tensor(0.3, dtype=torch.float64)}


def batches(count, seed=1):
    """Returns batches with repeated indices, each of a few of the rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ROWS, (count, 4, 2), generator=generator)


def live(make_model, make_optimizer, steps, prepare=lambda model, optimizer: None, scale=1.0):
    """Trains eagerly and returns the model after each step."""
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    with torch.no_grad():
        prepare(model, optimizer)
    history = []
    for batch in steps:
        optimizer.zero_grad()
        loss_fn(model, batch, meta_of(scale)).backward()
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


def functionalized(make_model, make_optimizer):
    model = make_model()
    return gimli.functionalize(model, make_optimizer(model.parameters()), loss_fn)


def total(params):
    return torch.stack([(index + 1) * value.square().sum() for index, value in enumerate(params.values())]).sum()


@pytest.mark.parametrize(("model", "optimizer"), PAIRS)
def test_values_equal_eager(model, optimizer):
    steps = batches(8)
    expected = live(MODELS[model], OPTIMIZERS[optimizer], steps)
    fn = functionalized(MODELS[model], OPTIMIZERS[optimizer])
    state = fn.init()
    for batch, params in zip(steps, expected, strict=True):
        state, _ = fn.step(state, batch, None, meta_of())
        for name, value in params.items():
            assert relative_error(state.params[name], value) < 1e-12


@pytest.mark.parametrize(("model", "optimizer"), PAIRS)
def test_derivatives_equal_finite_differences(model, optimizer):
    steps = batches(5)
    fn = functionalized(MODELS[model], OPTIMIZERS[optimizer])
    state, hyper, meta = fn.init(), fn.hyperparameters(), meta_of()
    leaves = {name: leaf.requires_grad_() for name, leaf in {**numbers_of(hyper), "scale": meta["scale"]}.items()}
    params = {name: value.requires_grad_() for name, value in state.params.items()}
    final, _ = fn.unroll(state, steps, hyper, meta)
    got = torch.autograd.grad(total(final.params), [*leaves.values(), *params.values()])
    along = {name: torch.linspace(-1, 1, value.numel()).reshape(value.shape) for name, value in params.items()}
    if model in ("padding", "sum"):
        along["table.weight"][2] = 0  # the layer stops the gradient there

    def trained(prepare=lambda model, optimizer: None, scale=1.0):
        return float(total(live(MODELS[model], OPTIMIZERS[optimizer], steps, prepare, scale)[-1]))

    for (name, leaf), value in zip(leaves.items(), got, strict=False):
        base = float(leaf.detach())

        def moved(offset, name=name, base=base):
            if name == "scale":
                return trained(scale=base + offset)
            return trained(lambda model, optimizer: set_number(optimizer, name, base + offset))

        assert float(value) == pytest.approx(central(moved, 1e-4 * base), rel=1e-6, abs=1e-7), name

    def moved_params(offset):
        def prepare(model, optimizer):
            for name, value in model.named_parameters():
                value += offset * along[name]

        return trained(prepare)

    projected = sum(float((g * along[n]).sum()) for n, g in zip(params, got[len(leaves) :], strict=True))
    assert projected == pytest.approx(central(moved_params, 1e-4), rel=1e-6)


def numbers_of(hyper):
    found = {name: hyper[0][name] for name in ("lr", "eps") if name in hyper[0]}
    return {**found, **{f"betas.{index}": beta for index, beta in enumerate(hyper[0].get("betas", ()))}}


def set_number(optimizer, name, value):
    group = optimizer.param_groups[0]
    if name.startswith("betas"):
        betas = list(group["betas"])
        betas[int(name[-1])] = value
        group["betas"] = tuple(betas)
    else:
        group[name] = value


# ---------------------------------------------------------------------- what an update takes and leaves


def test_an_update_takes_the_gradient_of_a_backward_pass():
    make = OPTIMIZERS["SparseAdam"]
    model = Table()
    optimizer = make(model.parameters())
    fn = gimli.functionalize(model, optimizer)
    state = fn.init()
    params, opt_state = state.params, state.opt_state
    for batch in batches(8):
        optimizer.zero_grad()
        loss_fn(model, batch, meta_of()).backward()
        grad = model.table.weight.grad
        assert grad is not None
        assert grad.is_sparse
        assert not grad.is_coalesced()
        params, opt_state = fn.update(params, {"table.weight": grad}, opt_state)
        optimizer.step()
        assert relative_error(params["table.weight"], model.table.weight) < 1e-12
    live_state = optimizer.state[model.table.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert relative_error(opt_state[f"table.weight.{key}"], live_state[key]) < 1e-12


def test_derivatives_in_the_entries_of_a_sparse_gradient():
    fn = functionalized(MODELS["table"], OPTIMIZERS["SparseAdam"])
    state = fn.init()
    indices = torch.tensor([[4, 1, 4, 6]])
    entries = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)

    def updated(entries):
        params, opt_state = state.params, state.opt_state
        for factor in (1.0, -0.7, 2.0):
            grad = torch.sparse_coo_tensor(indices, factor * entries, (ROWS, WIDTH), check_invariants=True)
            params, opt_state = fn.update(params, {"table.weight": grad}, opt_state)
        return total(params)

    leaf = entries.clone().requires_grad_()
    (got,) = torch.autograd.grad(updated(leaf), leaf)
    for place in ((0, 0), (1, 2), (2, 1), (3, 0)):

        def moved(offset, place=place):
            changed = entries.clone()
            changed[place] += offset
            return float(updated(changed))

        assert float(got[place]) == pytest.approx(central(moved, 1e-4), rel=1e-6)


def test_rows_that_were_not_looked_up_stay_as_they_are():
    fn = functionalized(MODELS["table"], OPTIMIZERS["SparseAdam"])
    state = fn.init()
    state, _ = fn.step(state, torch.tensor([[0, 1], [1, 2]]), None, meta_of())
    after, _ = fn.step(state, torch.tensor([[2, 3], [3, 3]]), None, meta_of())
    untouched = [0, 1, 4, 5, 6]
    for name in ("exp_avg", "exp_avg_sq"):
        path = f"table.weight.{name}"
        assert torch.equal(after.opt_state[path][untouched], state.opt_state[path][untouched])
        assert bool(state.opt_state[path][:3].any(1).all())
    assert torch.equal(after.params["table.weight"][untouched], state.params["table.weight"][untouched])
    assert not torch.equal(after.params["table.weight"][2:4], state.params["table.weight"][2:4])


def test_a_batch_of_padding_alone():
    steps = torch.stack([torch.full((4, 2), 2), *batches(3), torch.full((4, 2), 2)])
    expected = live(MODELS["padding"], OPTIMIZERS["SparseAdam"], steps)
    fn = functionalized(MODELS["padding"], OPTIMIZERS["SparseAdam"])
    final, _ = fn.unroll(fn.init(), steps, None, meta_of())
    assert relative_error(final.params["table.weight"], expected[-1]["table.weight"]) < 1e-12


@pytest.mark.parametrize("optimizer", ["SparseAdam", "Adagrad", "SGD, momentum"])
def test_a_live_optimizer_goes_on_from_the_state(optimizer):
    """From the middle of training, and back into it."""
    steps = batches(9)
    model = Table()
    live_optimizer = OPTIMIZERS[optimizer](model.parameters())

    def train(steps):
        for batch in steps:
            live_optimizer.zero_grad()
            loss_fn(model, batch, meta_of()).backward()
            live_optimizer.step()

    train(steps[:3])
    fn = gimli.functionalize(model, live_optimizer, loss_fn)
    state, _ = fn.unroll(fn.init(), steps[3:6], None, meta_of())
    fn.load_into(model, live_optimizer, state)
    train(steps[6:])
    expected = live(MODELS["table"], OPTIMIZERS[optimizer], steps)[-1]
    assert relative_error(model.table.weight, expected["table.weight"]) < 1e-12


# ---------------------------------------------------------------------- loops


@pytest.mark.parametrize("model", ["padding", "sum"])
def test_every_task_has_rows_of_its_own(model):
    fn = functionalized(MODELS[model], OPTIMIZERS["SparseAdam"])
    tasks = torch.stack([batches(4, seed) for seed in range(3)])
    hyper, alone = fn.hyperparameters(), fn.hyperparameters()
    lr, alone_lr = hyper[0]["lr"].requires_grad_(), alone[0]["lr"].requires_grad_()
    together, losses = fn.unroll(fn.init(), tasks, hyper, meta_of(), tasks=True)
    single = [fn.unroll(fn.init(), task, alone, meta_of()) for task in tasks]
    for name, value in together.params.items():
        expected = torch.stack([state.params[name] for state, _ in single])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    (got,) = torch.autograd.grad(losses.sum(), lr)
    (expected,) = torch.autograd.grad(torch.stack([loss.sum() for _, loss in single]).sum(), alone_lr)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_checkpoints_and_the_first_order_form():
    fn = functionalized(MODELS["table"], OPTIMIZERS["SparseAdam"])
    found = []
    choices: list[dict[str, Any]] = [{}, {"checkpoint": 2}, {"order": 1}]
    for options in choices:
        hyper = fn.hyperparameters()
        lr = hyper[0]["lr"].requires_grad_()
        final, _ = fn.unroll(fn.init(), batches(5), hyper, meta_of(), **options)
        (got,) = torch.autograd.grad(total(final.params), lr)
        found.append((final.params["table.weight"].detach(), got))
    assert all(torch.equal(params, found[0][0]) for params, _ in found)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=0)
    assert float(found[2][1]) != pytest.approx(float(found[0][1]), rel=1e-3)


def test_the_programs_can_be_looked_at():
    fn = functionalized(MODELS["table"], OPTIMIZERS["SparseAdam"])
    fn.step(fn.init(), batches(1)[0], None, meta_of())
    assert "rows_table_weight" in str(fn.programs["update"])
    assert "    rows_table_weight," not in str(fn.programs["step"])
    assert "index_put" not in str(fn.programs["update"])
    hyper = fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    assert fn.requirements(hyper, meta_of(), batch=batches(1)[0]).holds
    assert "Ne(rows_table_weight, 0)" in str(fn.update_rule())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_with_dense_gradients_have_second_derivatives(mode):
    def make():
        return Bag(mode=mode, sparse=False)

    steps = batches(4)
    fn = functionalized(make, OPTIMIZERS["SGD"])
    hyper = fn.hyperparameters()
    lr = hyper[0]["lr"].requires_grad_()
    final, _ = fn.unroll(fn.init(), steps, hyper, meta_of())
    (got,) = torch.autograd.grad(total(final.params), lr)

    def trained(offset):
        def prepare(model, optimizer):
            optimizer.param_groups[0]["lr"] += offset

        return float(total(live(make, OPTIMIZERS["SGD"], steps, prepare)[-1]))

    assert float(got) == pytest.approx(central(trained, 1e-4), rel=1e-6)


# ---------------------------------------------------------------------- what is refused


class Reading(torch.optim.Optimizer):
    """Calls a function of the sparse gradient."""

    def __init__(self, params, read):
        super().__init__(params, {"lr": 0.1})
        self.read = read

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad.is_sparse:
                    p.add_(self.read(p.grad), alpha=-group["lr"])


def entry_wise(grad):
    return torch.sparse_coo_tensor(grad._indices(), grad._values() ** 3, grad.shape)  # entry by entry


def product(grad):
    return torch.sparse.mm(grad, torch.eye(WIDTH, dtype=grad.dtype))  # the product


@pytest.mark.parametrize(
    ("read", "what", "line"),
    [
        (entry_wise, "entries of a sparse gradient are read one by one", "# entry by entry"),
        (product, "is called on a sparse gradient", "# the product"),
    ],
)
def test_what_has_no_form_for_rows_is_refused(read, what, line):
    fn = functionalized(MODELS["table"], lambda params: Reading(params, read))
    with pytest.raises(gimli.CaptureError, match=rf"{what}\n  .*{line}[\s\S]*sparse=False"):
        fn.step(fn.init(), batches(1)[0], None, meta_of())


def test_a_sparse_state_that_is_added_to_a_sparse_gradient_is_refused():
    fn = functionalized(MODELS["table"], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))
    with pytest.raises(gimli.CaptureError, match=r"is called on a sparse gradient[\s\S]*sparse=False"):
        fn.step(fn.init(), batches(1)[0], None, meta_of())


def scaled(grad):
    return -2 * grad / 3 + grad.coalesce() * grad.coalesce().values().abs().max()


def clipped(grad):
    grad = grad.coalesce()
    grad.values().clamp_(-0.1, 0.1)
    return grad


def limited(grad):
    grad = grad.coalesce()
    if grad._nnz() > 3:
        return grad * 0.5
    return torch.sparse_coo_tensor(grad.indices(), F.normalize(grad.values()), grad.shape)


def test_a_model_that_changes_its_parameter_is_refused():
    fn = functionalized(lambda: Table(max_norm=1.0), OPTIMIZERS["SparseAdam"])
    with pytest.raises(
        gimli.CaptureError, match=r"changes its parameter 'table\.weight' in place \(`embedding_renorm_`"
    ):
        fn.step(fn.init(), batches(1)[0], None, meta_of())


@pytest.mark.parametrize("read", [scaled, clipped, limited])
def test_other_code_on_sparse_gradients(read):
    steps = batches(8)

    def make(params):
        return Reading(params, read)

    expected = live(MODELS["table"], make, steps)[-1]
    fn = functionalized(MODELS["table"], make)
    final, _ = fn.unroll(fn.init(), steps, None, meta_of())
    assert relative_error(final.params["table.weight"], expected["table.weight"]) < 1e-12
