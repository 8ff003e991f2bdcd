"""A program prints as the Python source that runs."""

import math
import re
from typing import Any, cast

import pytest
import torch
from expecttest import assert_expected_inline
from recorded import call, record

import gimli_compile as gimli
from gimli_compile.printing import describe, format_call, print_excerpt, run_namespace
from gimli_compile.slot import Role, Slot

aten = torch.ops.aten
X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)


class Matrix(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3))


def sgd_update():
    """The update of SGD with momentum over one 2x3 parameter, once the momentum buffer exists."""
    model = Matrix()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    return fn.programs["update"].latest


@pytest.fixture(scope="module")
def update():
    return sgd_update()


def numberless(code):
    """Line numbers of torch differ between its versions."""
    return re.sub(r":\d+ in", ":N in", code)


def test_momentum_sgd(update):
    assert_expected_inline(
        numberless(update.code),
        """\
# torch.optim.sgd.SGD over Matrix: 1 params, 1 state tensors, 3 hyperparameters
def update(
    params_weight,                                                                        # f32[2, 3]
    grads_weight,                                                                         # f32[2, 3]
    state_weight_momentum_buffer,                                                         # f32[2, 3]
    hyper_groups_0_lr,                                                                    # f64[]
    hyper_groups_0_momentum,                                                              # f64[]
    hyper_groups_0_dampening,                                                             # f64[]
):
    # torch/optim/sgd.py:N in _single_tensor_sgd: buf.mul_(momentum).add_(grad, alpha=1 - dampening)
    mul = aten.mul.Tensor(state_weight_momentum_buffer, hyper_groups_0_momentum)          # f32[2, 3]
    rsub = aten.rsub.Scalar(hyper_groups_0_dampening, 1)                                  # f64[]
    state_weight_momentum_buffer_next = aten.addcmul.default(mul, grads_weight, rsub)     # f32[2, 3]
    # torch/optim/sgd.py:N in _single_tensor_sgd: param.add_(grad, alpha=-lr)
    neg = aten.neg.default(hyper_groups_0_lr)                                             # f64[]
    params_weight_next = aten.addcmul.default(params_weight, state_weight_momentum_buffer_next, neg)  # f32[2, 3]
    return (
        params_weight_next,
        state_weight_momentum_buffer_next,
    )
""",
    )


def test_the_text_is_the_program(update):
    namespace = run_namespace(update.graph)
    exec(update.code, namespace)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        values = {
            slot: torch.rand(node.meta["val"].shape, generator=generator, dtype=torch.float64).to(
                node.meta["val"].dtype
            )
            for slot, node in zip(update.inputs, update.placeholders, strict=True)
        }
        texts = namespace["update"](*values.values())
        assert all(torch.equal(mine, its) for mine, its in zip(texts, update(values).values(), strict=True))
        by_path = {str(slot): value for slot, value in values.items()}
        lr, momentum, dampening = (by_path[f"hyper[groups.0.{key}]"] for key in ("lr", "momentum", "dampening"))
        buffer = momentum * by_path["state[weight.momentum_buffer]"] + (1 - dampening) * by_path["grads[weight]"]
        expected = by_path["params[weight]"] - lr * buffer
        found = {str(slot): value for slot, value in update(values).items()}
        torch.testing.assert_close(found["params[weight]"], expected)
        torch.testing.assert_close(found["state[weight.momentum_buffer]"], buffer)


def test_the_text_is_the_same_for_two_captures(update):
    assert sgd_update().code == update.code


def test_the_text_holds_no_path_and_no_address(update):
    assert not re.search(r"0x[0-9a-f]{4,}|(^|[\s'\"(])/\w+|site-packages|\bobject at\b", update.code)


def test_lines_of_the_third_party_appear(update):
    lines = re.findall(r"^ +# (torch/optim/sgd\.py):(\d+) in (\w+): (.*)$", update.code, flags=re.MULTILINE)
    assert [code for *_, code in lines] == [
        "buf.mul_(momentum).add_(grad, alpha=1 - dampening)",
        "param.add_(grad, alpha=-lr)",
    ]
    with open(torch.optim.SGD.step.__code__.co_filename.replace("optimizer.py", "sgd.py")) as file:
        source = file.read().splitlines()
    assert all(source[int(number) - 1].strip() == code for _, number, _, code in lines)


def test_str_is_the_code(update):
    assert str(update) == update.code
    assert repr(update) == f"Program({update.title!r}, {len(update.graph.nodes)} nodes)"


# ---------------------------------------------------------------------- slots


def test_colliding_names_stay_apart():
    program = record(lambda **given: given["a.b"] - given["a_b"], {"a.b": X, "a_b": X + 1})
    assert [node.name for node in program.placeholders] == ["state_a_b", "state_a_b_1"]
    assert torch.equal(call(program, {"a.b": X, "a_b": X * 3})["output[0]"], X - X * 3)


@pytest.mark.parametrize(
    ("slot", "name", "after", "text"),
    [
        (Slot(Role.PARAM, "0.weight"), "params_0_weight", "params_0_weight_next", "params[0.weight]"),
        (Slot(Role.BUFFER, "bn.running_mean"), "buffers_bn_running_mean", "buffers_bn_running_mean_next", None),
        (Slot(Role.STATE, "groups.0.step"), "state_groups_0_step", "state_groups_0_step_next", None),
        (Slot(Role.GRAD, "0.weight"), "grads_0_weight", "grads_0_weight", "grads[0.weight]"),
        (Slot(Role.HYPER, "groups.0.betas.1"), "hyper_groups_0_betas_1", "hyper_groups_0_betas_1", None),
        (Slot(Role.LOSS), "loss", "loss", "loss"),
        (Slot(Role.BATCH, "['x'][0]"), "batch__x_0", "batch__x_0", "batch[['x'][0]]"),
    ],
)
def test_names_of_slots(slot, name, after, text):
    assert (slot.name, slot.result_name) == (name, after)
    assert slot.name.isidentifier()
    assert text is None or str(slot) == text


# ---------------------------------------------------------------------- values and arguments

ARGUMENTS = {
    "dtype": lambda x: x.to(torch.float32),
    "infinities": lambda x: x.clamp(-math.inf, math.inf),
    "not a number": lambda x: torch.nan_to_num(x / 0, nan=math.nan, posinf=-math.inf),
    "tiny number": lambda x: x + 1e-45 + 0.1 + 1 / 3,
    "bool": lambda x: x.sum(0, keepdim=True),
    "one-element tuple": lambda x: x.sum((1,)),
    "list of tensors": lambda x: torch.cat([x, x * 2], 1),
    "optional tensors": lambda x: x[:, torch.tensor([0, 2])],
    "string": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "text option": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "memory format": lambda x: x.t().clone(memory_format=torch.contiguous_format),
    "device": lambda x: torch.zeros(2, 3, dtype=torch.float64, device="cpu") + x,
    "layout": lambda x: torch.empty_like(x, layout=torch.strided).fill_(1.0),
    "complex": lambda x: (x * (1 + 2j)).real,
    "several results": lambda x: torch.max(x, 1)[0] + torch.std_mean(x, 1)[1],
    "reserved name": lambda x: x.abs().sum().pow(2) + x.max() + x.all(),
    "generator draw": lambda x: x * torch.bernoulli(torch.full((3,), 0.5, dtype=torch.float64)),
    "enumeration": lambda x: torch.nn.functional.mse_loss(x, x * 2, reduction="sum"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_kind_of_argument_runs(name):
    function = ARGUMENTS[name]
    program = record(function, {"x": X})
    torch.manual_seed(0)
    expected = function(X + 1)
    torch.manual_seed(0)
    found = call(program, {"x": X + 1})["output[0]"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def named(name, result):
    def function(x):
        return result(x)

    function.__name__ = name
    cast(Any, function).is_custom_function = True
    return function


def test_custom_functions_of_one_name_are_told_apart():
    program = record(lambda x: torch.sin(x) + torch.cos(x), {"x": X})
    for node, result in zip(program.graph.nodes, (None, torch.exp, torch.log), strict=False):
        if result is not None:
            node.target = named("Clip", result)
    program = program.copy()  # its text was not made yet
    assert program.code.count("_Clip") == 2
    assert torch.equal(call(program, {"x": X})["output[0]"], X.exp() + X.log())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "f32[2, 3]"),
        (torch.zeros((), dtype=torch.float64), "f64[]"),
        (torch.zeros(0, dtype=torch.bfloat16), "bf16[0]"),
        (torch.zeros(1, dtype=torch.float16), "f16[1]"),
        (torch.zeros(1, dtype=torch.int64), "i64[1]"),
        (torch.zeros(1, dtype=torch.uint8), "u8[1]"),
        (torch.zeros(1, dtype=torch.bool), "bool[1]"),
        (torch.zeros(1, dtype=torch.complex64), "c64[1]"),
        (torch.zeros(1, dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn[1]"),
        (torch.zeros(2, device="meta"), "f32[2] meta"),
        ((torch.zeros(2), torch.zeros(3, dtype=torch.int64)), "f32[2], i64[3]"),
        ((torch.zeros(2), None), "f32[2], ?"),
        (None, "?"),
    ],
)
def test_dtypes_and_shapes(value, text):
    program = record(lambda x: torch.sin(x), {"x": X})
    program.placeholders[0].meta["val"] = value
    assert describe(program.placeholders[0]) == text


def test_parts_print_as_indices():
    program = record(lambda x: torch.max(x, 1)[0], {"x": X})
    assert [format_call(node) for node in program.graph.nodes if node.op == "call_function"] == [
        "aten.max.dim(state_x, 1)",
        "max_1[0]",
        "max_1[1]",
    ]


def test_a_program_without_results_runs():
    program = record(lambda x: None, {"x": X})
    assert program.code.endswith("    return ()\n")
    assert program({program.inputs[0]: X}) == {}


def test_one_comment_for_a_run_of_operators():
    def function(x):
        y = torch.sin(x) * 2 + 1
        return y.sum()

    comments = [line.strip() for line in record(function, {"x": X}).code.splitlines() if line.startswith("    #")]
    assert [re.sub(r".*: ", "", line) for line in comments] == ["y = torch.sin(x) * 2 + 1", "return y.sum()"]


# ---------------------------------------------------------------------- excerpts


def chain(x):
    for _ in range(9):
        x = torch.sin(x)
    return x


def test_an_excerpt_marks_the_node():
    program = record(chain, {"x": X})
    node = [node for node in program.graph.nodes if node.op == "call_function"][4]
    assert_expected_inline(
        print_excerpt(program, node, radius=2),
        """\
    sin_2 = aten.sin.default(sin_1)  # f64[2, 3]
    sin_3 = aten.sin.default(sin_2)  # f64[2, 3]
--> sin_4 = aten.sin.default(sin_3)  # f64[2, 3]
    sin_5 = aten.sin.default(sin_4)  # f64[2, 3]
    sin_6 = aten.sin.default(sin_5)  # f64[2, 3]""",
    )


def test_an_excerpt_at_either_end():
    program = record(chain, {"x": X})
    first, last = program.placeholders[0], program.returned[0]
    assert_expected_inline(
        print_excerpt(program, first, radius=1),
        """\
--> state_x (an input)  # f64[2, 3]
    sin = aten.sin.default(state_x)  # f64[2, 3]""",
    )
    assert print_excerpt(program, last).splitlines()[-1] == f"--> {last.name} = aten.sin.default(sin_7)  # f64[2, 3]"
    assert "-->" not in print_excerpt(program, program.output)
    assert print_excerpt(program, program.output).splitlines()[-1].strip().startswith(last.name)
