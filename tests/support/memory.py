"""Counts the bytes of live tensors, so that memory is a number that repeats."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make while it is on: those alive now, and the most at one time.

    What operators allocate and free inside themselves is not seen.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shared = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), shared)
        return out

    def _add(self, storage, shared):
        key, size = storage._cdata, storage.nbytes()
        if key in shared or key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self._known.discard(key)
        self.live -= size


def peak_of(function):
    """Returns the most bytes that were alive at one time, of those that a function made."""
    with LiveBytes() as counter:
        function()
    return counter.peak
