"""Which tensors SAM perturbs: by a predicate or by patterns of names, in norm layers, in layers drawn for each step."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Scope = Callable[[str | None, Tensor], bool] | Iterable[str] | None


def resolve_scope(scope: Scope, groups: list[dict[str, Any]], grows: bool = False) -> set[int] | None:
    """Ids of the tensors in scope; None for all.

    Args:
        scope: a predicate of (name, tensor), where the name is None unless parameters are named; patterns as in fnmatch; or
            None.
        groups: an optimizer's parameter groups.
        grows: parameters may be added later, which a pattern that fits none now may be for.

    Raises:
        ValueError: patterns without named parameters; nothing is in scope; a pattern that fits no name, unless `grows`.

    Warns:
        UserWarning: that, where `grows`.
    """
    if scope is None:
        return None
    patterns = [scope] if isinstance(scope, str) else [] if callable(scope) else list(scope)
    if not callable(scope) and not all("param_names" in group for group in groups):
        raise ValueError("SAM: scope by name needs named parameters: pass model.named_parameters()")
    chosen = set()
    for group in groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            if scope(name, p) if callable(scope) else fits(name, patterns):
                chosen.add(id(p))
    if not chosen:
        raise ValueError(f"SAM: no parameter is in scope {scope if callable(scope) else patterns!r}")
    for pattern in _unused(patterns, [name for group in groups for name in group.get("param_names", ())]):
        if not grows:
            raise ValueError(f"SAM: no parameter is in scope {pattern!r}; correct the pattern, or leave it out")
        warnings.warn(
            f"SAM: the pattern {pattern!r} of scope fits no parameter; correct it, unless parameters are added later",
            stacklevel=2,
        )
    return chosen


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name fits one of the patterns, as in fnmatch."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _unused(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The patterns that fit no name."""
    return [pattern for pattern in patterns if not any(fits(name, [pattern]) for name in names)]


class TensorScope:
    """A scope of the tensors given: these very ones. Whoever copies or pickles it together with them finds the copies in it.

    Args:
        tensors: what is in scope; those that no optimizer holds do no harm.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._ids = set(map(id, self._tensors))

    def __call__(self, name: str | None, p: Tensor) -> bool:
        return id(p) in self._ids

    def __or__(self, other: TensorScope) -> TensorScope:
        return TensorScope([*self._tensors, *other._tensors])

    def __getstate__(self) -> dict[str, list[Tensor]]:
        return {"tensors": self._tensors}  # ids are those of this process and of the originals

    def __setstate__(self, state: dict[str, list[Tensor]]) -> None:
        TensorScope.__init__(self, state["tensors"])


def scope_in(model: nn.Module, patterns: Iterable[str]) -> TensorScope:
    """A scope by the names that a model has for its parameters, where the optimizer has none.

    Raises:
        ValueError: a pattern that fits no name.
    """
    patterns = list(patterns)
    named = list(model.named_parameters())
    for pattern in _unused(patterns, [name for name, _ in named]):
        raise ValueError(f"sam_scope: no parameter's name fits {pattern!r}; correct the pattern, or leave it out")
    return TensorScope(p for name, p in named if fits(name, patterns))


def norm_layers(model: nn.Module) -> TensorScope:
    """A scope of the gains and offsets of norm layers only (SAM-ON, 2306.04226): 0.1 % of a model, best kept in float32.

    Use it where a copy of all weights is too much, or where they are in 16 bits and would not hold the perturbation.

    Raises:
        ValueError: the model has no module whose class name ends in "Norm" (or "Norm" and a dimension).
    """
    norms = [m for m in model.modules() if type(m).__name__.rstrip("123d").endswith("Norm")]
    inside = [p for m in norms for p in m.parameters(recurse=False)]
    if not inside:
        raise ValueError(f"norm_layers: {type(model).__name__} has no norm layer with parameters")
    return TensorScope(inside)


class StepScope:
    """A scope that is asked anew at each step: subclasses are predicates of (name, tensor) for the step begun last.

    Until `begin` is called, the predicate is true for every tensor that may ever be drawn. What it says must depend on the
    step's number alone, so that ranks agree and a resumed run goes on as it would have.
    """

    def begin(self, step: int) -> None:
        """A step begins: how many were made before it, as the optimizer's groups count them."""
        raise NotImplementedError

    def __call__(self, name: str | None, p: Tensor) -> bool:
        raise NotImplementedError


class SampledLayers(StepScope):
    """SAM on layers that are drawn at random for each step, uniformly and without replacement (after 2602.09395).

    Layers are the blocks of the model's longest ModuleList, and all other weights together are one more. Those without a
    weight that learns do not count. The norm is that of the drawn layers, so e is as long as ever. The stash is as small as
    they are, and the second pass is SAM's. From the paper this takes the perturbation; its bandit, which draws layers by
    their gradients' norms, and its updates of drawn layers alone are left out.

    Args:
        model: the model, of whose layers that learn the optimizer has all weights; freeze others before.
        share: of the layers, in (0, 1]; at least one is drawn.
        seed: with the step's number, the key of the random numbers.

    Raises:
        ValueError: `share` outside (0, 1], or the model has no ModuleList.
    """

    def __init__(self, model: nn.Module, share: float = 0.25, seed: int = 0) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"SampledLayers: share must lie in (0, 1], not {share}")
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        if not stacks:
            raise ValueError(f"SampledLayers: {type(model).__name__} has no ModuleList, and so no layers to draw from")
        blocks = [list(block.parameters()) for block in max(stacks, key=len)]
        inside = {id(p) for block in blocks for p in block}
        others = [p for p in model.parameters() if id(p) not in inside]
        self.layers = [layer for layer in (*blocks, others) if any(p.requires_grad for p in layer)]
        self.share, self.seed = share, seed
        self._draw(list(range(len(self.layers))))

    def begin(self, step: int) -> None:
        """Draws the layers of a step; `drawn` are their numbers."""
        count = max(1, round(self.share * len(self.layers)))
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63)
        self._draw(sorted(torch.randperm(len(self.layers), generator=generator)[:count].tolist()))

    def _draw(self, numbers: list[int]) -> None:
        self.drawn = numbers
        self._inside = TensorScope(p for number in numbers for p in self.layers[number])

    def __call__(self, name: str | None, p: Tensor) -> bool:
        return self._inside(name, p)


class ScopeCache:
    """A scope resolved anew whenever the optimizer's tensors are others: groups are added, trainers swap parameters."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._key: tuple[int, ...] = ()
        self._ids: set[int] | None = None
        self._step: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_key": (), "_ids": None}  # a copy holds other tensors

    def begin(self, step: int) -> None:
        """Before the ascents of a step, whose number counts where the scope is asked at each."""
        if isinstance(self._scope, StepScope) and step != self._step:
            self._scope.begin(step)
            self._step, self._key = step, ()

    def ids(self, groups: list[dict[str, Any]]) -> set[int] | None:
        """Ids of the tensors in scope; None for all."""
        if self._scope is None:
            return None
        key = tuple(id(p) for group in groups for p in group["params"])
        if key != self._key:
            self._ids = resolve_scope(self._scope, groups, grows=True)
            self._key = key
        return self._ids
