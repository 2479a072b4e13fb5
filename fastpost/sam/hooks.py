"""Hooks on gradients as they arrive: they show a non-finite ascent, and let a variant rewrite before the caller clips."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost import distributed
from fastpost.ops import params as ops
from fastpost.sam.buckets import ShardReducer
from fastpost.sam.step import Gradients

Register = Callable[[Tensor], Iterable[Any]]


class ParameterHooks:
    """Hooks on those parameters that require a gradient; nothing is done while these are the same.

    Where a conversion swaps tensors (`to()` of a sharded model), torch puts another one into the parameter and leaves the
    hooks behind. They are put on anew then.
    """

    def __init__(self) -> None:
        self._selection: ops.Selection | None = None
        self._first = 0  # the first parameter's C++ tensor; a conversion that swaps one swaps them all
        self._hooked: tuple[tuple[int, int], ...] = ()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def put(self, lists: list[list[Tensor]], register: Register) -> None:
        """Hooks the parameters of these lists and no others; `register` returns the handles of one parameter's hooks."""
        first = next((p._cdata for part in lists for p in part), 0)
        if self._selection is not None and first == self._first and self._selection.same(lists):
            return
        params = [p for part in lists for p in part]
        selection, params = ops.Selection(params, "requires_grad"), [p for p in params if p.requires_grad]
        key = tuple((id(p), p._cdata) for p in params)
        if key != self._hooked:
            self._selection, self._hooked = None, ()  # an interrupt must not leave some hooked and taken for all
            _remove(self._handles)
            for p in params:
                _connect_hooks(p)
                self._handles += register(p)
            self._hooked = key
        self._selection, self._first = selection, first


def _connect_hooks(p: Tensor) -> None:
    """Has torch call the hooks in a parameter's dictionaries again.

    After a swap the C++ side no longer knows them, and torch would add further hooks without registering them there. Setting
    the attribute registers a dictionary again; an empty one becomes None, and torch makes and registers a new one.
    """
    for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(p, name)
        if hooks is not None:
            setattr(p, name, hooks or None)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def is_on_cpu(norm: Tensor) -> bool:
    """Whether reading this value avoids a device synchronization."""
    return norm.is_cpu


class OverflowGuard:
    """Carries a non-finite ascent norm into the second pass.

    GradScaler, fused base optimizers and our own test all look for NaN in gradients. So the first gradient of the second
    backward pass gets 0 * norm, that is NaN or nothing, added to one element: on the device, inside
    backward, hence before any `unscale_`. Parameters without a second gradient stay without one. A gradient that is
    assigned by hand (`torch.autograd.grad`) passes no hook; it is found when somebody who looks at gradients asks for the
    parameter groups, as GradScaler does.
    """

    def __init__(self, reducer: ShardReducer) -> None:
        self._reducer = reducer
        self._verdicts = torch.zeros((), device="cpu"), torch.ones((), device="cpu")  # never written
        self._norm: Tensor | None = None
        self._finite: Tensor | None = None  # a norm that has been looked at; reading takes as long as a small kernel
        self._hooks = ParameterHooks()

    def arm(self, norm: Tensor | None, params: Callable[[], list[list[Tensor]]]) -> None:
        """Marks the next gradient to appear; also again, after the gradients were dropped.

        Args:
            norm: squared norm of the ascent gradients; None where there was no ascent.
            params: returns lists of those that may get a second gradient.
        """
        if norm is None or norm is self._finite or (is_on_cpu(norm) and math.isfinite(norm)):
            self._norm, self._finite = None, norm
            return
        self._norm = norm
        self._hook(params())

    def disarm(self) -> None:
        """The second gradients are here, or will not be."""
        self._norm = None

    @property
    def waits(self) -> bool:
        """Whether no second gradient has been seen to carry the norm's verdict."""
        return self._norm is not None

    def plant_in(self, params: Callable[[], list[Tensor]]) -> None:
        """Marks a gradient that is there; again when asked again, because it may be dropped before the second pass."""
        norm, self._norm = self._norm, None
        assert norm is not None
        for p in params():
            # Not `local_gradient`, which may talk to other ranks: they need not be asking.
            if p.grad is not None and _plant(distributed.local(p.grad), norm):
                break
        self._norm = norm

    def _hook(self, params: list[list[Tensor]]) -> None:
        myself = weakref.ref(self)

        def plant(p: Tensor) -> None:
            guard = myself()
            if guard is not None and guard._norm is not None:
                grad = distributed.local_gradient(p)
                if grad is not None and _plant(grad, guard._norm):
                    guard._norm = None

        def register(p: Tensor) -> Iterable[Any]:
            return [p.register_post_accumulate_grad_hook(plant)]  # type: ignore[no-untyped-call]

        self._hooks.put(params, register)

    def check(self, norm: Tensor | None, found_inf: Tensor | None, params: list[Tensor]) -> Tensor:
        """1.0 where a gradient of either pass is not finite on any rank, else 0.0; float32, as GradScaler's found_inf.

        Args:
            norm: squared norm of the ascent gradients; None where there was no ascent.
            found_inf: what GradScaler found in the second gradients; None where nobody has looked: then they are looked at.
            params: those of the optimizer.
        """
        bad = self._verdict(norm)
        if found_inf is not None:
            if bad is not self._verdicts[0]:  # which is on the CPU, and a copy of it would wait for the device
                found_inf = torch.maximum(found_inf, bad.to(found_inf.device))
            return self._reducer.agree(found_inf.float())
        gradients = ops.gradients_of(params)
        if gradients:
            second = self._look_at(gradients, params)
            finite = norm is None or bad is self._verdicts[0]
            bad = second if finite else torch.maximum(bad.to(second.device), second)
        return self._reducer.agree(bad)

    def _verdict(self, value: Tensor | None) -> Tensor:
        """1.0 where a real scalar is not finite, else 0.0: float32, on its device."""
        if value is None or value is self._finite:
            return self._verdicts[0]
        if is_on_cpu(value):
            return self._verdicts[not math.isfinite(value)]
        return (~torch.isfinite(value)).float()

    @ops.without_grad
    def _look_at(self, gradients: list[Tensor], params: list[Tensor]) -> Tensor:
        """1.0 where an element of one of these parameters' gradients is not finite, else 0.0: float32, on the first one's
        device."""
        try:
            if set(map(type, gradients)) == {Tensor}:
                return self._verdict(ops.squared_norm(gradients))
        except (TypeError, ValueError):  # some are sparse, complex or without data
            pass
        gradients = [g for p in params if (g := distributed.local_gradient(p)) is not None]
        served = [g for g in gradients if _is_served(g)]
        found = [self._verdict(ops.squared_norm(served))] if served else []
        found += [(~is_finite(g)).float() for g in gradients if not _is_served(g)]
        return functools.reduce(lambda a, b: torch.maximum(a, b.to(a.device)), found)


def _is_served(gradient: Tensor) -> bool:
    with contextlib.suppress(TypeError, ValueError):
        ops.check_lists("SAM", {"gradients": [gradient]}, written=())
        return type(gradient) is Tensor and not gradient.is_meta
    return False


@ops.without_grad
def _plant(grad: Tensor, norm: Tensor) -> bool:
    """Adds NaN to one element where the norm is not finite, else 0; returns whether there was any."""
    values = values_of(grad)
    if values is None or not values.numel():
        return False
    values[(0,) * values.ndim].add_((norm * 0).to(values.device, values.dtype))
    return True


def values_of(gradient: Tensor) -> Tensor | None:
    """The values that a gradient stores, as memory that can be read and written; None where it has none."""
    if gradient.is_meta:
        return None
    if gradient.layout == torch.strided:
        return gradient
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient.values()


def is_finite(gradient: Tensor) -> Tensor:
    """Whether all of a gradient is, whatever its layout and dtype: a bool scalar on its device."""
    values = values_of(gradient)
    if values is None:
        return torch.ones((), dtype=torch.bool)
    wide = values if values.is_complex() or values.dtype.itemsize > 1 else values.float()
    return torch.isfinite(wide).all()


class Change(NamedTuple):
    """What the rewriting did to one gradient.

    Attributes:
        parameter: whose gradient it is.
        gradient: `p.grad`, to tell whether it is still the same.
        part: this rank's part of it.
        added: the difference that the rewriting made, like `part`.
    """

    parameter: Tensor
    gradient: Tensor
    part: Tensor
    added: Tensor


class EarlyRewriting:
    """Rewrites the gradients at the end of every backward pass that brings some.

    Nobody says which backward pass is a step's last one. So all gradients that there are so far are rewritten. If a further
    pass adds to them, the change is undone and then made for the sum. Between the passes that costs a copy of the gradients.
    `torch.autograd.grad` adds nothing, though it runs hooks on tensors.

    Args:
        wanted: whether gradients that arrive now are to be rewritten.
        gradients: returns this rank's part of every gradient present.
        rewrite: rewrites them in place.

    Attributes:
        done: whether the gradients present are rewritten.
    """

    def __init__(self, wanted: Callable[[], bool], gradients: Callable[[], Gradients], rewrite: Callable[[], None]) -> None:
        self._wanted, self._gradients, self._rewrite = map(weakref.WeakMethod, (wanted, gradients, rewrite))
        self._hooks = ParameterHooks()
        self._changes: dict[int, Change] = {}  # by the parameter's id
        self._there: dict[int, Tensor] = {}  # whether anything of a change is left; of gradients that may be added to
        self._pass = -1
        self.done = False

    def watch(self, params: list[list[Tensor]]) -> None:
        """Looks at the gradients of the parameters in these lists."""
        mine = weakref.ref(self)

        def register(p: Tensor) -> Iterable[Any]:
            key = id(p)  # a weak reference would keep torch from swapping the tensor, as `to()` of a sharded model does

            def before(gradient: Tensor) -> None:
                this = mine()
                if this is not None:
                    this._look(key)

            def after(p: Tensor) -> None:
                this = mine()
                if this is not None:
                    this._arrived(p)

            return p.register_hook(before), p.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]

        self._hooks.put(params, register)

    def forget(self) -> None:
        """The gradients have been used or dropped."""
        self._changes.clear()
        self._there.clear()
        self.done = False

    @ops.without_grad
    def _look(self, key: int) -> None:
        """Before a gradient is added to, or while `torch.autograd.grad` runs: what can only be seen now."""
        self._there.pop(key, None)
        change = self._changes.get(key)
        if change is not None and change.parameter.grad is change.gradient:
            self._there[key] = _left(change)

    @ops.without_grad
    def _arrived(self, p: Tensor) -> None:
        there = self._there.pop(id(p), None)
        if there is not None:
            change = self._changes.pop(id(p))
            part = change.part if p.grad is change.gradient else distributed.local_gradient(p)
            assert part is not None
            _subtract(part, change, there)
        if not _call(self._wanted):
            return
        self.done = False
        number = torch._C._current_graph_task_id()
        if number != self._pass:  # reentrant checkpointing runs passes inside of a pass; each has its own end
            self._pass = number
            _at_the_end(self._settle)

    def _settle(self) -> None:
        # DDP and FSDP2 put the last gradients in place in callbacks of their own, made during the pass or by each other.
        _at_the_end(lambda: _at_the_end(self._finish))

    @ops.without_grad
    def _finish(self) -> None:
        self._pass = -1
        if self.done or not _call(self._wanted):
            return
        for key in list(self._changes):
            self._take_back(key)
        found = _call(self._gradients)
        plain = {p: g.clone() for p, g in found.items()}
        _call(self._rewrite)
        for p, g in found.items():
            self._changes[id(p)] = Change(p, p.grad, g, g - plain.pop(p))
        self.done = True

    @ops.without_grad
    def _take_back(self, key: int) -> None:
        change = self._changes.pop(key, None)
        if change is not None and change.parameter.grad is change.gradient:
            _subtract(change.part, change, _left(change))


def _left(change: Change) -> Tensor:
    """Whether the gradient still holds its change: not where the caller has set it to zero in place. (Versions do not tell:
    gradients that are views of one buffer share theirs.)"""
    return change.part.count_nonzero() > 0


def _subtract(part: Tensor, change: Change, there: Tensor) -> None:
    part.sub_(torch.where(there, change.added, torch.zeros_like(change.added)))


def _at_the_end(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _call(method: Any) -> Any:
    alive = method()
    return None if alive is None else alive()
