"""What flows through a training loop: the train state and the hyperparameters, as pytrees of ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch.utils import _pytree as pytree

from gimli_compile.skeleton import Again, Container, Leaf, Skeleton, Value, leaves_of

Tensors = dict[str, torch.Tensor]


class OptState(Mapping[str, torch.Tensor]):
    """An optimizer's state: a mapping from path (`0.weight.exp_avg`, `groups.0.step`) to tensor.

    Numbers are 0-dim tensors (int64 for ints, float64 for floats). The structure around them, flags included, is part
    of the pytree's structure, so that two states of different structure are never mixed up.
    """

    def __init__(self, skeleton: Skeleton, values: Tensors) -> None:
        self.skeleton = skeleton
        self.values_by_path = values

    def __getitem__(self, path: str) -> torch.Tensor:
        return self.values_by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_path)

    def __len__(self) -> int:
        return len(self.values_by_path)

    def __repr__(self) -> str:
        return f"OptState({self.values_by_path!r})"


@dataclass
class TrainState:
    """Parameters and buffers by name as the model names them, and the optimizer's state. A pytree.

    `grads` is what a train step of the user's own leaves in `p.grad`, by name: the next one may add to it. A sparse one
    is a pair of a dense tensor and a mask of its rows. The default step makes its gradients anew, and leaves none.
    """

    params: Tensors
    buffers: Tensors
    opt_state: OptState
    grads: dict[str, Any] = field(default_factory=dict)


class Hyperparameters:
    """The numbers that the optimizer reads and never changes. A pytree.

    `hyper[i]` belongs to parameter group i: `{"lr": f64[], "betas": (f64[], f64[])}`. `attributes` holds numbers, and
    tensors that require a gradient, found on the optimizer object itself, by path. `modules` holds the parameters of
    modules that the optimizer owns, in their own dtypes, by path: `net.0.weight` for `optimizer.net[0].weight`.

    With several optimizers the groups are numbered through, in the order of the optimizers, and `hyper["critic"]` is
    the list of the groups of the optimizer at that path (`hyper["1"]` in a list or tuple); `optimizers` says which.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        attributes: Tensors,
        modules: Tensors | None = None,
        optimizers: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.groups = groups
        self.attributes = attributes
        self.modules = {} if modules is None else modules
        self.optimizers = {} if optimizers is None else dict(optimizers)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: str) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | str) -> Any:
        return self.groups[slice(*self.optimizers[index])] if isinstance(index, str) else self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.groups)

    def __repr__(self) -> str:
        extra = f", attributes={self.attributes!r}" if self.attributes else ""
        extra += f", modules={self.modules!r}" if self.modules else ""
        return f"Hyperparameters({self.groups!r}{extra})"

    def by_path(self) -> dict[str, Any]:
        """Returns the leaves by path, as `groups.0.lr` or `config.decay`."""
        found: dict[str, Any] = {}
        for index, group in enumerate(self.groups):
            _collect(group, f"groups.{index}", found)
        found.update(self.attributes)
        found.update(self.modules)
        return found


def _collect(value: Any, path: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{path}.{key}", found)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _collect(item, f"{path}.{index}", found)
    elif value is not None and not isinstance(value, (bool, str)):
        found[path] = value


def to_tensor(value: Value, kind: str) -> torch.Tensor:
    """Returns a detached copy of a value as it is kept in states: dense, int64 for ints, float64 for floats."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to_dense() if value.layout is torch.sparse_coo else value.clone()
    return torch.tensor(value, dtype=torch.int64 if kind == "int" else torch.float64)


def hyper_tensor(value: Value) -> torch.Tensor:
    """Returns a hyperparameter as a tensor: numbers become float64, ints included, so that all are differentiable."""
    return (
        value.detach().clone() if isinstance(value, torch.Tensor) else torch.tensor(float(value), dtype=torch.float64)
    )


def build_hyperparameters(
    skeleton: Skeleton,
    values: Mapping[str, Value],
    paths: set[str],
    optimizers: Mapping[str, tuple[int, int]] | None = None,
) -> Hyperparameters:
    """Builds the pytree of the hyperparameters at `paths` from the skeleton of an optimizer."""
    containers: dict[int, Container] = {}
    grouped: set[str] = set()

    def convert(part: Any) -> Any:
        if isinstance(part, Leaf):
            grouped.add(part.path)
            return hyper_tensor(values[part.path]) if part.path in paths else None
        if isinstance(part, Again):
            part = containers[part.index]
        if not isinstance(part, Container):
            return part
        containers[part.index] = part
        if not _holds(part, paths):
            return None
        return part.make([(key, convert(item)) for key, item in part.items])

    made = []
    for group in skeleton.groups:
        entries = {key: convert(item) for key, item in group.items if key != "params" and _holds(item, paths)}
        made.append(entries)
    others = [leaf for leaf in leaves_of(skeleton) if leaf.path in paths - grouped]
    modules = {leaf.path: hyper_tensor(values[leaf.path]) for leaf in others if leaf.of_module}
    attributes = {leaf.path: hyper_tensor(values[leaf.path]) for leaf in others if not leaf.of_module}
    return Hyperparameters(made, attributes, modules, optimizers)


def _holds(part: Any, paths: set[str]) -> bool:
    if isinstance(part, Leaf):
        return part.path in paths
    if not isinstance(part, Container) or isinstance(part.owner, torch.nn.Module):
        return False
    return any(_holds(item, paths) for _, item in part.items)


def _register(kind: type, flatten: Callable[[Any], Any], unflatten: Callable[..., Any], keys: Any) -> None:
    pytree.register_pytree_node(
        kind, flatten, unflatten, flatten_with_keys_fn=keys, serialized_type_name=f"gimli_compile.{kind.__name__}"
    )


def _flatten_opt_state(state: OptState) -> tuple[list[Any], Any]:
    return list(state.values_by_path.values()), (state.skeleton, tuple(state.values_by_path))


def _unflatten_opt_state(values: Any, context: Any) -> OptState:
    skeleton, paths = context
    return OptState(skeleton, dict(zip(paths, values, strict=True)))


def _opt_state_keys(state: OptState) -> Any:
    pairs = [(pytree.MappingKey(path), value) for path, value in state.values_by_path.items()]
    return pairs, _flatten_opt_state(state)[1]


def _attribute_keys(*names: str, context: Callable[[Any], Any] = lambda _: None) -> Callable[[Any], Any]:
    return lambda value: ([(pytree.GetAttrKey(name), getattr(value, name)) for name in names], context(value))


def _spans(hyper: Hyperparameters) -> tuple[tuple[str, tuple[int, int]], ...]:
    return tuple(hyper.optimizers.items())


_register(OptState, _flatten_opt_state, _unflatten_opt_state, _opt_state_keys)
_register(
    TrainState,
    lambda state: ([state.params, state.buffers, state.opt_state, state.grads], None),
    lambda values, _: TrainState(*values),
    _attribute_keys("params", "buffers", "opt_state", "grads"),
)
_register(
    Hyperparameters,
    lambda hyper: ([hyper.groups, hyper.attributes, hyper.modules], _spans(hyper)),
    lambda values, spans: Hyperparameters(*values, optimizers=dict(spans)),
    _attribute_keys("groups", "attributes", "modules", context=_spans),
)
