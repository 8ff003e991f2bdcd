"""What code reads besides its arguments: programs hold it as it was at capture, and are for it alone.

Globals and enclosed variables of the loss, attributes of objects and of classes, what lists and dicts hold: live code
takes them as they are in each call. So they are looked at in each call, by identity where nothing changed, and programs
are known by the number that their values have. Tensors count as objects here: what is written into one counts anyway,
since programs hold the very tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from gimli_compile.environment_walk import Names, Reached, Walk
from gimli_compile.errors import BakedValueWarning, RecaptureWarning
from gimli_compile.metadata import storage_of

_MANY_PROGRAMS = 16  # captures after which one is told


class Environment:
    """What functions, the methods of objects and the modules of a model read besides their arguments."""

    def __init__(self, reached: Callable[[], Reached] = lambda: Reached((), (), (), (), tuple)) -> None:
        self._reached = reached
        self._names = Names({"forward", "step"}, set())
        self._walk: Walk | None = None
        self._numbers: dict[Any, int] = {}
        self._rebound = 0
        self._number = 0
        self._is_frozen = False
        self._is_told = False
        self._is_stale = False

    def read(self) -> int:
        """Returns the number of what all of it holds now: the same number, the same values."""
        if self._is_frozen or (self._walk is not None and not self._is_stale and self._walk.holds()):
            return self._number
        before, now = self._walk, self._look_again()
        if before is not None and before.tensors != now.tensors:
            used = set(map(storage_of, self._reached().constants()))
            gone = [at for at, held in before.tensors.items() if now.tensors.get(at) != held]
            self._rebound += any(storage_of(before.tensors[at].value) in used for at in gone)
        self._number = self._numbers.setdefault((self._rebound, now.key()), len(self._numbers))
        if before is not None and len(self._numbers) >= _MANY_PROGRAMS and not self._is_told:
            self._is_told = True
            _warn_of_many(_changed(before, now))
        return self._number

    def follow(self, name: str) -> None:
        """Looks from now on also at what methods of this name read."""
        self._names.own.add(name)
        self._is_stale = True

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Is as it was before, inside; what changes meanwhile, because code runs, is no other environment.

        Numbers and flags that change, and tensors that are other ones, are warned of.
        """
        if self._is_frozen:
            yield
            return
        self.read()
        self._is_frozen = True
        try:
            yield
        finally:
            self._is_frozen = False
            before = self._walk
            if before is not None and not before.holds():
                now = self._look_again()
                changed = _changed(before, now)
                # Programs hold the tensors that were there before.
                now.tensors.update({at: held for at, held in before.tensors.items() if at in now.tensors})
                _warn_of_own(changed)

    def _look_again(self) -> Walk:
        """Walks with all names that the code uses: what is found may name more."""
        reached, self._is_stale = self._reached(), False
        while True:
            walk = self._walk = Walk(reached, self._names)
            if all(map(set.issubset, walk.names, self._names)):
                return walk
            self._names = Names(*map(set.union, walk.names, self._names))


def _changed(before: Walk, now: Walk) -> list[str]:
    """Returns the names of numbers, flags, texts and tensors that are others now."""
    then = {found[0]: found[1:] for found in before.found if len(found) == 3 and isinstance(found[1], type)}
    others = {found[0]: found[1:] for found in now.found}
    places = [at for at, value in then.items() if others.get(at, value) != value]
    places += [at for at, tensor in before.tensors.items() if now.tensors.get(at, tensor) != tensor]
    return list(dict.fromkeys(next(key for key in reversed(at) if isinstance(key, str)) for at in places))


def _warn_of_many(names: Iterable[str]) -> None:
    warnings.warn(
        f"the code reads values that change from call to call, in this one {_quoted(names)}. It is captured for each "
        "of them, which takes time and memory. Pass what changes as a batch, as `meta`, or as hyperparameters.",
        RecaptureWarning,
        stacklevel=2,
    )


def _warn_of_own(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"the code changes {_quoted(names)} while it runs, and reads it. It is no part of the state: a program "
            "holds what it was at capture. If later steps depend on it, keep it in a buffer (`register_buffer`).",
            BakedValueWarning,
            stacklevel=2,
        )


def _quoted(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"`{name}`" for name in names[:4]) + (", ..." if len(names) > 4 else "")
