"""A model seen from outside: its tensors by name, and a run with other tensors in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gimli_compile.errors import InputError, compose_message
from gimli_compile.snapshot import is_number


class ModelView:
    """The live model, read and run without being changed.

    A tensor is known by the first name under which `named_parameters` and `named_buffers` give it, however many
    modules hold it.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"the model is a {type(model).__name__}. Pass an instance of `torch.nn.Module`.")
        self.model = model
        _refuse_uninitialized(model)
        self.param_names = {id(p): name for name, p in model.named_parameters()}
        self.buffer_names = {id(b): name for name, b in model.named_buffers()}

    @property
    def live_params(self) -> dict[str, nn.Parameter]:
        """The live parameters by name."""
        return dict(self.model.named_parameters())

    @property
    def live_buffers(self) -> dict[str, torch.Tensor]:
        """The live buffers by name."""
        return dict(self.model.named_buffers())

    def as_leaf(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Returns a leaf with a copy of the value of a parameter, trained or frozen as the live one, with its hooks."""
        live = self.live_params[name]
        leaf = nn.Parameter(value.detach().clone(), live.requires_grad)
        for hook in (live._backward_hooks or {}).values():
            leaf.register_hook(hook)
        for hook in (getattr(live, "_post_accumulate_grad_hooks", None) or {}).values():
            leaf.register_post_accumulate_grad_hook(hook)
        return leaf

    def signature(self) -> tuple[Any, ...]:
        """Returns what a captured program of this model depends on besides tensors: training flags and options."""
        return tuple(
            (id(module), *((key, value) for key, value in vars(module).items() if _is_option(value)))
            for module in self.model.modules()
        )

    @contextmanager
    def substituted(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Runs with `tensors` in place of the live parameters and buffers of those names; modules come back unchanged.

        Every module is given a copy of its attributes, in which the tensors are replaced wherever they occur, so that
        hooks, parametrizations and modules reached by two paths work as they are.
        """
        live = {**self.live_params, **self.live_buffers}
        by_id = {id(live[name]): tensor for name, tensor in tensors.items() if name in live}
        before = [(module, vars(module)) for module in self.model.modules()]
        try:
            for module, attributes in before:
                module.__dict__ = {key: _replace(value, by_id) for key, value in attributes.items()}
            yield
        finally:
            for module, attributes in before:
                module.__dict__ = attributes

    def tensor_attributes(self) -> dict[tuple[int, str], torch.Tensor]:
        """Returns the tensors that modules hold as plain attributes, by module and name."""
        return {
            (id(module), key): value
            for module in self.model.modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }

    def identity(self) -> dict[str, tuple[int, bool]]:
        """Returns which parameters the model has now, and which of them require gradients."""
        return {name: (id(p), p.requires_grad) for name, p in self.model.named_parameters()}

    def read_buffers(self) -> dict[str, torch.Tensor]:
        """Returns the present buffers by the names of the live ones; inside `substituted`, the new ones."""
        return dict(self.model.named_buffers())


def changed_attributes(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[str]:
    """Returns the names of plain attributes that differ between two signatures."""
    changed = []
    for old, new in zip(before, after, strict=True):
        was = dict(old[1:])
        changed += [key for key, value in new[1:] if key in was and was[key] != value]
    return changed


def _is_option(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str)) or is_number(value)


def _replace(value: Any, by_id: Mapping[int, torch.Tensor]) -> Any:
    """Returns a value with tensors replaced by identity; dicts, lists and tuples are copied."""
    if isinstance(value, torch.Tensor):
        return by_id.get(id(value), value)
    if type(value) is dict or (isinstance(value, dict) and type(value).__module__ == "collections"):
        copied = value.copy()
        for key, item in value.items():
            copied[key] = _replace(item, by_id)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_replace(item, by_id) for item in value)
    return value


def _refuse_uninitialized(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise InputError(
                compose_message(
                    f"the model's {name!r} is not initialized: the model has lazy modules that never ran",
                    None,
                    "A program needs the shapes of all parameters.",
                    "Run the model once on a batch (`model(x)`), then create the optimizer and call `functionalize`.",
                )
            )
