"""The passes that every captured program goes through, in one column."""

from __future__ import annotations

from gimli_compile.checker import verify
from gimli_compile.passes.detachment import reconnect_gradients
from gimli_compile.passes.differentiability import refuse_missing_derivatives
from gimli_compile.passes.layout import relax_views
from gimli_compile.passes.liveness import eliminate_dead_code
from gimli_compile.passes.mutation import functionalize
from gimli_compile.passes.normalization import write_out_normalization
from gimli_compile.passes.order import stop_inner_gradients
from gimli_compile.passes.reals import use_real_signs
from gimli_compile.passes.redundancy import merge_common_subexpressions
from gimli_compile.passes.scatters import lower_scatters
from gimli_compile.passes.selection import lower_selections
from gimli_compile.passes.singularity import guard_zeros
from gimli_compile.program import Pass, Program, apply_passes
from gimli_compile.slot import CARRIED

LOSS_PASSES: tuple[Pass, ...] = (
    functionalize,
    reconnect_gradients,
    relax_views,
    lower_scatters,
    use_real_signs,
    write_out_normalization,
    eliminate_dead_code,
    lower_selections,
    merge_common_subexpressions,
    eliminate_dead_code,
    refuse_missing_derivatives,
)
UPDATE_PASSES: tuple[Pass, ...] = (
    functionalize,
    reconnect_gradients,
    relax_views,
    lower_scatters,
    use_real_signs,
    eliminate_dead_code,
    lower_selections,
    guard_zeros,
    merge_common_subexpressions,
    eliminate_dead_code,
)

STEP_PASSES: tuple[Pass, ...] = (
    functionalize,
    reconnect_gradients,
    relax_views,
    lower_scatters,
    use_real_signs,
    write_out_normalization,
    eliminate_dead_code,
    lower_selections,
    guard_zeros,
    merge_common_subexpressions,
    eliminate_dead_code,
)


def first_order(program: Program) -> Program:
    """Returns the form of a program whose inner gradients are constants."""
    return apply_passes(program, (stop_inner_gradients,), verify)


def lower(program: Program, passes: tuple[Pass, ...]) -> Program:
    """Applies the passes, each verified, and names the results."""
    program = apply_passes(program, passes, verify).tidied()
    for slot, node in zip(program.results, program.returned, strict=True):
        if slot.role in CARRIED and node.op == "call_function" and not node.name.endswith("_next"):
            node._rename(slot.result_name)
    return program
