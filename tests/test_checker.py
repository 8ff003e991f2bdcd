"""The verifier refuses a program that breaks any one of its invariants."""

import operator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from recorded import record

from gimli_compile.checker import verify
from gimli_compile.errors import ProgramError
from gimli_compile.passes.liveness import eliminate_dead_code
from gimli_compile.passes.mutation import functionalize
from gimli_compile.program import Draw, apply_passes
from gimli_compile.slot import Role, Slot

aten = torch.ops.aten
X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def function(x, y):
    x.mul_(y)
    return torch.sin(x) + torch.ones(3, dtype=torch.float64)


@pytest.fixture
def program():
    """A sound functional program, to break: two inputs, `mul`, `sin`, `ones`, `add`, results `output[0]` and `state[x]`."""
    return functionalize(record(function, {"x": X, "y": X + 1}))


def refuses(program, *said):
    with pytest.raises(ProgramError) as caught:
        verify(program)
    for text in (program.title, *said):
        assert text in str(caught.value)


def node_named(program, name):
    return next(node for node in program.graph.nodes if node.name == name)


def test_a_sound_program_passes(program):
    verify(program)
    verify(record(function, {"x": X, "y": X}))


# ---------------------------------------------------------------------- 1: nodes


def test_a_node_of_another_kind(program):
    sin = node_named(program, "sin")
    with program.graph.inserting_before(sin):
        program.graph.call_method("cos", (sin.args[0],))
    refuses(program, "a node of kind call_method", "-->")


def test_a_placeholder_after_a_call(program):
    with program.graph.inserting_before(node_named(program, "sin")):
        late = program.graph.placeholder("late")
    late.meta.update(val=X, source=None)
    late_slot = Slot(Role.BATCH, "late")
    refuses(replace(program, inputs=(*program.inputs, late_slot)), "a placeholder after a call_function", "--> late")


def test_a_call_after_the_output(program):
    with program.graph.inserting_after(program.output):
        program.graph.call_function(aten.sin.default, (program.placeholders[0],))
    refuses(program, "a call_function after a output")


def test_two_outputs(program):
    with program.graph.inserting_after(program.output):
        program.graph.create_node("output", "output", ((),))
    refuses(program, "a output after a output")


def test_no_output(program):
    program.graph.erase_node(program.output)
    refuses(program, "no output")


# ---------------------------------------------------------------------- 2: inputs


def test_more_inputs_than_placeholders(program):
    refuses(replace(program, inputs=(*program.inputs, Slot(Role.BATCH, "b"))), "2 placeholders for 3 inputs")


def test_fewer_inputs_than_placeholders(program):
    refuses(replace(program, inputs=program.inputs[:1]), "2 placeholders for 1 inputs")


def test_an_input_slot_twice(program):
    refuses(replace(program, inputs=(program.inputs[0],) * 2), "an input slot occurs twice")


# ---------------------------------------------------------------------- 3: results


def test_another_number_of_results(program):
    refuses(replace(program, results=program.results[:1]), "2 returned values for 1 results")
    program.output.args = (program.output.args[0][:1],)
    refuses(program, "1 returned values for 2 results")


def test_a_result_slot_twice(program):
    refuses(replace(program, results=(program.results[0],) * 2), "a result slot occurs twice")


def test_a_result_that_is_no_node(program):
    program.output.args = ((program.returned[0], 1.0),)
    refuses(program, "result")


# ---------------------------------------------------------------------- 4: arguments


def test_an_argument_that_comes_later(program):
    node_named(program, "mul").prepend(node_named(program, "sin"))
    refuses(program, "argument mul is not computed before it is used", "--> sin = aten.sin.default(mul)")


def test_an_argument_of_another_graph(program):
    other = record(lambda x: torch.cos(x), {"x": X})
    node_named(program, "sin").args = (node_named(other, "cos"),)
    refuses(program, "argument cos is not computed before it is used", "--> sin")


def test_a_returned_node_of_another_graph(program):
    other = record(lambda x: torch.cos(x), {"x": X})
    program.output.args = ((node_named(other, "cos"), program.returned[1]),)
    refuses(program, "argument cos is not computed before it is used")


def test_an_argument_within_a_list(program):
    other = record(lambda x: torch.cos(x), {"x": X})
    with program.graph.inserting_before(program.output):
        cat = program.graph.call_function(aten.cat.default, ([program.placeholders[0], node_named(other, "cos")],))
    cat.meta.update(val=X, source=None)
    refuses(program, "argument cos", "--> cat")


# ---------------------------------------------------------------------- 5: calls


@pytest.mark.parametrize("target", [torch.sin, operator.add, aten.sin, len])
def test_a_call_of_no_operator(program, target):
    sin = node_named(program, "sin")
    sin.target = target
    refuses(program, "which is no operator", "--> sin")


def test_an_operator_that_changes_its_arguments(program):
    sin = node_named(program, "sin")
    sin.target = aten.sin_.default
    refuses(program, "aten.sin_.default changes its arguments", "--> sin")
    verify(replace(program, stage="captured"))


def test_an_out_operator(program):
    sin = node_named(program, "sin")
    sin.target = aten.sin.out
    sin.kwargs = {"out": sin.args[0]}
    refuses(program, "aten.sin.out changes its arguments")


def test_getitem_and_custom_functions_are_calls(program):
    def custom(x):
        return x.sin()

    cast(Any, custom).is_custom_function = True
    node_named(program, "sin").target = custom
    verify(program)


# ---------------------------------------------------------------------- 6: meta


@pytest.mark.parametrize("name", ["state_x", "sin"])
def test_a_node_without_a_value_description(program, name):
    del node_named(program, name).meta["val"]
    refuses(program, "no value description", f"--> {name}")


@pytest.mark.parametrize("name", ["state_x", "sin"])
def test_a_node_without_a_source_entry(program, name):
    del node_named(program, name).meta["source"]
    refuses(program, "no source line entry", f"--> {name}")


def test_a_source_entry_may_be_none(program):
    node_named(program, "sin").meta["source"] = None
    verify(program)


# ---------------------------------------------------------------------- 7: bindings


def test_a_constant_without_its_tensor():
    constant = torch.ones(3, dtype=torch.float64)
    program = record(lambda x: x + constant, {"x": X})
    verify(program)
    refuses(replace(program, constants={}), "a constant without its tensor", "--> constant_test_0")


def test_noise_without_its_draw():
    program = record(lambda x: x + torch.rand_like(x), {"x": X})
    assert all(isinstance(draw, Draw) for draw in program.draws.values())
    verify(program)
    refuses(replace(program, draws={}), "noise without its draw", "--> noise_test_0")


# ---------------------------------------------------------------------- 8: carried slots


def carried(role, change):
    """Returns a program that takes and returns one slot, in another form."""
    slot = Slot(role, "x")
    return replace(record(lambda x: change(x), {"x": X}), inputs=(slot,), results=(slot,))


@pytest.mark.parametrize("role", [Role.PARAM, Role.BUFFER, Role.STATE])
def test_a_carried_slot_of_another_dtype(role):
    said = f"{Slot(role, 'x')} changes from torch.float64 (2, 3)"
    refuses(carried(role, lambda x: x.to(torch.float32)), said, "-->")
    refuses(carried(role, lambda x: x.sum(0).to(torch.float32)), said, "-->")


@pytest.mark.parametrize("change", [lambda x: x.sum(0), lambda x: x.t(), lambda x: x.unsqueeze(0)])
def test_a_carried_slot_of_another_shape(change):
    for role in (Role.PARAM, Role.BUFFER):
        refuses(carried(role, change), f"{Slot(role, 'x')} changes from torch.float64 (2, 3)", "-->")
    verify(carried(Role.STATE, change))


def test_a_number_of_the_state_may_become_a_tensor():
    slot = Slot(Role.STATE, "x")
    program = record(lambda x: x.float().expand(2), {"x": torch.tensor(1.0, dtype=torch.float64)})
    verify(replace(program, inputs=(slot,), results=(slot,)))


def test_a_small_tensor_of_the_state_keeps_its_dtype():
    slot = Slot(Role.STATE, "x")
    program = record(lambda x: x.double(), {"x": torch.tensor(1.0)})
    refuses(replace(program, inputs=(slot,), results=(slot,)), "changes from torch.float32 ()", "-->")


def test_other_slots_may_change_their_form():
    slot = Slot(Role.BATCH, "x")
    verify(replace(record(lambda x: x.sum(0), {"x": X}), inputs=(slot,), results=(slot,)))


# ---------------------------------------------------------------------- passes


def drop_sin(program):
    """A pass with a fault: it lets a later node use one that it moved behind."""
    copied = program.copy()
    node_named(copied, "add").append(node_named(copied, "sin"))
    return copied


def test_a_corrupted_pass_is_refused_with_an_excerpt(program):
    code = program.code
    with pytest.raises(ProgramError) as caught:
        apply_passes(program, (eliminate_dead_code, drop_sin, eliminate_dead_code), verify)
    what, *excerpt = str(caught.value).splitlines()
    assert what == "a recorded function: argument sin is not computed before it is used"
    assert [line[:3] for line in excerpt] == ["   ", "   ", "   ", "-->", "   "]
    assert "--> add = aten.add.Tensor(sin, ones)  # f64[2, 3]" in excerpt
    assert program.code == code


def test_what_goes_into_the_first_pass_is_checked():
    broken = replace(record(lambda x: torch.sin(x), {"x": X}), results=())
    with pytest.raises(ProgramError, match="1 returned values for 0 results"):
        apply_passes(broken, (), verify)


def test_the_passes_are_applied_in_order(program):
    applied = []

    def note(name):
        return lambda given: applied.append(name) or given.copy()

    made = apply_passes(program, (note("first"), note("second")), lambda given: applied.append("check"))
    assert applied == ["check", "first", "check", "second", "check"]
    assert made.code == program.code
