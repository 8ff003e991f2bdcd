"""What the trial of an optimizer's step finds out, on copies and on tensors without memory."""

import torch

from gimli_compile import protocol
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.schedulers import Schedulers

NEVER, ALWAYS = 1 << 60, 0


def facts_of(monkeypatch, make, large):
    """Returns everything that a trial notes, and whether it was made without memory; `make` gives model, optimizer."""
    monkeypatch.setattr(protocol, "LARGE", large)
    model, optimizer, *scheduler = make()
    schedulers = Schedulers(*scheduler)
    names = {id(p): name for name, p in model.named_parameters()}
    view = OptimizerView(optimizer, names, schedulers=schedulers)
    left, forms = [], []
    with monkeypatch.context() as patched:
        observe, try_form = OptimizerView.observe, protocol._try_form
        patched.setattr(OptimizerView, "observe", lambda *a, **k: left.append(observe(*a, **k)) or left[-1])
        patched.setattr(protocol, "_try_form", lambda *a: forms.append(try_form(*a)) or forms[-1])
        found = protocol.choose_protocol(view, is_needed=False)
    structure = None
    if left:
        values = {path: form_of(value) for path, value in left[-1].values.items()}
        structure = [repr(part) for part in left[-1].skeleton.key if not isinstance(part, tuple) or part[0] != "object"]
        structure = (structure, values)
    hyper = sorted(view.hyper_paths), sorted(view.changing)
    return (found, view.sparse, hyper, structure), bool(forms) and forms[-1] is not None


def form_of(value):
    """Returns a number, or the form of a tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, tuple(value.shape), value.stride(), value.device, value.requires_grad


def same_facts(monkeypatch, make):
    """Compares both trials; returns whether the one without memory was enough."""
    expected, _ = facts_of(monkeypatch, make, NEVER)
    found, hollow = facts_of(monkeypatch, make, ALWAYS)
    assert found == expected
    return hollow
