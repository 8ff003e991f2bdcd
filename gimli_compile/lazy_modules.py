"""The dry run that gives lazy modules their shapes: torch's own, of the live model, and nothing else changes.

`nn.LazyLinear` and the like hold parameters without a shape until their first call, which makes them in place, so that
an optimizer which has them already keeps them. The first call is made here, with an example, and what it changes
besides (running statistics, attributes, generators, gradients) is put back. It ends where the last parameter is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree

from gimli_compile.contents import contents_of, refilled, same_contents
from gimli_compile.errors import InputError, compose_message
from gimli_compile.host_draws import generators_forked
from gimli_compile.loss_capture import takes_meta
from gimli_compile.outside import names_in, reachable_from
from gimli_compile.provenance import raised_at
from gimli_compile.side_effects import (
    MISSING,
    Place,
    places_of_functions,
    places_of_modules,
    places_of_objects,
    side_effects_undone,
)

_LAZY = (UninitializedParameter, UninitializedBuffer)


class _Initialized(BaseException):
    """Ends a dry run: no `except Exception` on the way is meant."""


def initialize_lazy_modules(
    model: Any, optimizer: Any, loss_fn: Any, train_step: Any, example: Any, meta: Any = None
) -> None:
    """Calls the loss, the train step or the model on an example until no parameter or buffer lacks its shape.

    A model without such tensors is left alone. If the example does not go through, the model is as lazy as before.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(model) if isinstance(leaf, nn.Module)]
    modules = list(dict.fromkeys(module for leaf in leaves for module in leaf.modules()))
    if example is None or not any(map(_lazy_tensors, modules)):
        return
    function = train_step or loss_fn or model
    run = _DryRun(modules, with_params=train_step is not None)
    places = _places(function, modules)
    with generators_forked(), side_effects_undone(places), run.undone():
        try:
            with torch.set_grad_enabled(train_step is not None):
                _call(model, optimizer, loss_fn, train_step, example, meta)
        except _Initialized:
            pass
        except Exception as error:
            run.make_lazy_again()
            raise _refusal(function, error) from error


def _call(model: Any, optimizer: Any, loss_fn: Any, train_step: Any, example: Any, meta: Any) -> None:
    if train_step is not None:
        idle = pytree.tree_map(_Idle, optimizer)
        train_step(*((model, idle, example, meta) if takes_meta(train_step, places=4) else (model, idle, example)))
    elif loss_fn is not None:
        loss_fn(*((model, example, meta) if takes_meta(loss_fn) else (model, example)))
    elif isinstance(example, Mapping):
        model(**example)
    else:
        model(*(example if isinstance(example, tuple) else (example,)))


class _Idle:
    """Stands for the optimizer in a dry run of a train step: its methods do nothing, but for a closure's evaluation."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._optimizer, name)
        return (lambda *args, **options: None) if callable(value) else value

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluates the closure."""
        return None if closure is None else closure()


class _DryRun:
    """What the modules hold before the run, and right after each was initialized."""

    def __init__(self, modules: list[nn.Module], *, with_params: bool) -> None:
        self.modules = modules
        self.with_params = with_params
        self.lazy = {module: lazy for module in modules if (lazy := _lazy_tensors(module))}
        self.forms = {module: _Form(module) for module in self.lazy}
        self.pending = [tensor for lazy in self.lazy.values() for tensor in lazy]
        self.held = {module: _attributes(module) for module in modules if module not in self.lazy}
        self.tensors: dict[torch.Tensor, torch.Tensor] = {}
        for module in modules:
            self._keep(module)
        self.grads = [(tensor, tensor.grad) for module in modules for tensor in _tensors(module, nn.Parameter)]

    def _keep(self, module: nn.Module) -> None:
        for tensor in _tensors(module, torch.Tensor):
            if self.with_params or not isinstance(tensor, nn.Parameter):
                self.tensors.setdefault(tensor, tensor.detach().clone())

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Watches the run from inside, and afterwards gives back all but the tensors that it made."""
        with ExitStack() as hooks:
            for module in self.lazy:
                handle = module.register_forward_pre_hook(self._note)
                hooks.callback(handle.remove)
            hooks.callback(torch_module.register_module_forward_hook(self._end_if_done).remove)
            for tensor, _ in self.grads:
                tensor.grad = None
            try:
                yield
            finally:
                self._give_back()

    def _note(self, module: nn.Module, _: Any) -> None:
        """Runs after the module's own initialization and before its `forward`."""
        if not _lazy_tensors(module):
            self.held.setdefault(module, _attributes(module))
            self._keep(module)

    def _end_if_done(self, *_: Any) -> None:
        if not any(isinstance(tensor, _LAZY) for tensor in self.pending):
            raise _Initialized

    def _give_back(self) -> None:
        with torch.no_grad():
            for tensor, value in self.tensors.items():
                tensor.copy_(value)
        for tensor in self.pending:
            if not isinstance(tensor, _LAZY):
                tensor.grad = None
        for tensor, grad in self.grads:
            tensor.grad = grad
        for module, held in self.held.items():
            place = _place(module)
            now = place.read()
            for key in {**held, **now}:
                before = held.get(key, MISSING)
                if not same_contents(contents_of(now.get(key, MISSING)), before):
                    place.write(key, refilled(before))

    def make_lazy_again(self) -> None:
        """Undoes initializations."""
        self.held = {module: held for module, held in self.held.items() if module not in self.lazy}
        self.tensors = {t: v for t, v in self.tensors.items() if not any(t is tensor for tensor in self.pending)}
        for form in self.forms.values():
            form.restore()


class _Form:
    """A module that is lazy: its class, its attributes and those of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cls = type(module)
        self.attributes = dict(vars(module))
        self.registries = {key: dict(value) for key, value in self.attributes.items() if isinstance(value, dict)}
        self.kinds = [(tensor, type(tensor), tensor.data) for tensor in _lazy_tensors(module)]

    def restore(self) -> None:
        """Gives all of it back."""
        for tensor, kind, data in self.kinds:
            if type(tensor) is not kind:
                tensor.grad = None
                tensor.data = data
                tensor.__class__ = kind
        self.module.__class__ = self.cls
        for key, items in self.registries.items():
            self.attributes[key].clear()
            self.attributes[key].update(items)
        vars(self.module).clear()
        vars(self.module).update(self.attributes)


def _lazy_tensors(module: nn.Module) -> list[Any]:
    own = itertools.chain(module._parameters.values(), module._buffers.values())
    return [tensor for tensor in own if isinstance(tensor, _LAZY)]


def _tensors(module: nn.Module, kind: type) -> list[torch.Tensor]:
    own = itertools.chain(module._parameters.values(), module._buffers.values())
    return [
        tensor for tensor in own if tensor is not None and isinstance(tensor, kind) and not isinstance(tensor, _LAZY)
    ]


def _place(module: nn.Module) -> Place:
    return next(places_of_modules([module], {}, set()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: contents_of(value) for key, value in _place(module).read().items()}


def _places(function: Any, modules: list[nn.Module]) -> list[Place]:
    reached = reachable_from(function, modules)
    functions = [found for found in reached if isinstance(found, FunctionType)]
    objects = [found for found in reached if not isinstance(found, FunctionType)]
    return [*places_of_functions(functions, names_in), *places_of_objects(objects)]


def _refusal(function: Any, error: Exception) -> InputError:
    name = getattr(function, "__name__", type(function).__name__)
    return InputError(
        compose_message(
            f"the dry run of `{name}` on `example` raised {type(error).__name__}: {error}",
            raised_at(error),
            "Lazy modules get their shapes from it, and are as they were before.",
            "Pass a batch as the loss or the train step gets it (without one: what the model is called with), and "
            "`example_meta` if it needs `meta`. Or run the model once yourself (`model(x)`).",
        )
    )
