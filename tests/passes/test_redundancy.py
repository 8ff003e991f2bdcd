"""Values that are computed twice."""

import operator

import torch
from expecttest import assert_expected_inline
from recorded import call, eager, record, text

from gimli_compile.passes.mutation import functionalize
from gimli_compile.passes.redundancy import merge_common_subexpressions

aten = torch.ops.aten
X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def test_equal_calls_become_one(check_pass):
    def function(x, y):
        first = torch.sin(x) * y
        second = torch.sin(x) * y
        return first + second, torch.sin(y)

    program = record(function, {"x": X, "y": X + 1})
    assert_expected_inline(
        text(check_pass(merge_common_subexpressions, program)),
        """\
# a recorded function
def function(
    state_x,  # f64[2, 3]
    state_y,  # f64[2, 3]
):
    # first = torch.sin(x) * y
    sin = aten.sin.default(state_x)  # f64[2, 3]
    mul = aten.mul.Tensor(sin, state_y)  # f64[2, 3]
    # return first + second, torch.sin(y)
    add = aten.add.Tensor(mul, mul)  # f64[2, 3]
    sin_2 = aten.sin.default(state_y)  # f64[2, 3]
    return (
        add,
        sin_2,
    )
""",
    )


def test_parts_of_equal_calls_become_one(check_pass):
    def function(x):
        return torch.max(x, 1).values + torch.max(x, 1).values

    made = check_pass(merge_common_subexpressions, record(function, {"x": X}))
    called = [node.target for node in made.graph.nodes if node.op == "call_function"]
    assert called == [aten.max.dim, operator.getitem, operator.getitem, aten.add.Tensor]


def test_equal_lists_of_arguments_become_one(check_pass):
    def function(x, y):
        return torch.cat([x, y]).sum((0, 1)) + torch.cat([x, y]).sum((0, 1))

    made = check_pass(merge_common_subexpressions, record(function, {"x": X, "y": X}))
    assert text(made).count("aten.cat") == text(made).count("aten.sum") == 1


def unchanged(check_pass, function, **tensors):
    program = record(function, tensors)
    assert check_pass(merge_common_subexpressions, program).code == program.code


def test_different_calls_stay(check_pass):
    unchanged(
        check_pass, lambda x, y: (torch.sub(x, y), torch.sub(y, x), x.sum(0), x.sum(1), x.sum((0, 1))), x=X, y=X + 1
    )


def test_numbers_of_different_kinds_stay(check_pass):
    def function(x, i):
        return i * 1, i * 1.0, i * True, i + 0, i + 0.0, x * 0.0, x * -0.0

    unchanged(check_pass, function, x=X, i=torch.arange(3))


def test_signed_zeros_are_told_apart():
    program = record(lambda x: (x / 0.0, x / -0.0), {"x": X})
    results = call(merge_common_subexpressions(program), {"x": X})
    assert torch.equal(results["output[0]"], -results["output[1]"])


def test_not_a_number_equals_itself(check_pass):
    def function(x):
        return torch.nan_to_num(x, nan=float("nan")) + torch.nan_to_num(x, nan=float("nan"))

    made = check_pass(merge_common_subexpressions, record(function, {"x": X}))
    assert text(made).count("aten.nan_to_num") == 1


def test_different_dtypes_stay(check_pass):
    unchanged(check_pass, lambda x: (x.to(torch.float32), x.to(torch.float16)), x=X)


def test_a_stopped_gradient_is_not_merged_with_another(check_pass):
    program = record(lambda x: x.detach().exp() + x.detach().sin(), {"x": X})
    first = next(node for node in program.graph.nodes if node.target is torch.ops.aten.detach.default)
    first.meta["stop"] = True
    assert check_pass(merge_common_subexpressions, program).code == program.code


def test_draws_are_different_values():
    def function(x):
        return x * torch.rand_like(x) + x * torch.rand_like(x)

    program = record(function, {"x": X})
    made = merge_common_subexpressions(program)
    assert len(made.draws) == 2 and made.code == program.code


def test_reads_around_a_write_differ():
    def function(x):
        before = torch.sin(x)
        x.mul_(2)
        return before, torch.sin(x)

    functional = functionalize(record(function, {"x": X}))
    assert merge_common_subexpressions(functional).code == functional.code
    found, expected = call(merge_common_subexpressions(functional), {"x": X}), eager(function, {"x": X})
    assert all(torch.equal(found[name], expected[name]) for name in expected)
