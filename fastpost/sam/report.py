"""What a perturbation was meant to be, what was stored of it, and what the forward pass sees of it."""

from __future__ import annotations

import torch
from torch import Tensor

REMEDIES = (
    "perturb a small float32 part of the model (scope=, for example adapters, norms or the head), use a larger rho, or keep "
    "the weights and the forward pass in a wider dtype"
)


class PerturbationReport:
    """Sums gathered by the pass that wrote w + e, and what follows from them.

    Every attribute is a float64 scalar on the parameters' device; nothing waits for the device until one is read with
    `float()`. "Stored" is the difference that w + e left in the weights after rounding to their dtype; "seen" is the
    difference after both are cast to the dtype that the forward pass computes in.

    Attributes:
        intended_norm: norm of e as the equations ask for it.
        stored_norm, stored_cosine: norm of what was stored, and its cosine with e.
        seen_norm, seen_cosine: the same for what the forward pass sees.
        changed_fraction: share of the perturbed elements whose stored weight differs.
    """

    def __init__(self, sums: Tensor, elements: int) -> None:
        intended, stored, stored_dot, seen, seen_dot, changed = sums.unbind()
        self.intended_norm = intended.sqrt()
        self.stored_norm = stored.sqrt()
        self.stored_cosine = _cosine(stored_dot, intended, stored)
        self.seen_norm = seen.sqrt()
        self.seen_cosine = _cosine(seen_dot, intended, seen)
        self.changed_fraction = changed / max(elements, 1)

    def as_dict(self) -> dict[str, float]:
        """All attributes as Python floats; waits for the device."""
        return {name: float(value) for name, value in vars(self).items()}

    def concern(self) -> str | None:
        """Why this perturbation is not what SAM asks for, with remedies that work, or None; waits for the device."""
        v = self.as_dict()
        if v["intended_norm"] == 0:
            return None
        ratio = v["seen_norm"] / v["intended_norm"]
        if 0.5 <= ratio <= 2 and v["seen_cosine"] >= 0.5:
            return None
        return (
            f"SAM's perturbation hardly survives rounding: the forward pass sees {ratio:.2g} times the intended norm at "
            f"cosine {v['seen_cosine']:.2g} ({v['changed_fraction']:.1%} of the weights change). Remedies: {REMEDIES}."
        )

    def __repr__(self) -> str:
        return f"PerturbationReport({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"


def _cosine(dot: Tensor, a_sq: Tensor, b_sq: Tensor) -> Tensor:
    product = (a_sq * b_sq).sqrt()
    return torch.where(product > 0, dot / product, torch.zeros_like(dot))
