"""Options of SAM and what they mean: valid values, SAM's keys in groups, scopes, kinds of perturbation."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost.errors import unknown
from fastpost.ops import params as ops
from fastpost.sam.buckets import ShardReducer
from fastpost.sam.functional import FunctionalPerturbation
from fastpost.sam.masters import MasterPerturbation
from fastpost.sam.perturbation import Perturbation, StochasticPerturbation
from fastpost.sam.stash import build_stash


def check_fraction(who: str, fraction: float) -> None:
    """Raises ValueError unless the fraction lies in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{who}: ascent_fraction must lie in (0, 1], not {fraction}")


def check_dropout_rng(mode: str) -> None:
    """Raises ValueError for a mode that does not exist."""
    if mode not in ("same", "independent"):
        raise unknown("dropout_rng", mode, ("same", "independent"))


def check_options(
    ascent_fraction: float, dropout_rng: str, interval: int, compute_dtype: torch.dtype | None, sync_ascent: bool | None
) -> None:
    """Raises ValueError or TypeError for a value outside its range."""
    check_fraction("SAM", ascent_fraction)
    check_dropout_rng(dropout_rng)
    if int(interval) != interval or interval < 1:
        raise ValueError(f"SAM: interval must be a whole number >= 1, not {interval}")
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise TypeError(f"SAM: compute_dtype must be a floating-point dtype, not {compute_dtype}")
    if sync_ascent is not None and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"SAM: sync_ascent={sync_ascent} says how ranks share the ascent, but no process group is initialised; call "
            "torch.distributed.init_process_group() first, or leave it None in a single process"
        )


# -- in the optimizer's groups --------------------------------------------------------------------------------------------

# What SAM keeps in each group: the radius, and the number of steps, so that `interval` and random rounding resume.
RADIUS_KEYS = ("rho", "adaptive", "eta")
STEPS_KEY = "sam_steps"
GROUP_KEYS = (*RADIUS_KEYS, STEPS_KEY)


def fill_groups(groups: Iterable[dict[str, Any]], rho: float | None, adaptive: bool, eta: float, sam_steps: int = 0) -> None:
    """Gives groups the keys of SAM that they lack."""
    for group in groups:
        for key, value in zip(GROUP_KEYS, (rho, adaptive, eta, sam_steps), strict=True):
            group.setdefault(key, value)


def check_group(group: dict[str, Any]) -> None:
    """Raises TypeError or ValueError where a group holds nonsense under one of SAM's keys."""
    ops.check_radius("SAM", group["rho"], group["eta"])
    adaptive, steps = group["adaptive"], group["sam_steps"]
    if type(adaptive) is bool and type(steps) is int and steps >= 0:
        return  # as nearly always
    try:
        known = adaptive in (True, False)
    except (RuntimeError, ValueError):  # a tensor or an array of several
        known = False
    if not known:
        raise TypeError(f"SAM: adaptive must be True or False, not {adaptive!r}")
    ops.check_number("SAM", "sam_steps", steps)
    if int(steps) != steps:
        raise ValueError(f"SAM: sam_steps counts steps, so it must be a whole number, not {steps}")


# -- scope ----------------------------------------------------------------------------------------------------------------

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
    return chosen


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter's name fits one of the patterns, as in fnmatch."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def scope_in(model: nn.Module, patterns: Iterable[str]) -> Callable[[str | None, Tensor], bool] | None:
    """A scope by the names that a model has for its parameters, where the optimizer has none; None where no name fits."""
    patterns = list(patterns)
    inside = {id(p) for name, p in model.named_parameters() if fits(name, patterns)}
    return (lambda name, p: id(p) in inside) if inside else None


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
        self._ids = {id(p) for number in numbers for p in self.layers[number]}

    def __call__(self, name: str | None, p: Tensor) -> bool:
        return id(p) in self._ids


class ScopeCache:
    """A scope resolved anew whenever the optimizer's tensors are others: groups are added, trainers swap parameters."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._key: tuple[int, ...] = ()
        self._ids: set[int] | None = None
        self._step: int | None = None

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
            self._ids = resolve_scope(self._scope, groups)
            self._key = key
        return self._ids


# -- the kind of perturbation ---------------------------------------------------------------------------------------------


def build_perturbation(
    perturb: str,
    model: nn.Module | None,
    rounding: str,
    rounding_seed: int,
    masters: MasterPerturbation | None,
    stash: str,
    reducer: ShardReducer,
) -> Perturbation:
    """Raises ValueError or TypeError where the options do not go together."""
    if perturb not in ("stored", "functional"):
        raise unknown("perturb", perturb, ("stored", "functional"))
    if rounding not in ("nearest", "stochastic"):
        raise unknown("rounding", rounding, ("nearest", "stochastic"))
    kept = build_stash(stash)
    if stash != "copy" and (masters is not None or perturb == "functional"):
        other = "perturb='functional' writes no weight" if masters is None else "master_params hold w themselves"
        raise ValueError(f"SAM: stash={stash!r} says how w is kept, and {other}; leave one of the two out")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"SAM: model must be a torch.nn.Module, not {type(model).__name__}")
    if rounding == "stochastic" and (masters is not None or perturb == "functional"):
        other = "perturb='functional' rounds no weight" if masters is None else "master_params round m + e to nearest"
        raise ValueError(f"SAM: rounding='stochastic' has nothing to round here: {other}; leave one of the two out")
    if perturb == "functional":
        if masters is not None:
            raise ValueError(
                "SAM: perturb='functional' writes no weight, so it restores none from master_params; leave master_params out"
            )
        if model is None:
            raise TypeError("SAM: perturb='functional' works inside the model's layers: pass model=")
        return FunctionalPerturbation(reducer, model)
    if masters is not None:
        return masters
    return StochasticPerturbation(reducer, kept, rounding_seed) if rounding == "stochastic" else Perturbation(reducer, kept)
