"""Compiled programs: each step, forward and adjoint, as two programs for a backend, and the loop over them."""
