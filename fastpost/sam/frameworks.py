"""SAM inside the optimizer wrappers of other libraries: Lightning, Fabric, Accelerate.

Lightning and Fabric derive a class from their wrapper and from the optimizer's class, so that `isinstance` holds. Methods of
SAM would then run with the wrapper as `self`: what they note there, the optimizer itself would never see. So such a class
passes on to the wrapped SAM, and its `step` ends SAM's part before the wrapper's begins: what Lightning unscales, clips,
counts and steps is an ordinary optimizer at w, with the gradients of the second pass.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastpost.distributed import local
from fastpost.sam.hooks import values_of

_SPENT = "_spent_by_sam"  # an attribute of gradients: their version when a step had used them


def find_sam(optimizer: Any) -> Any:
    """The SAM inside any wrappers that keep it as `.optimizer`; None where there is none."""
    found = None
    while optimizer is not None:
        if "_bases" in getattr(optimizer, "__dict__", {}):
            found = optimizer
        inner = getattr(optimizer, "optimizer", None)
        optimizer = None if inner is optimizer else inner
    return found


def wrapper_among(bases: tuple[type, ...], own: type) -> type | None:
    """The base class, other than SAM's own, of which an instance keeps an optimizer as `.optimizer` and steps it."""
    for c in bases:
        if (
            not issubclass(c, own)
            and isinstance(inspect.getattr_static(c, "optimizer", None), property)
            and hasattr(c, "step")
        ):
            return c
    return None


def imitate(cls: Any, wrapper: type) -> None:
    """Makes `cls`, derived from `wrapper` and SAM, pass on all that SAM has and the wrapper does not.

    `second_step` stays SAM's own: it asks, steps and clears by the methods that are passed on.
    """
    wrappers = {name for c in wrapper.__mro__[:-1] for name in vars(c)}
    for name in dir(cls):
        found = inspect.getattr_static(cls, name)
        if name.startswith("_") or name in wrappers or name == "second_step":
            continue
        if isinstance(found, property):
            setattr(cls, name, _passed_on_value(name, found))
        elif inspect.isfunction(found):
            setattr(cls, name, _passed_on_method(name, found))
    cls.step = _step_of(wrapper)


def _reached(self: Any) -> Any:
    """The SAM inside a wrapper. GradScaler may skip its step, because w is back before the scaler is asked."""
    sam = find_sam(self)
    sam._step_supports_amp_scaling = False
    module = getattr(getattr(self, "_strategy", None), "lightning_module", None)
    if module is not None:
        sam.set_model(module)
    return sam


def _passed_on_value(name: str, found: property) -> property:
    def get(self: Any) -> Any:
        return getattr(_reached(self), name)

    def put(self: Any, value: Any) -> None:
        setattr(_reached(self), name, value)

    return property(get, put if found.fset is not None else None, doc=found.__doc__)


def _passed_on_method(name: str, found: Any) -> Any:
    @functools.wraps(found)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(_reached(self), name)(*args, **kwargs)

    return method


def _step_of(wrapper: Any) -> Any:
    # Lightning calls the closure itself, and takes None for a batch without a loss. Fabric hands it to GradScaler, which
    # refuses any; it needs none, because both passes are made by then.
    calls_closures = hasattr(wrapper, "toggle_model")

    def step(self: Any, closure: Callable[[], Any] | None = None, *, reuse_grads: bool = False, **kwargs: Any) -> Any:
        """One update through the wrapper, once; as `SAM.step`.

        Raises:
            RuntimeError: gradients that earlier micro-batches have left, which the closure's second pass would not have.
        """
        sam = _reached(self)
        if closure is None:
            sam.end_ascent()
            with sam.stepped_by_others():
                result = wrapper.step(self, **kwargs)
        else:
            stray = [] if reuse_grads else _strays(sam)
            try:
                loss = sam.passes(_watched(closure, stray, sam), reuse_grads=reuse_grads, clear=not stray)
            except _NoLoss:
                loss = None
            with sam.stepped_by_others():
                handed = (lambda: loss,) if calls_closures else ()
                wrapper.step(self, *handed, **kwargs)
            result = loss
        for gradient in (p.grad for p in sam.tensors() if p.grad is not None):
            # On the tensor itself: a weak reference would keep torch from swapping it, as `to()` of a sharded model does.
            vars(gradient)[_SPENT] = gradient._version
        return result

    return step


def _strays(sam: Any) -> list[tuple[Tensor, Tensor]]:
    """Parameters with gradients, other than zeros, that no step has used: they may be of earlier micro-batches."""
    present = [(p, p.grad) for p in sam.tensors() if p.grad is not None]
    found = [(p, gradient) for p, gradient in present if vars(gradient).get(_SPENT) != gradient._version]
    values = (values_of(local(gradient)) for _, gradient in found)
    return found if any(v is not None and bool(v.count_nonzero()) for v in values) else []


class _NoLoss(Exception):
    """The first pass made neither a loss nor gradients, as where Lightning's `training_step` returns None."""


def _watched(closure: Callable[[], Any], stray: list[tuple[Tensor, Tensor]], sam: Any) -> Callable[[], Any]:
    """The closure; its first call raises where it adds to the stray gradients instead of dropping them before."""
    cycle, first = sam.cycle, True

    def watched() -> Any:
        nonlocal first
        loss = closure()
        if first and loss is None and all(p.grad is None for p in sam.tensors()):
            raise _NoLoss
        kept = sam.cycle == cycle and any(p.grad is gradient for p, gradient in stray)
        if first and kept and sam.ascends:
            sam.abandon()
            raise RuntimeError(
                "SAM: this step's closure adds to the gradients of earlier micro-batches, which the second pass would drop; "
                "accumulate with fastpost.integrations.lightning.SAMCallback in Lightning, with fastpost.SAMWindow elsewhere"
            )
        first = False
        return loss

    return watched


def refuse_accumulating_closure() -> None:
    """Raises RuntimeError in a step by Accelerate while it accumulates: it passes on the last micro-batch's closure only.

    Accelerate marks neither the optimizers that it wraps nor their steps, and its state is one for the whole process, where
    other optimizers may be stepped too. So we look at who called: `accelerate.optimizer`, through wrappers that torch and
    its schedulers put around `step`.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or (steps := accelerate.GradientState().num_steps) <= 1:
        return
    frame = sys._getframe(2)  # of who called `step`
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "fastpost.sam.")):
        frame = frame.f_back
    if frame.f_globals.get("__name__") == "accelerate.optimizer":
        raise RuntimeError(
            f"SAM: Accelerate accumulates {steps} micro-batches and hands over the closure of the last one only: "
            "the others would be dropped; use fastpost.integrations.accelerate.AcceleratedWindow"
        )
