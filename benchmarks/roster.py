"""Who takes part: names, where their code is, and what they are compared with. Imports none of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STOCK, GIMLI = "benchmarks.contenders_stock", "benchmarks.contenders_gimli"
LIBRARIES, JAX = "benchmarks.contenders_libraries", "benchmarks.contenders_jax"


@dataclass(frozen=True)
class Contender:
    """A way to the meta-gradient.

    Args:
        key: its name on the command line and in files.
        title: its name in tables.
        family: "plain", "gimli", "torch", "library" or "jax".
        module: the module with its function.
        function: makes a run: of a problem in torch, of a workload and a setting in JAX.
        options: keyword arguments of the function.
        baseline: the plain training, in the same executor, that its time is divided by.
        is_exact: False for what approximates the gradient on purpose.
    """

    key: str
    title: str
    family: str
    module: str
    function: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    baseline: str = "plain"
    is_exact: bool = True


def _gimli(key: str, title: str, **options: Any) -> Contender:
    is_exact = options.pop("is_exact", True)
    compiled = options.get("backend") in ("inductor", "torchscript")
    baseline = "plain-compiled" if compiled else "plain-vmap"
    title = f"gimli_compile, {title}"
    return Contender(f"gimli-{key}", title, "gimli", GIMLI, "meta_gradient", options, baseline, is_exact)


def _stock(key: str, title: str, function: str, baseline: str = "plain") -> Contender:
    return Contender(key, title, "torch", STOCK, function, {}, baseline)


def _jax(key: str, title: str, **options: Any) -> Contender:
    return Contender(key, title, "jax", JAX, "meta_gradient", options, "plain-jax")


REFERENCE = Contender("reference", "reference", "plain", "benchmarks.reference", "reference_run")

CONTENDERS: tuple[Contender, ...] = (
    Contender("plain", "plain training, torch", "plain", STOCK, "plain_training"),
    Contender("plain-vmap", "plain training, torch.func.vmap", "plain", STOCK, "plain_vmap"),
    Contender("plain-compiled", "plain training, torch.compile of the step", "plain", STOCK, "plain_compiled"),
    Contender("plain-jax", "plain training, JAX jit(scan)", "plain", JAX, "plain_training"),
    _gimli("reverse", "reverse"),
    _gimli("step", "reverse, checkpoint='step'", checkpoint="step"),
    _gimli("sqrt", "reverse, checkpoint='sqrt'", checkpoint="sqrt"),
    _gimli("mixed", "mixed", backward="mixed"),
    _gimli("mixed-sqrt", "mixed, checkpoint='sqrt'", backward="mixed", checkpoint="sqrt"),
    _gimli("forward", "forward, in the hyperparameters alone", backward="forward", only="hyper"),
    _gimli("first-order", "order=1", order=1, is_exact=False),
    _gimli("implicit", "implicit", backward="implicit", is_exact=False),
    *(
        _gimli(f"{backend}-{key}", f"{title}, {backend}", backend=backend, **options)
        for backend in ("eager", "torchscript", "inductor")
        for key, title, options in (
            ("reverse", "reverse", {}),
            ("step", "reverse, checkpoint='step'", {"checkpoint": "step"}),
            ("mixed", "mixed", {"backward": "mixed"}),
            ("mixed-sqrt", "mixed, checkpoint='sqrt'", {"backward": "mixed", "checkpoint": "sqrt"}),
            ("sqrt", "reverse, checkpoint='sqrt'", {"checkpoint": "sqrt"}),
        )
    ),
    _gimli("inductor-gradient", "reverse, meta_gradient, inductor", backend="inductor", at_once=True),
    _gimli("graphs-reverse", "reverse, inductor, CUDA graphs", backend="inductor", mode="reduce-overhead"),
    _stock("by-hand", "loop by hand, create_graph", "by_hand"),
    _stock("func-loop", "torch.func, eager", "func_loop"),
    _stock("func-vmap", "torch.func, eager, vmap over tasks", "func_vmap", "plain-vmap"),
    _stock("compile-autograd", "torch.compile of the loop, autograd.grad inside", "compile_autograd", "plain-compiled"),
    _stock("compile-func", "torch.compile of the loop, torch.func", "compile_func", "plain-compiled"),
    _stock("compile-step", "torch.compile of a step, called J times", "compile_step", "plain-compiled"),
    Contender("higher", "higher 0.2.1", "library", LIBRARIES, "run_higher"),
    Contender("torchopt", "TorchOpt 0.7.3", "library", LIBRARIES, "run_torchopt"),
    _jax("jax", "JAX, scan"),
    _jax("jax-checkpoint", "JAX, scan of jax.checkpoint", checkpoint=True),
    _jax("jax-optax", "JAX, scan, optax", rule="optax"),
)


def chosen(names: list[str]) -> list[Contender]:
    """Returns the contenders with a key that is named or that begins with a name; all without names.

    The plain trainings that they are divided by come along.
    """
    strange = [name for name in names if not any(_is_named(one.key, name) for one in CONTENDERS)]
    if strange:
        raise SystemExit(f"no such contender: {', '.join(strange)}. There are {', '.join(c.key for c in CONTENDERS)}.")
    if not names:
        return list(CONTENDERS)
    named = [one for one in CONTENDERS if any(_is_named(one.key, name) for name in names)]
    needed = {one.baseline for one in named} | {"plain"}
    return [one for one in CONTENDERS if one in named or one.key in needed]


def _is_named(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}-")
