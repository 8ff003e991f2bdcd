"""Elements that a mask selects."""

import pytest
import torch
from expecttest import assert_expected_inline
from recorded import call, derivatives, eager, record, text

from gimli_compile.passes.mutation import functionalize
from gimli_compile.passes.selection import lower_selections
from gimli_compile.slot import Role

X = torch.tensor([[0.25, -1.0, 2.0], [-9.0, 0.5, 3.0]], dtype=torch.float64)
Y = torch.tensor([[1.0, 2.0, -1.0], [4.0, -5.0, 6.0]], dtype=torch.float64)
OTHERS = [(-X, Y), (X.abs(), Y), (-X.abs(), Y), (X, -Y)]


def lowered(function):
    with torch.no_grad():
        return lower_selections(functionalize(record(function, {"x": X, "y": Y})))


def guards_of(program):
    return [slot for slot in program.results if slot.role is Role.GUARD]


def logarithms(x, y):
    mask = x > 0
    y[mask] = x[mask].log()


def test_the_masked_form(check_pass):
    with torch.no_grad():
        program = functionalize(record(logarithms, {"x": X, "y": Y}))
    assert_expected_inline(
        text(check_pass(lower_selections, program, at={"x": X, "y": Y})),
        """\
# a recorded function
def function(
    state_x,  # f64[2, 3]
    state_y,  # f64[2, 3]
):
    # mask = x > 0
    gt = aten.gt.Scalar(state_x, 0)  # bool[2, 3]
    # y[mask] = x[mask].log()
    reshape = aten.reshape.default(state_x, [-1])  # f64[6]
    _to_copy = aten._to_copy.default(gt, dtype=torch.uint8)  # u8[2, 3]
    argmax = aten.argmax.default(_to_copy)  # i64[]
    index = aten.index.Tensor(reshape, [argmax])  # f64[]
    any_1 = aten.any.default(gt)  # bool[]
    full = aten.full.default([], 1.0, dtype=torch.float64, device=torch.device('cpu'))  # f64[]
    where = aten.where.self(any_1, index, full)  # f64[]
    where_1 = aten.where.self(gt, state_x, where)  # f64[2, 3]
    log = aten.log.default(where_1)  # f64[2, 3]
    where_2 = aten.where.self(gt, log, state_y)  # f64[2, 3]
    return (
        where_2,
    )
""",
    )


def test_a_program_without_masks_stays(check_pass):
    program = record(lambda x, y: (x[torch.tensor([1, 0])], x[0], x * y), {"x": X, "y": Y})
    assert check_pass(lower_selections, program).code == program.code


def test_masks_that_never_change_stay(check_pass):
    mask = torch.tensor([True, False])
    program = record(lambda x, y: x[mask] + y[mask], {"x": X, "y": Y})
    assert check_pass(lower_selections, program).code == program.code


def reductions(x, y):
    chosen, rows = x[x > 0.3], x[y.sum(1) > 0]
    return (
        chosen.sum(), chosen.mean(), chosen.prod(), chosen.norm(), (chosen > 1).any(), (chosen > 0).all(),
        (chosen > 1).sum(), rows.sum(0), rows.sum(-1).mean(), rows.mean((0, 1)), rows.mean(1, keepdim=True).sum(),
        torch.linalg.vector_norm(rows, 1, dim=(1,)).square().sum(0), rows.sum(0, keepdim=True),
    )  # fmt: skip


def writes(x, y):
    mask = x * y > 0
    x.index_put_((mask,), y[mask] * x[mask], accumulate=True)
    y.masked_scatter_(mask, torch.masked_select(x, mask).clone())
    y[x.sum(1) > 0] += y[x.sum(1) > 0]
    x[~mask] *= 2


def shaped_alike(x, y):
    mask = x > 0
    made = torch.zeros_like(x[mask]) + torch.ones_like(x[mask]) + torch.full_like(y[mask], 2.5)
    x[mask] = torch.where(y[mask] > 0, made, y[mask].clamp(min=-1)).to(torch.float32).to(torch.float64)


@pytest.mark.parametrize("function", [logarithms, reductions, writes, shaped_alike])
def test_masked_forms_hold_for_every_mask(function):
    program = lowered(function)
    assert not guards_of(program)
    for x, y in [(X, Y), *OTHERS]:
        found, expected = call(program, {"x": x, "y": y}), eager(function, {"x": x, "y": y})
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-14, atol=0, equal_nan=True)


def products(x, y):
    mask = x * y > 0
    made = torch.zeros_like(x).index_put((mask,), y[mask] * x[mask] / (x[mask] - 0.1))
    return made, torch.masked_scatter(y, mask, torch.masked_select(x, mask).abs() ** 0.5)


@pytest.mark.parametrize("function", [logarithms, products, shaped_alike])
def test_derivatives_are_finite_where_nothing_is_selected(function):
    program = lowered(function)
    for x, y in OTHERS:
        found = derivatives(lambda leaves: call(program, leaves), {"x": x, "y": y})
        expected = derivatives(lambda leaves: eager(function, leaves), {"x": x, "y": y})
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-13, atol=1e-14)


def largest(x, y):
    return x[x > 0].max() + x[x > 0].amin() + torch.linalg.vector_norm(x[x > 0], float("inf"))


def test_the_largest_of_nothing_is_no_value():
    program = lowered(largest)
    assert [str(slot) for slot in guards_of(program)] == [
        "guard[selection.0]",
        "guard[selection.1]",
        "guard[selection.2]",
    ]
    for x in (X, -X, X.abs()):
        found = call(program, {"x": x, "y": Y})
        torch.testing.assert_close(found.pop("output[0]"), largest(x, Y), rtol=1e-14, atol=0)
        assert all(found.values())
    assert not any(value for name, value in call(program, {"x": -X.abs(), "y": Y}).items() if "guard" in name)


def sorted_elements(x, y):
    mask = x > 0
    x[mask] = x[mask].sort().values
    return mask.nonzero(), x[mask, None], torch.masked_select(y, mask).cumsum(0)


def of_two_masks(x, y):
    x[x > 0] = y[y > 0]


def scattered(x, y):
    return torch.masked_scatter(x, x > 0, y[y > 0])


def of_a_part(x, y):
    mask = x > 0
    chosen = y[mask]
    chosen[chosen > 1] = 1.5
    return chosen * 2


def with_other_indices(x, y):
    return x[x.sum(1) > -5, 1], y[:, x[0] > 0]


@pytest.mark.parametrize("function", [sorted_elements, of_two_masks, scattered, of_a_part, with_other_indices])
def test_counted_forms_hold_for_masks_of_the_same_size(function):
    program = lowered(function)
    names = [str(slot) for slot in guards_of(program)]
    assert names
    for x, y in [(X, Y), (X.flip(1), Y.flip(1)), (X.flip(0, 1), Y)]:
        found, expected = call(program, {"x": x, "y": y}), eager(function, {"x": x, "y": y})
        if not all(found[name] for name in names):
            assert (x is not X) and function is with_other_indices
            continue
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert not all(call(program, {"x": X.abs(), "y": -Y})[name] for name in names)
