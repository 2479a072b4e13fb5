"""Which tensors SAM perturbs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

Scope = Callable[[str | None, Tensor], bool] | Iterable[str] | None


def resolve_scope(scope: Scope, groups: list[dict[str, Any]]) -> set[int] | None:
    """Ids of the tensors in scope; None for all.

    Args:
        scope: a predicate of (name, tensor), where the name is None unless parameters are named; patterns as in fnmatch; or
            None.
        groups: an optimizer's parameter groups.

    Raises:
        ValueError: patterns without named parameters; nothing is in scope.
    """
    if scope is None:
        return None
    patterns: list[str] | None = None
    if not callable(scope):
        patterns = [scope] if isinstance(scope, str) else list(scope)
        if not all("param_names" in group for group in groups):
            raise ValueError("SAM: scope by name needs named parameters: pass model.named_parameters()")
    chosen = set()
    for group in groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            if patterns is None:
                inside = scope(name, p)  # type: ignore[operator]
            else:
                inside = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            if inside:
                chosen.add(id(p))
    if not chosen:
        raise ValueError(f"SAM: no parameter is in scope {patterns if patterns is not None else scope!r}")
    return chosen


class ScopeCache:
    """A scope resolved anew whenever the optimizer's tensors are others: groups are added, trainers swap parameters."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._key: tuple[int, ...] = ()
        self._ids: set[int] | None = None

    def ids(self, groups: list[dict[str, Any]]) -> set[int] | None:
        """Ids of the tensors in scope; None for all."""
        if self._scope is None:
            return None
        key = tuple(id(p) for group in groups for p in group["params"])
        if key != self._key:
            self._ids = resolve_scope(self._scope, groups)
            self._key = key
        return self._ids
