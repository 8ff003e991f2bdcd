"""Rules by which Inductor knows the type of each value in a kernel, made once for a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch._inductor.codegen import common


@contextmanager
def dtype_rules_made_once() -> Iterator[None]:
    """Within this, Inductor (torch 2.13) does not make its rules, of which there is one set, again for each operator.

    That took a tenth of the time in which it writes a program.
    """
    kind = getattr(common, "DtypePropagationOpsHandler", None)
    if kind is None:
        yield
        return
    made: list[object] = []

    def rules() -> object:
        if not made:
            made.append(kind())
        return made[0]

    with mock.patch.object(common, "DtypePropagationOpsHandler", rules):
        yield
