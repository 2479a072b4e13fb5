"""Hooks on parameters that leave with their owner."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

Register = Callable[[Tensor], Iterable[Any]]


class ParameterHooks:
    """Hooks on those of a list of parameters that require a gradient; nothing is done while the list stays the same."""

    def __init__(self) -> None:
        self._hooked: tuple[int, ...] = ()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def put(self, params: Sequence[Tensor], register: Register) -> None:
        """Hooks these parameters and no others; `register` returns the handles of one parameter's hooks."""
        params = [p for p in params if p.requires_grad]
        key = tuple(map(id, params))
        if key == self._hooked:
            return
        self._hooked = ()  # an interrupt must not leave some hooked and taken for all
        _remove(self._handles)
        for p in params:
            self._handles += register(p)
        self._hooked = key


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
