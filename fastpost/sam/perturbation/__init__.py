"""The kinds of perturbation: w + e stored over w, from masters, or in the layers' outputs; and how w is kept meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from fastpost.errors import unknown
from fastpost.sam.buckets import ShardReducer
from fastpost.sam.perturbation.functional import FunctionalPerturbation
from fastpost.sam.perturbation.fused_restore import FusedRestore, check_fused_restore
from fastpost.sam.perturbation.masters import MasterPerturbation
from fastpost.sam.perturbation.stash import build_stash
from fastpost.sam.perturbation.stored import Perturbation, PerturbParams, StochasticPerturbation

__all__ = [
    "FunctionalPerturbation",
    "FusedRestore",
    "MasterPerturbation",
    "PerturbParams",
    "Perturbation",
    "StochasticPerturbation",
    "build_fused_restore",
    "build_perturbation",
]


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


def build_fused_restore(bases: Sequence[Optimizer], perturbation: Perturbation, stash: str) -> FusedRestore:
    """Raises TypeError or ValueError where the base optimizers' step cannot be made from what this perturbation keeps."""
    if perturbation.stash is None:
        raise ValueError(
            "SAM: fused_restore=True steps from a stash, and perturb='functional' keeps none; nor do master_params"
        )
    if stash == "cpu":
        raise ValueError("SAM: fused_restore=True steps from what lies beside w + e, not from stash='cpu'; leave one out")
    check_fused_restore(bases)
    return FusedRestore()
