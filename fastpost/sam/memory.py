"""What variants of SAM work with: sums over all ranks, and tensors kept per parameter from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fastpost.sam.reduction import Reduction, add_part

Gradients = dict[Tensor, Tensor]


class Memory:
    """Given to the hooks of a variant.

    Args:
        reduction: how ranks add up.
        state: returns the base optimizer's state, where kept tensors live.
        tensors: returns all parameters.
        maximized: returns the ids of those whose loss the base optimizer maximises.
        names: what a variant keeps per parameter.
    """

    def __init__(
        self,
        reduction: Reduction,
        state: Callable[[], MutableMapping[Tensor, Any]],
        tensors: Callable[[], list[Tensor]],
        maximized: Callable[[], set[int]],
        names: tuple[str, ...],
    ) -> None:
        self._reduction = reduction
        self._state = state
        self.tensors = tensors
        self.maximized = maximized
        self._names = names
        self._pending: dict[Tensor, dict[str, Tensor]] = {}

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """The base optimizer's state."""
        return self._state()

    def dot(self, a: Gradients, b: Gradients) -> Tensor:
        """Sum of a * b over all parameters that both hold, and over all ranks: a float64 scalar."""
        parts: dict[Hashable, Tensor] = {}
        for p, x in a.items():
            if p in b:
                add_part(parts, self._reduction.key(p), (x.double() * b[p].double()).sum())
        return self._reduction.total(parts) if parts else torch.zeros((), dtype=torch.float64)

    def kept(self, p: Tensor, name: str) -> Tensor:
        """What was kept for a parameter; zeros before."""
        value = self._pending.get(p, {}).get(name)
        if value is None and p in self.state:
            value = self.state[p].get(name)
        return torch.zeros_like(self._reduction.local(p)) if value is None else self._reduction.local(value)

    def keep(self, p: Tensor, name: str, value: Tensor) -> None:
        """Keeps a tensor for a parameter; it enters `state[p]` once the base optimizer has made its own entries there."""
        self._pending.setdefault(p, {})[name] = value

    def forget(self) -> None:
        """What was to be kept belonged to a step that is not made."""
        self._pending.clear()

    def store(self, gradients: Gradients) -> None:
        """After a step with these gradients: every name is in the state of their parameters."""
        for p in gradients if self._names else ():
            values = {name: self.kept(p, name) for name in self._names}
            self._pending.pop(p, None)
            state = self.state.setdefault(p, {})
            for name, value in values.items():
                if name in state:
                    self._reduction.local(state[name]).copy_(value)
                else:
                    state[name] = self._reduction.like(p, value.detach().clone())
