"""The perturbation that SAM's options ask for."""

from __future__ import annotations

from torch import nn

from fastpost.errors import unknown
from fastpost.sam.functional import FunctionalPerturbation
from fastpost.sam.perturbation import Perturbation


def build_perturbation(perturb: str, model: nn.Module | None) -> Perturbation:
    """Raises ValueError or TypeError where the options do not go together."""
    if perturb not in ("stored", "functional"):
        raise unknown("perturb", perturb, ("stored", "functional"))
    if perturb == "stored":
        if model is not None:
            raise ValueError("SAM: model= is for perturb='functional'; a stored perturbation needs parameters only")
        return Perturbation()
    if not isinstance(model, nn.Module):
        raise TypeError("SAM: perturb='functional' works inside the model's layers: pass model=")
    return FunctionalPerturbation(model)
