"""The perturbation that SAM's options ask for."""

from __future__ import annotations

from torch import nn

from fastpost.errors import unknown
from fastpost.sam.functional import FunctionalPerturbation
from fastpost.sam.masters import MasterPerturbation, Masters
from fastpost.sam.perturbation import Perturbation
from fastpost.sam.rounding import StochasticPerturbation


def build_perturbation(
    perturb: str, model: nn.Module | None, rounding: str, rounding_seed: int, masters: Masters | None
) -> Perturbation:
    """Raises ValueError or TypeError where the options do not go together."""
    if perturb not in ("stored", "functional"):
        raise unknown("perturb", perturb, ("stored", "functional"))
    if rounding not in ("nearest", "stochastic"):
        raise unknown("rounding", rounding, ("nearest", "stochastic"))
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
        return FunctionalPerturbation(model)
    if masters is not None:
        return MasterPerturbation(masters)
    return StochasticPerturbation(rounding_seed) if rounding == "stochastic" else Perturbation()
