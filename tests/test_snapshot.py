"""Taking apart what an optimizer holds, and putting it back together with other values."""

import enum
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from gimli_compile.skeleton import Leaf, ParamRef, Skeleton, leaves_of, opaque_of, owners_of
from gimli_compile.snapshot import GROUPS, freeze, grads_set, installed, is_number

Betas = namedtuple("Betas", "first second")


class Mode(enum.IntEnum):
    FAST = 1


@dataclass
class Config:
    decay: float = 0.01
    every: int = 5
    schedule: list = field(default_factory=lambda: [0.1, 0.2])


@dataclass(frozen=True)
class FrozenConfig:
    decay: float = 0.01


class Plain:
    """An object with attributes, as an optimizer is."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    if TYPE_CHECKING:  # its attributes are whatever it is given

        def __getattr__(self, name) -> Any: ...
        def __setattr__(self, name, value): ...
        def __delattr__(self, name): ...


def paths(root, names=None):
    return freeze(root, names or {})[1]


def swap(root, new, names=None, params=None):
    """Returns the context in which `root` holds `new` values, by path, in place of its own."""
    skeleton, values = freeze(root, names or {})
    assert new.keys() <= values.keys()
    return installed(skeleton, lambda leaf: {**values, **new}[leaf.path], lambda name: (params or {})[name])


# ---------------------------------------------------------------------- what is a value


@pytest.mark.parametrize("value", [1, 2.5, -1, np.float32(2), np.float64(2), np.int64(2)])
def test_numbers(value):
    assert is_number(value)
    assert paths(Plain(a=value)) == {"a": value}


@pytest.mark.parametrize("value", [True, False, np.True_, None, "1", Mode.FAST, 2j, torch.ones(()), b"1"])
def test_no_numbers(value):
    assert not is_number(value)


def test_paths_of_nested_values():
    tensor = torch.ones(2)
    root = Plain(
        config={"decay": 0.1, "nested": {"steps": [1, 2.5], 3: 4}},
        pair=(7, tensor),
        history=deque([0.5, 0.25], maxlen=3),
        betas=Betas(0.9, 0.99),
        settings=Config(),
        flag=True,
        name="sgd",
        dtype=torch.float32,
        nothing=None,
    )
    values = paths(root)
    assert values.pop("pair.1") is tensor
    assert values == {
        "config.decay": 0.1, "config.nested.steps.0": 1, "config.nested.steps.1": 2.5, "config.nested.3": 4, "pair.0": 7,
        "history.0": 0.5, "history.1": 0.25, "betas.0": 0.9, "betas.1": 0.99,
        "settings.decay": 0.01, "settings.every": 5, "settings.schedule.0": 0.1, "settings.schedule.1": 0.2,
    }  # fmt: skip


def test_leaves_know_their_kind():
    skeleton, _ = freeze(Plain(a=1, b=1.0, c=torch.ones(2), d=np.float32(1), e=np.int8(1)), {})
    assert [(leaf.path, leaf.kind) for leaf in leaves_of(skeleton)] == [
        ("a", "int"), ("b", "float"), ("c", "tensor"), ("d", "float"), ("e", "int"),
    ]  # fmt: skip


def test_groups_and_state_come_first_and_are_named_after_the_parameters():
    weight, bias = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.2}], momentum=0.9)
    weight.grad = torch.ones(2)
    optimizer.step()
    skeleton, values = freeze(optimizer, {id(weight): "0.weight", id(bias): "0.bias"})
    assert values["groups.0.lr"] == 0.1 and values["groups.1.lr"] == 0.2
    assert values["0.weight.momentum_buffer"] is optimizer.state[weight]["momentum_buffer"]
    order = [leaf.path for leaf in leaves_of(skeleton)]
    assert max(map(order.index, ("0.weight.momentum_buffer", "groups.0.lr", "groups.1.lr"))) < order.index(
        "defaults.lr"
    )


def test_paths_that_collide_stay_apart():
    assert paths(Plain(a={"b.c": 1, "b": {"c": 2}})) == {"a.b.c": 1, "a.b.c_": 2}


# ---------------------------------------------------------------------- round trips

CONTAINERS = {
    "dict": {"a": 1.5, "b": {"c": 2}},
    "list": [1.5, [2, 2.5]],
    "tuple": (1.5, (2, 2.5)),
    "deque": deque([1.5, 2], maxlen=4),
    "namedtuple": Betas(0.9, 2),
    "ordered dict": OrderedDict(a=1.5, b=2),
    "default dict": defaultdict(dict, {"a": {"b": 1.5}}),
    "counters by number": {0: 1.5, 7: 2},
    "empty": {"a": [], "b": {}, "c": ()},
    "mixed": {"a": [None, True, "x", 1.5], "b": (torch.float32, 2)},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_are_made_again_with_other_values(name):
    original = CONTAINERS[name]
    owner = Plain(held=original)
    _, values = freeze(owner, {})
    with swap(owner, {path: value * 2 for path, value in values.items()}):
        held = owner.held
        assert type(held) is type(original) and held is not original
        again = paths(Plain(held=held))
        assert again == {path: value * 2 for path, value in values.items()}
        assert list(again) == list(values)
        assert list(held) == list(original) if isinstance(original, dict) else len(held) == len(original)
    assert owner.held is original


def test_the_same_values_give_an_equal_object():
    owner = Plain(**CONTAINERS)
    with swap(owner, {}):
        assert {name: getattr(owner, name) for name in CONTAINERS} == CONTAINERS


def test_deques_keep_their_length():
    owner = Plain(history=deque([1.0, 2.0], maxlen=2))
    with swap(owner, {"history.0": 5.0}):
        owner.history.append(7.0)
        assert owner.history == deque([2.0, 7.0], maxlen=2)
    assert owner.history == deque([1.0, 2.0], maxlen=2)


def test_default_dicts_keep_their_factory():
    owner = Plain(cache=defaultdict(list, {"a": [1.0]}))
    with swap(owner, {"cache.a.0": 5.0}):
        owner.cache["b"].append(2.0)
        assert owner.cache == {"a": [5.0], "b": [2.0]}
    assert owner.cache == {"a": [1.0]} and owner.cache.default_factory is list


def test_dict_subclasses_keep_their_class():
    class Options(dict):
        def __getattr__(self, name):
            return self[name]

    owner = Plain(options=Options(lr=0.1))
    with swap(owner, {"options.lr": 0.5}):
        assert owner.options.lr == 0.5


def test_ordered_dicts_keep_their_order():
    owner = Plain(options=OrderedDict(b=1.0, a=2.0))
    with swap(owner, {"options.a": 5.0}):
        assert list(owner.options.items()) == [("b", 1.0), ("a", 5.0)]
        owner.options.move_to_end("b")
        assert list(owner.options) == ["a", "b"]


@pytest.mark.parametrize("kind", [Config, FrozenConfig])
def test_dataclasses_are_filled_in_place(kind):
    config = kind()
    owner = Plain(config=config)
    with swap(owner, {"config.decay": 0.5}):
        assert owner.config is config and config.decay == 0.5
    assert owner.config is config and config.decay == 0.01


def test_parameters_are_put_by_name():
    weight, other = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(2))
    owner = Plain(param_groups=[{"params": [weight], "lr": 0.1}], state=defaultdict(dict, {weight: {"count": 3}}))
    _, values = freeze(owner, {id(weight): "w"})
    assert values == {"groups.0.lr": 0.1, "w.count": 3}
    with swap(owner, {"w.count": 4}, {id(weight): "w"}, {"w": other}):
        assert owner.param_groups[0]["params"][0] is other
        assert list(owner.state) == [other] and owner.state[other] == {"count": 4}
        assert owner.state[weight] == {}
    assert owner.param_groups[0]["params"][0] is weight
    assert list(owner.state) == [weight] and owner.state[weight] == {"count": 3}


def test_a_round_trip_of_a_torch_optimizer():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()}
    before = {id(p): {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    skeleton, values = freeze(optimizer, names)
    fresh = {name: torch.nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    doubled = {path: value * 2 if isinstance(value, torch.Tensor) else value for path, value in values.items()}
    with installed(skeleton, lambda leaf: doubled[leaf.path], fresh.__getitem__):
        assert optimizer.param_groups[0]["params"] == list(fresh.values())
        assert optimizer.state[fresh["bias"]]["exp_avg"] is doubled["bias.exp_avg"]
        optimizer.state.clear()
        optimizer.param_groups[0]["lr"] = 100.0
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert [id(p) for p in optimizer.state] == list(before)
    for p, state in optimizer.state.items():
        assert all(torch.equal(value, before[id(p)][key]) for key, value in state.items())


# ---------------------------------------------------------------------- what is one stays one


class Lookahead:
    """Shares the groups and the state of the optimizer inside, as such wrappers do."""

    def __init__(self, inner):
        self.k = 5
        self.optimizer = inner
        self.param_groups = inner.param_groups
        self.state = inner.state


def test_nested_optimizers_share_their_groups():
    weight = torch.nn.Parameter(torch.ones(2))
    outer = Lookahead(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    skeleton, values = freeze(outer, {id(weight): "w"})
    assert [path for path in values if path.endswith(".lr")] == ["groups.0.lr", "optimizer.defaults.lr"]
    assert owners_of(skeleton) == [outer, outer.optimizer]
    groups, state = outer.param_groups, outer.state
    with swap(outer, {"groups.0.lr": 0.5, "k": 2}, {id(weight): "w"}, {"w": weight}):
        assert outer.param_groups is outer.optimizer.param_groups and outer.param_groups is not groups
        assert outer.state is outer.optimizer.state
        assert outer.optimizer.param_groups[0]["lr"] == 0.5 and outer.k == 2
    assert outer.param_groups is groups is outer.optimizer.param_groups
    assert outer.state is state is outer.optimizer.state
    assert groups[0]["lr"] == 0.1 and outer.k == 5


def test_shared_containers_and_tensors_stay_shared():
    tensor, shared = torch.ones(2), {"lr": 0.1}
    root = Plain(first=shared, second=[shared, tensor], third=tensor, fourth=(tensor, shared))
    values = paths(root)
    assert list(values) == ["first.lr", "second.1"]
    new = torch.zeros(2)
    with swap(root, {"second.1": new, "first.lr": 0.5}):
        assert root.first is root.second[0] is root.fourth[1] and root.first == {"lr": 0.5}
        assert root.second[1] is root.third is root.fourth[0] is new
    assert root.first is root.second[0] is shared and root.third is tensor


def test_a_group_that_refers_to_its_own_list():
    groups: list[dict[str, Any]] = [{"lr": 0.1}]
    groups[0]["all"] = groups
    root = Plain(param_groups=groups)
    with swap(root, {"groups.0.lr": 0.5}):
        assert root.param_groups[0]["all"] is root.param_groups and root.param_groups is not groups
    assert root.param_groups is groups and groups[0]["all"] is groups


def test_owners_that_refer_to_each_other():
    first, second = Plain(lr=0.1), Plain(decay=0.2)
    first.other, second.other = second, first
    with swap(first, {"lr": 0.5, "other.decay": 0.6}):
        assert (first.lr, second.decay) == (0.5, 0.6)
        assert first.other is second and second.other is first
    assert (first.lr, second.decay) == (0.1, 0.2) and first.other is second and second.other is first


def test_equal_numbers_are_values_of_their_own():
    root = Plain(a=0.1, b=0.1, pair=(0.1, 0.1))
    assert list(paths(root)) == ["a", "b", "pair.0", "pair.1"]
    with swap(root, {"b": 0.5}):
        assert (root.a, root.b, root.pair) == (0.1, 0.5, (0.1, 0.1))


# ---------------------------------------------------------------------- what stays


def test_modules_that_the_optimizer_owns():
    owner = Plain(net=torch.nn.Linear(2, 1))
    weight = owner.net.weight
    assert {path: value for path, value in paths(owner).items() if isinstance(value, torch.Tensor)}.keys() == {
        "net.weight",
        "net.bias",
    }
    with swap(owner, {"net.weight": torch.nn.Parameter(torch.zeros(1, 2))}):
        assert torch.equal(owner.net(torch.ones(2)), owner.net.bias)
    assert owner.net.weight is weight


def test_functions_classes_and_hooks_are_left_alone():
    def schedule(step):
        return step

    hook_table = OrderedDict({1: schedule})
    owner = Plain(schedule=schedule, kind=Config, generator=torch.Generator(), np=np, _step_hooks=hook_table, lr=0.1)
    kept = owner.schedule, owner.kind, owner.generator, owner.np
    assert list(paths(owner)) == ["lr"]
    with swap(owner, {"lr": 0.5}):
        assert (owner.schedule, owner.kind, owner.generator, owner.np) == kept
        assert owner._step_hooks is hook_table
    assert owner._step_hooks is hook_table


def test_attributes_that_appear_inside_are_gone_afterwards():
    owner = Plain(lr=0.1)
    attributes = vars(owner)
    with swap(owner, {"lr": 0.5}):
        owner.extra = 7
        del owner.lr
    assert vars(owner) is attributes and attributes == {"lr": 0.1}


def test_the_live_objects_are_back_after_an_exception():
    config, groups = Config(), [{"lr": 0.1, "history": [1.0]}]
    owner = Plain(param_groups=groups, config=config)
    with pytest.raises(KeyError), swap(owner, {"groups.0.lr": 0.5, "config.decay": 0.7}):
        owner.param_groups[0]["history"].append(2.0)
        config.schedule.append(0.3)
        raise KeyError("inside")
    assert owner.param_groups is groups == [{"lr": 0.1, "history": [1.0]}]
    assert owner.config is config == Config()


def test_the_live_objects_are_back_when_building_fails():
    inner = Plain(decay=0.2)
    owner = Plain(inner=inner, lr=0.1)
    skeleton, _ = freeze(owner, {})

    def value_of(leaf):
        if leaf.path == "lr":
            raise KeyError(leaf.path)
        return 9.0

    with pytest.raises(KeyError, match="lr"), installed(skeleton, value_of, {}.__getitem__):
        pass
    assert vars(owner) == {"inner": inner, "lr": 0.1} and inner.decay == 0.2


def test_values_are_asked_for_once():
    tensor = torch.ones(2)
    skeleton, _ = freeze(Plain(a=tensor, b=[tensor, 1.5]), {})
    asked = []

    def value_of(leaf):
        asked.append(leaf.path)
        return 0

    with installed(skeleton, value_of, {}.__getitem__):
        pass
    assert asked == ["a", "b.1"]


# ---------------------------------------------------------------------- equality of structures


def skeleton_of(**attributes):
    return freeze(Plain(**attributes), {})[0]


SAME = [
    ({"a": 1.5}, {"a": 2.5}),
    ({"a": [1, 2.0]}, {"a": [3, 4.0]}),
    ({"a": torch.ones(2)}, {"a": torch.zeros(3)}),
    ({"a": {"b": True, "c": None}}, {"a": {"b": True, "c": None}}),
    ({"a": Config()}, {"a": Config(decay=0.5)}),
    ({"a": (1, "x", torch.float32)}, {"a": (2, "x", torch.float32)}),
]
DIFFERENT = [
    ({"a": 1.5}, {"a": 2}),
    ({"a": 1.5}, {"a": torch.ones(())}),
    ({"a": 1.5}, {"b": 1.5}),
    ({"a": 1.5}, {"a": None}),
    ({"a": True}, {"a": False}),
    ({"a": True}, {"a": 1}),
    ({"a": "x"}, {"a": "y"}),
    ({"a": [1, 2]}, {"a": [1]}),
    ({"a": [1, 2]}, {"a": (1, 2)}),
    ({"a": [1, [2]]}, {"a": [[1], 2]}),
    ({"a": {"b": 1}}, {"a": {"c": 1}}),
    ({"a": {}}, {"a": {"c": 1}}),
    ({"a": Config()}, {"a": FrozenConfig()}),
    ({"a": torch.float32}, {"a": torch.float64}),
    ({"a": len}, {"a": max}),
    ({"a": deque([1.0], maxlen=1)}, {"a": deque([1.0], maxlen=2)}),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_structures_that_differ_in_values_are_equal(first, second):
    assert skeleton_of(**first) == skeleton_of(**second)
    assert hash(skeleton_of(**first)) == hash(skeleton_of(**second))


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_structures_that_differ_are_not_equal(first, second):
    assert skeleton_of(**first) != skeleton_of(**second)


def test_sharing_is_part_of_the_structure():
    shared, tensor = [1.0], torch.ones(2)
    assert skeleton_of(a=shared, b=shared) != skeleton_of(a=[1.0], b=[1.0])
    assert skeleton_of(a=tensor, b=tensor) != skeleton_of(a=tensor, b=torch.ones(2))
    assert skeleton_of(a=tensor, b=tensor) == (lambda t: skeleton_of(a=t, b=t))(torch.zeros(3))


def test_parameters_are_known_by_name():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    state = [{"state": defaultdict(dict, {p: {"count": 1}}), GROUPS: [{"params": [p]}]} for p in (first, second)]
    made = [freeze(Plain(**attributes), {id(p): "w"})[0] for attributes, p in zip(state, (first, second), strict=True)]
    assert made[0] == made[1] and hash(made[0]) == hash(made[1])
    assert made[0] != freeze(Plain(**state[1]), {id(second): "v"})[0]


def test_a_skeleton_equals_nothing_else():
    assert skeleton_of(a=1) != "skeleton"
    assert Skeleton(None, (1,)) == Skeleton("other", (1,))
    assert Leaf("a", "int") != ParamRef("a")


# ---------------------------------------------------------------------- gradients


def test_gradients_are_given_and_taken_away():
    params = {name: torch.nn.Parameter(torch.ones(2)) for name in "ab"}
    grads = {"a": torch.zeros(2), "b": None}
    with grads_set(params, grads):
        assert params["a"].grad is grads["a"] and params["b"].grad is None
    assert params["a"].grad is None
    with pytest.raises(KeyError), grads_set(params, grads):
        raise KeyError("inside")
    assert params["a"].grad is None


# ---------------------------------------------------------------------- companions, sets and partial functions


def test_a_companion_is_walked_beside_the_root():
    """Its values have its name in front; what it shares with the root is the same thing, and neither gets the other."""
    root = Plain(param_groups=[{"lr": 0.1}])
    beside = Plain(optimizer=root, gamma=0.5, groups=root.param_groups)
    skeleton, values = freeze(root, {}, companions={"scheduler": beside})
    assert values == {"groups.0.lr": 0.1, "scheduler.gamma": 0.5}
    assert owners_of(skeleton) == [root, beside]
    attributes = dict(vars(root)), dict(vars(beside))
    new = {"groups.0.lr": 1.0, "scheduler.gamma": 2.0}
    with installed(skeleton, lambda leaf: new[leaf.path], {}.__getitem__):
        assert (root.param_groups[0]["lr"], beside.gamma) == (1.0, 2.0)
        assert beside.optimizer is root and beside.groups is root.param_groups
        assert set(vars(root)) == {"param_groups"}
    assert (vars(root), vars(beside)) == attributes


def test_a_companion_may_be_a_list_and_have_the_name_of_an_attribute():
    root = Plain(scheduler=3.0)
    first = Plain(gamma=0.5)
    skeleton, values = freeze(root, {}, companions={"scheduler": [first]})
    assert values == {"scheduler": 3.0, "scheduler.0.gamma": 0.5}
    with installed(skeleton, lambda leaf: values[leaf.path] * 2, {}.__getitem__):
        assert (root.scheduler, first.gamma) == (6.0, 1.0)
    assert (root.scheduler, first.gamma) == (3.0, 0.5)


def test_sets_are_copied():
    root = Plain(seen={3, 1}, fixed=frozenset({2}))
    skeleton, values = freeze(root, {})
    assert values == {}
    seen = root.seen
    with installed(skeleton, {}.__getitem__, {}.__getitem__):
        assert root.seen == {1, 3} and root.fixed == {2} and type(root.fixed) is frozenset
        root.seen.add(5)
        assert freeze(root, {})[0] != skeleton
    assert root.seen is seen and seen == {1, 3}
    assert freeze(Plain(seen={1, 3}, fixed=frozenset({2})), {})[0] == skeleton


def test_numbers_of_partial_functions_are_values():
    def scale(a, b, c):
        return a + 10 * b + 100 * c

    root = Plain(scale=partial(scale, 1.0, c=3.0))
    root.again = root.scale
    skeleton, values = freeze(root, {})
    assert values == {"scale.args.0": 1.0, "scale.keywords.c": 3.0}
    with installed(skeleton, lambda leaf: values[leaf.path] * 2, {}.__getitem__):
        assert root.scale(4.0) == 642.0 and root.again is root.scale
    assert root.scale(4.0) == 341.0


def test_functions_are_what_a_skeleton_holds_by_identity():
    root = Plain(f=len, g=[test_sets_are_copied], flag=True, text="a", number=1)
    assert opaque_of(freeze(root, {})[0]) == [len, test_sets_are_copied]


def test_containers_may_be_given_another_form():
    root = Plain(a=[1.0], b=(2.0,), c={"x": 3.0})
    skeleton, values = freeze(root, {})

    class Loud(list[Any]):
        pass

    def adapt(part, made):
        return Loud() if type(made) is list else (*made, "more") if type(made) is tuple else made

    with installed(skeleton, lambda leaf: values[leaf.path], {}.__getitem__, adapt):
        assert type(root.a) is Loud and root.a == [1.0]
        assert root.b == (2.0, "more") and root.c == {"x": 3.0}
