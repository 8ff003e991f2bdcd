"""In-place operators and views become values."""

import random
from typing import ClassVar

import pytest
import torch
from expecttest import assert_expected_inline
from recorded import assert_same, call, derivatives, eager, record, text
from torch.overrides import TorchFunctionMode

from gimli_compile.errors import CaptureError
from gimli_compile.passes.mutation import functionalize
from gimli_compile.recording import Region

X = 0.5 + torch.arange(16, dtype=torch.float64).reshape(4, 4) / 8  # sums of products are exact, in any order
Y = torch.arange(16, dtype=torch.float64).reshape(4, 4) / 8 - 0.9375
COLUMN = 1 + torch.arange(4, dtype=torch.float64).reshape(4, 1) / 4


def _select_each(tensor, dim=0):
    return [tensor.select(dim, index) for index in range(tensor.shape[dim])]


def _narrow_each(tensor, sizes, dim=0):
    length = tensor.shape[dim]
    sizes = [min(sizes, length - at) for at in range(0, length, sizes)] if isinstance(sizes, int) else sizes
    return [tensor.narrow(dim, sum(sizes[:index]), size) for index, size in enumerate(sizes)]


class OneViewAtATime(TorchFunctionMode):
    """Takes parts of tensors one by one: autograd refuses writes through views that come in lists."""

    parts: ClassVar = {
        torch.Tensor.unbind: _select_each,
        torch.Tensor.split: _narrow_each,
        torch.Tensor.split_with_sizes: _narrow_each,
        torch.Tensor.chunk: lambda tensor, count: _narrow_each(tensor, -(-tensor.shape[0] // count)),
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.parts.get(func, func)(*args, **(kwargs or {}))


@pytest.fixture
def check(check_pass):
    """Checks the pass on one function, against the function itself run by eager autograd on other values."""

    def check_function(function, *, same_derivatives=True, tolerance=1e-12, **tensors):
        program = record(function, tensors)
        made = functionalize(program)
        assert made.stage == "functional"
        assert not any(node.target._schema.is_mutable for node in made.graph.nodes if hasattr(node.target, "_schema"))
        other = {name: value * 3 if value.is_floating_point() else value for name, value in tensors.items()}
        assert_same(call(made, other), eager(function, other))
        if same_derivatives:
            with OneViewAtATime():
                expected = derivatives(lambda leaves: eager(function, leaves), tensors)
            assert_same(derivatives(lambda leaves: call(made, leaves), tensors), expected, tolerance=tolerance)
        return check_pass(functionalize, program, same_derivatives=False)

    return check_function


# ---------------------------------------------------------------------- golden texts


def test_a_write_through_a_row(check):
    def function(a, b):
        row = a[1]
        row.mul_(b)

    assert_expected_inline(
        text(check(function, a=X, b=COLUMN[:, 0])),
        """\
# a recorded function
def function(
    state_a,  # f64[4, 4]
    state_b,  # f64[4]
):
    # row = a[1]
    select = aten.select.int(state_a, 0, 1)  # f64[4]
    # row.mul_(b)
    mul = aten.mul.Tensor(select, state_b)  # f64[4]
    select_scatter = aten.select_scatter.default(state_a, mul, 0, 1)  # f64[4, 4]
    return (
        select_scatter,
    )
""",
    )


def test_a_copy_with_cast_and_broadcast(check):
    def function(a, b):
        a.t().copy_(b)
        return a + 1

    assert_expected_inline(
        text(check(function, a=X.to(torch.float32), b=COLUMN, tolerance=1e-6)),
        """\
# a recorded function
def function(
    state_a,  # f32[4, 4]
    state_b,  # f64[4, 1]
):
    # a.t().copy_(b)
    _to_copy = aten._to_copy.default(state_b, dtype=torch.float32)  # f32[4, 1]
    expand = aten.expand.default(_to_copy, [4, 4])  # f32[4, 4]
    t = aten.t.default(expand)  # f32[4, 4]
    # return a + 1
    add = aten.add.Tensor(t, 1)  # f32[4, 4]
    return (
        add,
        t,
    )
""",
    )


def test_pure_programs_stay(check):
    def function(a, b):
        return torch.sin(a) * b, (a - b).sum(0)

    program = record(function, {"a": X, "b": Y})
    assert check(function, a=X, b=Y).code == program.code


def test_reading_a_view_needs_no_scatter(check):
    made = check(lambda a: a[0] + a.t()[1] * a.view(16)[:4], a=X)
    assert "scatter" not in made.code and "reshape" not in made.code


# ---------------------------------------------------------------------- views

VIEWS = {
    "select": lambda x: x.select(1, 2),
    "select negative": lambda x: x.select(-1, -1),
    "slice": lambda x: x[1:3],
    "slice with step": lambda x: x[:, ::2],
    "slice to the end": lambda x: x[-2:],
    "slice past the end": lambda x: x[2:100],
    "empty slice": lambda x: x[2:2],
    "narrow": lambda x: x.narrow(0, 1, 2),
    "diagonal": lambda x: x.diagonal(),
    "diagonal with offset": lambda x: x.diagonal(offset=1),
    "diagonal of other dims": lambda x: x.view(2, 2, 4).diagonal(-1, 1, 2),
    "as_strided": lambda x: x.as_strided((2, 3), (4, 1), 5),
    "unbind": lambda x: x.unbind()[2],
    "unbind columns": lambda x: x.unbind(1)[3],
    "unbind negative": lambda x: x.unbind(-1)[0],
    "split": lambda x: x.split(3)[1],
    "split columns": lambda x: x.split(2, 1)[0],
    "split negative": lambda x: x.split(3, dim=-1)[0],
    "split with sizes": lambda x: x.split([1, 2, 1])[1],
    "split with sizes of columns": lambda x: x.split_with_sizes([3, 1], dim=1)[1],
    "chunk": lambda x: x.chunk(2)[1],
    "tensor_split": lambda x: x.tensor_split(3)[0],
    "view": lambda x: x.view(2, 8),
    "view of a vector": lambda x: x.view(-1),
    "reshape": lambda x: x.reshape(8, 2),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(0, (2, 2)),
    "squeeze": lambda x: x.view(1, 4, 4, 1).squeeze(),
    "squeeze dim": lambda x: x.view(1, 4, 4).squeeze(0),
    "squeeze dims": lambda x: x.view(1, 4, 4, 1).squeeze((0, 3)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "index none": lambda x: x[None, :, None],
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "transpose": lambda x: x.transpose(0, -1),
    "swapaxes": lambda x: x.view(2, 2, 4).swapaxes(0, 2),
    "permute": lambda x: x.view(2, 2, 4).permute(2, 0, 1),
    "permute negative": lambda x: x.view(2, 2, 4).permute(-1, -3, -2),
    "movedim": lambda x: x.view(2, 2, 4).movedim(0, 2),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "alias": lambda x: torch.ops.aten.alias.default(x),
    "view_as": lambda x: x.view_as(torch.zeros(8, 2)),
    "ellipsis": lambda x: x[..., 1],
}
CUT_IN_EAGER = ("detach", "data")


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_reaches_the_whole(check, name):
    view = VIEWS[name]

    def function(x, y):
        before = x * 2
        other = x.view(16)
        part = view(x)
        part.mul_(3)
        part.add_(view(y))
        return before, x + 1, part * y.sum(), other - 1, view(x)

    check(function, x=X, y=Y, same_derivatives=name not in CUT_IN_EAGER)


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_to_the_whole_reaches_the_view(check, name):
    def function(x, y):
        part = VIEWS[name](x)
        x.copy_(y)
        first = part * 2
        x.sub_(part.sum())
        return first, part + 1

    check(function, x=X, y=Y, same_derivatives=name not in CUT_IN_EAGER)


CHAINS = {
    "row of a transpose": lambda x: x.t()[1],
    "slice of a slice": lambda x: x[1:][:2],
    "element": lambda x: x[1][2],
    "diagonal of a slice": lambda x: x[:3, 1:].diagonal(),
    "slice of a permuted view": lambda x: x.view(2, 2, 4).permute(2, 0, 1)[1:3, :, 0],
    "transpose of a column slice": lambda x: x[:, 1:3].t(),
    "part of a part": lambda x: x.split(2)[1].unbind(1)[3],
    "view of a row": lambda x: x[2].view(2, 2).t()[0],
    "reshape that is a view": lambda x: x[1:3].reshape(8)[::3],
    "six views": lambda x: x.view(2, 2, 4)[1].t().unsqueeze(0)[:, 1:].squeeze(0).permute(1, 0)[0],
    "strided slice of a view": lambda x: x.view(16)[3::5],
    "squeezed part": lambda x: x.split([1, 3])[0].squeeze(0)[2:],
}


@pytest.mark.parametrize("name", CHAINS)
def test_views_of_views(check, name):
    view = CHAINS[name]

    def function(x, y):
        part, column, flat = view(x), x[:, 2], x.view(-1)
        part.add_(view(y))
        column.mul_(2)
        read = part + 1
        flat.sub_(1)
        part.zero_()
        return read, part, column, x.sum(0), flat

    check(function, x=X, y=Y)


def test_as_strided_of_a_written_slice(check):
    def function(x):
        tail = x.view(16)[4:]
        tail.mul_(2)
        part = tail.as_strided((3,), (2,), 5)
        part.add_(1)
        return part, tail

    check(function, x=X)


def test_sibling_parts_are_written_in_turn(check):
    def function(x, y):
        first, second, *_ = x.unbind()
        first.copy_(y[0])
        second.copy_(first * 2)
        first.add_(second)
        return first, second

    check(function, x=X, y=Y)


def test_a_written_temporary(check):
    def function(x):
        buffer = torch.zeros(2, 4, dtype=torch.float64)
        buffer[0] = x[0]
        buffer[:, 1] += x[1, :2]
        return buffer.sum(0), buffer

    made = check(function, x=X)
    assert [str(slot) for slot in made.results] == ["output[0]", "output[1]"]


def test_two_results_of_one_storage(check):
    def function(x):
        row = x[0]
        row.add_(1)
        return x, row, x.t()

    check(function, x=X)


def test_a_write_that_reads_what_it_writes(check):
    def function(x):
        x.add_(x.t().clone())
        x[0].copy_(x[1])
        x.sub_(x[1:2] * 2)

    check(function, x=X)


# ---------------------------------------------------------------------- writes


def _scaled_parts(z):
    torch.view_as_real(z).mul_(torch.tensor([2.0, -0.5]))
    return torch.view_as_real(z).sum(-1)


WRITES = {
    "add_": lambda x, y: x.add_(y, alpha=2),
    "sub_": lambda x, y: x.sub_(y),
    "mul_": lambda x, y: x.mul_(y),
    "div_": lambda x, y: x.div_(y + 2),
    "div_ with rounding": lambda x, y: x.div_(y + 2, rounding_mode="floor"),
    "floor_divide_": lambda x, y: x.floor_divide_(2),
    "fill_diagonal_": lambda x, y: x.fill_diagonal_(3.0),
    "remainder_": lambda x, y: x.remainder_(0.7),
    "pow_": lambda x, y: x.pow_(3),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.5),
    "addcdiv_": lambda x, y: x.addcdiv_(y, y + 2, value=-0.5),
    "addmm_": lambda x, y: x.addmm_(y, y, beta=0.5, alpha=2),
    "lerp_": lambda x, y: x.lerp_(y, 0.3),
    "lerp_ tensor": lambda x, y: x.lerp_(y, y * 0.1),
    "clamp_": lambda x, y: x.clamp_(0.7, 1.5),
    "clamp_min_": lambda x, y: x.clamp_min_(0.9),
    "neg_": lambda x, y: x.neg_(),
    "sqrt_": lambda x, y: x.sqrt_(),
    "exp_": lambda x, y: x.exp_(),
    "abs_": lambda x, y: x.abs_(),
    "sign_": lambda x, y: x.sign_(),
    "reciprocal_": lambda x, y: x.reciprocal_(),
    "sigmoid_": lambda x, y: x.sigmoid_(),
    "zero_": lambda x, y: x.zero_(),
    "fill_": lambda x, y: x.fill_(3),
    "fill_ tensor": lambda x, y: x.fill_(y[0, 0]),
    "copy_": lambda x, y: x.copy_(y),
    "copy_ row": lambda x, y: x.copy_(y[1]),
    "copy_ number": lambda x, y: x.copy_(y[1, 1]),
    "copy_ with cast": lambda x, y: x.copy_(y.to(torch.float32)),
    "copy_ of whole numbers": lambda x, y: x.copy_((y * 4).to(torch.int32)),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, -1.0),
    "index_fill_": lambda x, y: x.index_fill_(0, torch.tensor([0, 2]), 5.0),
    "index_add_": lambda x, y: x.index_add_(0, torch.tensor([0, 0, 3]), y[:3]),
    "index_copy_": lambda x, y: x.index_copy_(1, torch.tensor([1, 3]), y[:, :2]),
    "scatter_": lambda x, y: x.scatter_(0, torch.tensor([[0, 1, 2, 3]]), y[:1]),
    "scatter_add_": lambda x, y: x.scatter_add_(1, torch.tensor([[0, 0, 1, 1]]), y[:1]),
    "setitem mask": lambda x, y: x.__setitem__(y > 0, 7.0),
    "setitem indices": lambda x, y: x.__setitem__((torch.tensor([0, 1]), torch.tensor([2, 2])), y[0, :2]),
    "setitem slice": lambda x, y: x.__setitem__((slice(1, None), 2), y[0, 1:]),
    "tril_": lambda x, y: x.tril_(),
    "triu_": lambda x, y: x.triu_(1),
    "cumsum_": lambda x, y: x.cumsum_(0),
    "erfinv_": lambda x, y: x.mul_(0.4).erfinv_(),
    "iadd": lambda x, y: x.__iadd__(y),
    "add out": lambda x, y: torch.add(x, y, alpha=3, out=x),
    "mul out": lambda x, y: torch.mul(y, 2.0, out=x),
    "real and imaginary parts": lambda x, y: x.copy_(_scaled_parts(torch.complex(x * 1, y))),
    "mm out": lambda x, y: torch.mm(y, y, out=x),
    "sum out": lambda x, y: torch.sum(y, 0, keepdim=True, out=x[:1]),
    "cat out": lambda x, y: torch.cat([y[:2], y[1:3]], out=x),
    "out to a view": lambda x, y: torch.sub(y[0], 1, out=x[2]),
    "comparison in place": lambda x, y: x.gt_(y),
}
WITHOUT_DERIVATIVE_IN_EAGER = ("floor_divide_", "add out", "mul out", "mm out", "sum out", "cat out", "out to a view")


@pytest.mark.parametrize("name", WRITES)
def test_writes_to_a_whole(check, name):
    def function(x, y):
        row = x[1]
        WRITES[name](x, y)
        return row + 1, x.t()

    check(function, x=X, y=Y, same_derivatives=name not in WITHOUT_DERIVATIVE_IN_EAGER)


@pytest.mark.parametrize("name", WRITES)
def test_writes_through_a_view(check, name):
    def function(x, y):
        block = x.view(5, 5)[:4, 1:].t()
        WRITES[name](block, y)
        return x[0], block * 2

    whole = 0.5 + torch.arange(25, dtype=torch.float64) / 16
    without = (*WITHOUT_DERIVATIVE_IN_EAGER, "fill_diagonal_")
    check(function, x=whole, y=Y, same_derivatives=name not in without)


def test_eager_autograd_has_no_derivative_with_out():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="out="):
        torch.mul(x, x, out=torch.zeros_like(X))


def test_out_has_the_derivative_of_the_value():
    made = functionalize(record(lambda x, y: torch.mul(x, y, out=x), {"x": X, "y": Y}))
    found = derivatives(lambda leaves: {"x": call(made, leaves)["state[x]"]}, {"x": X, "y": Y})
    expected = derivatives(lambda leaves: {"x": leaves["x"] * leaves["y"]}, {"x": X, "y": Y})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["__iand__", "__ior__", "__ixor__", "logical_and_", "logical_or_", "bitwise_xor_"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_logical_writes(check, name, dtype):
    x, y = torch.tensor([1, 0, 1, 0]).to(dtype), torch.tensor([1, 1, 0, 0]).to(dtype)

    def function(x, y):
        getattr(x[1:], name)(y[1:])

    check(function, x=x, y=y)


@pytest.mark.parametrize("name", ["__ilshift__", "__irshift__"])
def test_shifts(check, name):
    check(lambda x, y: getattr(x, name)(y), x=torch.tensor([5, 9]), y=torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.int64),
        (torch.int64, torch.float64),
        (torch.bool, torch.float64),
        (torch.int32, torch.bool),
    ],
)
def test_copies_cast(check, target, source):
    def function(x, y):
        x.copy_(y)
        x[0].copy_(y[1])
        x[:, 1:2].copy_(y[2, 0])
        x[1:] = y[0]

    lowest = {torch.bfloat16: 1e-2, torch.float32: 1e-6}
    tolerance = max(lowest.get(target, 1e-12), lowest.get(source, 1e-12))
    check(function, x=(X * 3).to(target), y=(Y * 3).to(source), tolerance=tolerance)


def test_products_keep_the_dtype_of_what_they_write_to(check):
    def function(x, y, i):
        x.mul_(y)
        x[0].add_(y[0])
        i.mul_(2).add_(1)

    check(function, x=X.to(torch.float32), y=Y, i=torch.arange(4), tolerance=1e-6)


def test_writes_chain(check):
    check(lambda x, y: x.mul_(2).add_(y).clamp_(0.5, 3).neg_(), x=X, y=Y)


def test_a_result_is_the_last_value(check):
    def function(x):
        x.add_(1)
        y = x.mul_(2)
        x.sub_(3)
        return y

    check(function, x=X)


# ---------------------------------------------------------------------- gradients that the user stops


def test_no_grad_of_the_users_loss_stops_gradients(check_pass):
    def loss(x):
        buffer = torch.zeros_like(x)
        with torch.no_grad():
            buffer.copy_(x)
            scale = torch.exp(x) + 1
        return (buffer * x * scale).sum()

    made = check_pass(functionalize, record(loss, {"x": X}, numbers={}, region=Region.LOSS), same_derivatives=False)
    found = derivatives(lambda leaves: call(made, leaves), {"x": X})
    expected = derivatives(lambda leaves: eager(loss, leaves), {"x": X})
    assert_same(found, expected)


def stopped_buffer(x, w):
    with torch.no_grad():
        buffer = torch.zeros_like(x)
    buffer.copy_(x * w)
    return (buffer * x).sum()


def written_part_of_a_stopped_buffer(x, w):
    with torch.no_grad():
        buffer = torch.ones_like(x)
    buffer[1] = w[0] * x[1]
    return (buffer * x).sum()


def write_under_no_grad(x, w):
    buffer = x * w
    with torch.no_grad():
        buffer.add_(w)
    return (buffer * x).sum()


def part_written_under_no_grad(x, w):
    buffer = x * w
    with torch.no_grad():
        buffer[1] = w[0] * x[1]
    return (buffer * x).sum()


def detached_then_written(x, w):
    start = (x * 2).detach()
    start.mul_(w)
    return (start * x).sum()


def overwritten_in_part(x, w):
    buffer = torch.zeros_like(x)
    buffer[0] = x[0].detach() * w[0]
    buffer[1] = x[1] * w[1]
    return (buffer * x).sum()


@pytest.mark.parametrize(
    "loss",
    [
        stopped_buffer,
        written_part_of_a_stopped_buffer,
        write_under_no_grad,
        part_written_under_no_grad,
        detached_then_written,
        overwritten_in_part,
    ],
)
def test_gradients_through_writes_of_the_users_loss(loss):
    values = {"x": X, "w": Y}
    made = functionalize(record(loss, values, numbers={}, region=Region.LOSS))
    expected = derivatives(lambda leaves: eager(loss, leaves), values)
    assert_same(derivatives(lambda leaves: call(made, leaves), values), expected, tolerance=1e-12)


def test_casts_and_scatters_name_the_line_that_writes():
    def function(x, y):
        row = x[0]
        row.copy_(y)

    made = functionalize(record(function, {"x": X.to(torch.float32), "y": Y[0, :1]}))
    lines = {node.target._opname: node.meta["source"].code for node in made.graph.nodes if node.op == "call_function"}
    assert lines["_to_copy"] == lines["expand"] == "row.copy_(y)"


# ---------------------------------------------------------------------- what cannot be

REFUSED = {
    "unfold": (lambda x: x.unfold(0, 2, 2).add_(1), "unfold"),
    "another dtype": (lambda x: x.view(torch.int64).zero_(), "view.dtype"),
    "two results": (lambda x: torch.max(x, 1, out=(x[0].clone(), torch.zeros(4, dtype=torch.int64))), "max.dim_max"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_functional_form_is_refused_with_the_line(name):
    function, target = REFUSED[name]
    program = record(function, {"x": X})
    with pytest.raises(CaptureError, match=target) as caught:
        functionalize(program)
    assert "test_mutation.py" in str(caught.value) and f'"{name}"' in str(caught.value)


@pytest.mark.parametrize("name", ["t_", "squeeze_", "unsqueeze_", "transpose_", "swapaxes_"])
def test_views_in_place(check, name):
    arguments = {"unsqueeze_": (0,), "transpose_": (0, 1), "swapaxes_": (-1, 0), "squeeze_": (0,)}.get(name, ())

    def function(x, y):
        flat = x.view(16)
        part = x.view(1, 16) if name == "squeeze_" else x.view(2, 8)
        getattr(part, name)(*arguments)
        part[0].add_(1)
        read = part * 2
        flat.mul_(y.sum())
        x.view(16)[3:].sub_(1)
        return read, part + 1

    check(function, x=X, y=Y)


@pytest.mark.parametrize("size", [(2, 8), (16,), (2, 4), (3, 3)])
def test_another_size_in_place(check, size):
    def function(x):
        buffer = x.clone()
        buffer.resize_(size)
        buffer.add_(1)
        return buffer * 2

    check(function, x=X, same_derivatives=False)  # eager autograd refuses to resize


def test_an_input_turned_in_place(check):
    def function(x):
        row = x[0]
        x.t_()
        x[0].add_(1)
        return row + 1, x * 2

    check(function, x=X)


def test_reading_an_unfolded_view_is_fine(check):
    def function(x):
        windows = x.unfold(0, 2, 1)
        x.add_(1)
        return windows * 2

    check(function, x=X)


def test_out_that_grows():
    def function(x):
        out = torch.empty(0, dtype=torch.float64)
        torch.mul(x, 2, out=out)
        return out

    assert torch.equal(call(functionalize(record(function, {"x": X})), {"x": Y})["output[0]"], Y * 2)


# ---------------------------------------------------------------------- random programs


def take_view(rng, tensor):
    """Returns a random view of a tensor, which has one to three dimensions."""
    dim = rng.randrange(tensor.dim())
    size = tensor.shape[dim]
    kind = rng.choice(("select", "slice", "transpose", "view", "unsqueeze", "diagonal", "split", "unbind", "permute"))
    if kind == "select" and tensor.dim() > 1:
        return tensor.select(dim, rng.randrange(-size, size))
    if kind == "slice" and size > 1:
        start = rng.randrange(size - 1)
        return tensor[(slice(None),) * dim + (slice(start, None, rng.choice((1, 2))),)]
    if kind == "transpose":
        return tensor.transpose(dim, rng.randrange(tensor.dim()))
    if kind == "view" and tensor.is_contiguous():
        return tensor.view(rng.choice(((-1,), (1, -1), (-1, 1))))
    if kind == "unsqueeze" and tensor.dim() < 3:
        return tensor.unsqueeze(dim)
    if kind == "diagonal" and tensor.dim() > 1 and min(tensor.shape) > 1:
        return tensor.diagonal(rng.choice((0, 1)), 0, 1)
    if kind == "split" and size > 1:
        return rng.choice(tensor.split(rng.choice((1, 2, [1, size - 1])), dim))
    if kind == "unbind" and tensor.dim() > 1:
        return rng.choice(tensor.unbind(dim))
    if kind == "permute":
        return tensor.permute(rng.sample(range(tensor.dim()), tensor.dim()))
    return tensor[...]


def write_somewhere(rng, target, source):
    """Changes a tensor in a random way of which autograd saves nothing that a later write could change."""
    kind = rng.choice(("add", "sub", "scale", "copy", "fill", "zero", "row", "cast", "add scalar"))
    if kind == "add":
        target.add_(source.sum(), alpha=rng.choice((1, -2, 0.5)))
    elif kind == "sub":
        target.sub_(source.clone() if source.shape == target.shape else source.sum())
    elif kind == "scale":
        target.mul_(rng.choice((2, -0.5)))
    elif kind == "copy":
        target.copy_(source.clone() if source.shape == target.shape else source.sum())
    elif kind == "fill":
        target.fill_(source.sum() if rng.random() < 0.5 else 0.25)
    elif kind == "zero":
        target.zero_()
    elif kind == "row":
        target[rng.randrange(target.shape[0])] = source.mean()
    elif kind == "cast":
        target.copy_(source.sum().to(torch.float32))
    else:
        target.add_(0.125)


def random_function(seed):
    """Returns a function of `x` and `y` that takes views, writes and reads, the same ones at every call."""

    def function(x, y):
        rng = random.Random(seed)
        pool, read = [x, y, x * 2], []
        for _ in range(14):
            action = rng.choice(("view", "view", "write", "write", "read", "new"))
            chosen = rng.choice(pool)
            if action == "view":
                pool.append(take_view(rng, chosen))
            elif action == "write":
                write_somewhere(rng, chosen, rng.choice(pool))
            elif action == "read":
                read.append(chosen * 3)
            else:
                pool.append(chosen.reshape(chosen.shape) + 1)
        return *read, *(value.clone() for value in pool)

    return function


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_equal_eager(check, seed):
    check(random_function(seed), x=X[:3], y=Y[:, :3].contiguous(), tolerance=1e-6)  # some writes cast to float32
