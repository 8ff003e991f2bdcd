"""Contenders of the benchmarks that are not as they should be."""

from benchmarks.contenders_stock import by_hand
from benchmarks.meta_gradient import NotThereError


def scaled(problem):
    """Gives gradients that are a thousandth too large."""
    run = by_hand(problem)

    def off():
        outcome = run()
        return outcome | {"params": {name: 1.001 * grad for name, grad in outcome["params"].items()}}

    return off


def absent(problem):
    """Cannot do it."""
    raise NotThereError("this is for | others")
