"""A perturbation of the embeddings that is kept from pass to pass and moved uphill in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastpost.r3f.noise import Noise, handed_on


@dataclass
class Delta(Noise):
    """Added in place of drawn noise; the first pass draws its start, as `Noise` with the same attributes would.

    Attributes:
        value: the perturbation, float32 or wider, of the embeddings' shape, 0 at padding; a leaf that requires grad. None
            before the first pass.
        kept: where it may be other than 0; None: everywhere.
    """

    value: Tensor | None = None
    kept: Tensor | None = None

    def add(self, x: Tensor, keep: Tensor | None, call: int = 0) -> Tensor:
        """x + value, out of place, rounded once; gradients flow into both."""
        if call:
            raise ValueError(
                "R3F: the embedding runs more than once in a forward pass, so one perturbation cannot serve; pass the "
                "module that embeds the input as embedding="
            )
        work = torch.promote_types(x.dtype, torch.float32)
        if self.value is None:
            with torch.no_grad():
                self.value, self.kept = super().add(torch.zeros_like(x, dtype=work), keep), keep
            self.value.requires_grad_()
        return (x.to(work) + self.value).to(handed_on(x))

    @torch.no_grad()
    def ascend(self, gradient: Tensor, rate: float, order: float, radius: float) -> None:
        """value += rate * gradient / norm, then back into the ball; a leaf again, without gradient.

        Args:
            gradient: of value's shape; what lies at padding is left out.
            rate: length of the step in the norm.
            order: 2 or inf; norms are those of each text, (..., time, width) without the leading dimensions.
            radius: of the ball around 0; with order 2, 0 stands for none, as in FreeLB's code.
        """
        assert self.value is not None
        if self.kept is not None:
            gradient = torch.where(self.kept[..., None], gradient, 0)
        length = torch.linalg.vector_norm(gradient, order, dim=(-2, -1), keepdim=True)
        # A zero gradient has no direction; one that overflowed (loss scaling) is skipped, as the optimizer's step will be.
        usable = (length > 0) & length.isfinite()
        moved = self.value + rate * torch.where(usable, gradient / torch.where(usable, length, 1), 0)
        if order == torch.inf:
            moved = moved.clamp(-radius, radius)
        elif radius > 0:
            reached = torch.linalg.vector_norm(moved, order, dim=(-2, -1), keepdim=True)
            moved = moved * torch.where(reached > radius, radius / reached, 1)
        self.value = moved.requires_grad_()
