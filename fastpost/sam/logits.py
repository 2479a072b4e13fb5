"""Variants of SAM that act on the logits of a language model: logits-SAM and Functional-SAM."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from fastpost.sam.optimizer import SAM

LossOfLogits = Callable[[Tensor], Tensor]


def logits_sam(
    hidden: Tensor, weight: Tensor, loss: LossOfLogits, rho: float = 0.05, *, bias: Tensor | None = None
) -> Tensor:
    """The loss at a perturbed head, in one pass (logits-SAM, 2603.18258).

    Only the output matrix W moves, by e = rho G / |G| with G = dZ^T H the gradient of its own loss. Neither G nor W + e is
    formed where tokens are fewer than the head is wide: Z' = Z + rho / |G| (H H^T) dZ, and |G|^2 = <H H^T, dZ dZ^T>. Use it
    for preference tuning (the authors: DPO at rho = 1e-3), where the rest of the model needs no second pass; any optimizer
    will do, `fastpost.SAM` is not needed.

    Args:
        hidden: (..., width), the head's inputs.
        weight: (vocabulary, width).
        loss: from logits (..., vocabulary) to a scalar; called twice.
        rho: radius, >= 0.
        bias: (vocabulary,), not perturbed.

    Returns:
        The loss at w + e, with gradients to `hidden`, `weight` and `bias`; e counts as a constant, as in SAM. Where G is
        zero or not finite, the loss at w.
    """
    if not rho >= 0:
        raise ValueError(f"logits_sam: rho must be >= 0, not {rho}")
    logits = torch.nn.functional.linear(hidden, weight, bias)
    with torch.enable_grad():
        at = logits.detach().requires_grad_()
        (dz,) = torch.autograd.grad(loss(at), at)
    d, h = dz.flatten(0, -2), hidden.flatten(0, -2)
    kept = h.detach()
    tokens, (vocabulary, width) = len(h), weight.shape
    gram = tokens * (width + vocabulary) < 2 * width * vocabulary  # which order of products is cheaper
    if gram:
        squared = ((kept @ kept.T).double() * (d @ d.T).double()).sum()
    else:
        g = d.T @ kept
        squared = g.double().square().sum()
    moves = torch.isfinite(squared) & (squared > 0)
    c = torch.where(moves, rho / squared.sqrt(), torch.zeros_like(squared)).to(logits.dtype)
    gain = (h @ kept.T) @ d if gram else h @ g.T
    gain = torch.where(moves, gain, torch.zeros_like(gain))  # 0 * inf is not 0
    return loss(logits + (c * gain).view_as(logits))


class FunctionalSAM:
    """Functional-SAM (2502.02407): the Jacobian at w + e, but the loss's derivative with respect to the logits from w.

    SAM in language models mostly acts through the logits' statistics; this takes that path away. Use it where plain SAM
    hurts perplexity. Call it with logits and a loss inside the closure (or a window's `forward_backward`) of any SAM::

        functional = FunctionalSAM(opt)
        def closure():
            loss = functional(model(x), lambda z: cross_entropy(z, y))
            loss.backward()
            return loss

    Micro-batches come in the same order in both passes, as windows run them; between them dL/dlogits is kept, one number per
    logit. In a window the ascent has to be over all micro-batches (`ascent_fraction=1.0`).

    Args:
        optimizer: the SAM whose passes these are.
    """

    def __init__(self, optimizer: SAM) -> None:
        self._optimizer = optimizer
        self._kept: deque[Tensor] = deque()
        self._cycle = optimizer.cycle

    def __call__(self, logits: Tensor, loss: LossOfLogits) -> Tensor:
        """The loss; in the second pass with the gradient <dL/dlogits at w, logits at w + e> in place of its own."""
        if not self._optimizer.is_perturbed:
            if self._cycle != self._optimizer.cycle:  # what a step given up has left
                self._kept.clear()
                self._cycle = self._optimizer.cycle
            value = loss(logits)
            with torch.enable_grad():
                at = logits.detach().requires_grad_()
                (dz,) = torch.autograd.grad(loss(at), at)
            self._kept.append(dz)
            return value
        if not self._kept:
            raise RuntimeError(
                "FunctionalSAM: no first pass for these logits; each micro-batch has to pass at w before it passes at w + e "
                "(ascent_fraction=1.0, and a variant with an ascent pass)"
            )
        dz = self._kept.popleft()
        if dz.shape != logits.shape:
            raise RuntimeError(f"FunctionalSAM: logits of shape {tuple(logits.shape)} meet those of {tuple(dz.shape)} at w")
        surrogate = (logits * dz).sum()
        return loss(logits.detach()).detach() + surrogate - surrogate.detach()
