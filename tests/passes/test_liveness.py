"""Dead code, results and inputs that nobody wants."""

import torch
from expecttest import assert_expected_inline
from recorded import call, record, text

from gimli_compile.checker import verify
from gimli_compile.passes.liveness import compute_only, eliminate_dead_code
from gimli_compile.slot import Role

X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def test_what_reaches_no_result_goes(check_pass):
    def function(x, y):
        unused = torch.cos(x) * y
        torch.max(unused, 1)
        return torch.sin(x)

    program = record(function, {"x": X, "y": X + 1})
    assert_expected_inline(
        text(check_pass(eliminate_dead_code, program)),
        """\
# a recorded function
def function(
    state_x,  # f64[2, 3]
    state_y,  # f64[2, 3]
):
    # return torch.sin(x)
    sin = aten.sin.default(state_x)  # f64[2, 3]
    return (
        sin,
    )
""",
    )


def test_live_code_stays(check_pass):
    program = record(lambda x, y: (torch.sin(x) * torch.softmax(y, 1), y + 1), {"x": X, "y": X})
    assert check_pass(eliminate_dead_code, program).code == program.code


def test_a_program_without_results_loses_every_call(check_pass):
    made = check_pass(eliminate_dead_code, record(lambda x: [torch.sin(x)][:0], {"x": X}))
    assert made.code.endswith("):\n    return ()\n")
    assert made.function(X) == ()


def test_constants_go_with_their_last_use(check_pass):
    kept, dropped = torch.ones(2, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)

    def function(x):
        torch.sin(x + dropped)
        return x + kept

    program = record(function, {"x": X})
    made = check_pass(eliminate_dead_code, program)
    assert len(program.constants) == 2
    assert [value is kept for value in made.constants.values()] == [True]
    assert [slot for slot in made.inputs if slot.role is Role.CONSTANT] == list(made.constants)


def test_draws_stay_though_unused(check_pass):
    def function(x):
        torch.rand_like(x)
        return x + torch.rand_like(x)

    program = record(function, {"x": X})
    made = check_pass(eliminate_dead_code, program)
    assert made.draws == program.draws and len(made.draws) == 2
    torch.manual_seed(3)
    torch.rand(2, 3, dtype=torch.float64)
    second = torch.rand(2, 3, dtype=torch.float64)
    torch.manual_seed(3)
    assert torch.equal(call(made, {"x": X})["output[0]"], X + second)


def test_inputs_stay_though_unused(check_pass):
    program = record(lambda x, y: torch.sin(x), {"x": X, "y": X})
    assert check_pass(eliminate_dead_code, program).inputs == program.inputs


def test_restricted_to_some_results():
    program = record(lambda x: (torch.sin(x), torch.cos(x), torch.exp(x)), {"x": X})
    code = program.code
    made = compute_only(program, [2, 0])
    verify(made)
    assert program.code == code
    assert made.results == (program.results[2], program.results[0])
    found = call(made, {"x": X})
    assert list(found) == ["output[2]", "output[0]"]
    assert torch.equal(found["output[2]"], X.exp()) and torch.equal(found["output[0]"], X.sin())


def test_unused_inputs_of_some_roles():
    program = record(lambda x, y, n, m: x * n, {"x": X, "y": X}, numbers={"n": 2.0, "m": 3.0})
    verify(made := compute_only(program, [0], dropping=(Role.HYPER,)))
    assert [str(slot) for slot in made.inputs] == ["state[x]", "state[y]", "hyper[n]"]
    assert [str(slot) for slot in program.inputs] == ["state[x]", "state[y]", "hyper[n]", "hyper[m]"]


def test_unused_inputs_of_all_roles():
    program = record(lambda x, y, n, m: x * n, {"x": X, "y": X}, numbers={"n": 2.0, "m": 3.0})
    verify(made := compute_only(program, [0], dropping=tuple(Role)))
    assert [str(slot) for slot in made.inputs] == ["state[x]", "hyper[n]"]
    assert torch.equal(call(made, {"x": X, "n": torch.tensor(2.0, dtype=torch.float64)})["output[0]"], X * 2.0)


def test_a_dropped_draw_is_not_made():
    def function(x):
        torch.rand_like(x)
        return torch.sin(x)

    made = compute_only(record(function, {"x": X}), [0], dropping=tuple(Role))
    assert made.draw({}) == {}


def test_nothing_unused_nothing_dropped():
    program = record(lambda x, y: x * y, {"x": X, "y": X})
    assert compute_only(program, [0], dropping=tuple(Role)).code == program.code
