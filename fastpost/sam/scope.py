"""Which tensors SAM perturbs."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

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


def norm_layers(model: nn.Module) -> Callable[[str | None, Tensor], bool]:
    """A scope of the gains and offsets of norm layers only (SAM-ON, 2306.04226): 0.1 % of a model, best kept in float32.

    Use it where a copy of all weights is too much, or where they are in 16 bits and would not hold the perturbation.

    Raises:
        ValueError: the model has no module whose class name ends in "Norm" (or "Norm" and a dimension).
    """
    norms = [m for m in model.modules() if type(m).__name__.rstrip("123d").endswith("Norm")]
    inside = {id(p) for m in norms for p in m.parameters(recurse=False)}
    if not inside:
        raise ValueError(f"norm_layers: {type(model).__name__} has no norm layer with parameters")
    return lambda name, p: id(p) in inside


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
