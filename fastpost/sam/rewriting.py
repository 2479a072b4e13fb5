"""A variant's rewriting of gradients, made as soon as a backward pass is over, before the caller clips."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost.sam.hooks import ParameterHooks
from fastpost.sam.memory import Gradients


class Change(NamedTuple):
    """What the rewriting did to one gradient.

    Attributes:
        gradient: `p.grad`, to tell whether it is still the same.
        part: this rank's part of it.
        added: the difference that the rewriting made, like `part`.
    """

    gradient: Tensor
    part: Tensor
    added: Tensor


class EarlyRewriting:
    """Rewrites the gradients at the end of every backward pass that brings some.

    Nobody says which backward pass is a step's last one. So all gradients that there are so far are rewritten. If a further
    pass adds to them, the change is undone before the new gradients are added, and then made for the sum. Between the passes
    that costs a copy of the gradients.

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
        self._changes: dict[Tensor, Change] = {}
        self._pass = -1
        self.done = False

    def watch(self, params: list[Tensor]) -> None:
        """Looks at the gradients of these parameters."""
        mine = weakref.ref(self)

        def register(p: Tensor) -> Iterable[Any]:
            parameter = weakref.ref(p)

            def before(gradient: Tensor) -> None:
                this, p = mine(), parameter()
                if this is not None and p is not None:
                    this._take_back(p)

            def after(p: Tensor) -> None:
                this = mine()
                if this is not None:
                    this._arrived()

            return p.register_hook(before), p.register_post_accumulate_grad_hook(after)  # type: ignore[no-untyped-call]

        self._hooks.put(params, register)

    def forget(self) -> None:
        """The gradients have been used or dropped."""
        self._changes.clear()
        self.done = False

    def _arrived(self) -> None:
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

    @torch.no_grad()
    def _finish(self) -> None:
        self._pass = -1
        if self.done or not _call(self._wanted):
            return
        for p in list(self._changes):
            self._take_back(p)
        found = _call(self._gradients)
        plain = {p: g.clone() for p, g in found.items()}
        _call(self._rewrite)
        for p, g in found.items():
            self._changes[p] = Change(p.grad, g, g - plain.pop(p))
        self.done = True

    @torch.no_grad()
    def _take_back(self, p: Tensor) -> None:
        change = self._changes.pop(p, None)
        if change is not None and p.grad is change.gradient:
            # Where the caller has set it to zero in place, nothing of the change is left. (Versions do not tell: gradients
            # that are views of one buffer share theirs.)
            there = change.part.count_nonzero() > 0
            change.part.sub_(torch.where(there, change.added, torch.zeros_like(change.added)))


def _at_the_end(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _call(method: Any) -> Any:
    alive = method()
    return None if alive is None else alive()
