"""Jensen-Shannon divergence of two streams of logits, with gradients to both."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.backends.reference import jensen_shannon_of_rows
from fastpost.dispatch import select
from fastpost.ops.autograd import apply_any
from fastpost.ops.divergence import check_logits, rows_of
from fastpost.ops.reductions import kl_weights, out_dtype
from fastpost.ops.registry import define
from fastpost.ops.row_losses import kl_losses
from fastpost.ops.rows import RowValues, Streams


def _js_rows(clean: Tensor, noised: Tensor, weights: Tensor | None, want: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row values, and with `want` the gradients of weights * values (empty without)."""
    function = select("js_rows", clean.device, clean.dtype)
    clean, noised = rows_of(clean), rows_of(noised)  # torch.func hands its slices straight to this
    like = select("gradient_like", clean.device, clean.dtype)
    grads = [like(t) if want else None for t in (clean, noised)]
    value = function(clean, noised, weights, *grads)
    grad_clean, grad_noised = (t.new_empty(0) if g is None else g for t, g in zip((clean, noised), grads, strict=True))
    return value, grad_clean, grad_noised


_op = define(
    "js_rows(Tensor clean, Tensor noised, Tensor? weights, bool want) -> (Tensor, Tensor, Tensor)",
    _js_rows,
    lambda clean, noised, weights, want: (
        clean.new_empty(clean.shape[0], dtype=torch.float64),
        clean.new_empty(clean.shape if want else 0),
        noised.new_empty(noised.shape if want else 0),
    ),
)


class _JensenShannon:
    """Row values times weights; `more` are the weights. Gradients are made in the backward pass."""

    inplace = overwrites = False

    def values(self, want: Streams, clean: Tensor, noised: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
        value, *nothing = _op(clean, noised, weights, False)
        return value if weights is None else value * weights, *nothing

    def gradients(
        self, want: Streams, clean: Tensor, noised: Tensor, factors: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        factors = factors.double().contiguous() if weights is None else weights * factors
        _, grad_clean, grad_noised = _op(clean, noised, factors, True)
        return grad_clean, grad_noised

    def formula(self, clean: Tensor, noised: Tensor, factors: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        used = None if weights is None else (weights != 0).unsqueeze(-1)
        streams = (t if used is None else torch.where(used, t, torch.zeros_like(t)) for t in (clean, noised))
        _, grad_clean, grad_noised = jensen_shannon_of_rows(*streams)
        factors = (factors if weights is None else weights * factors).unsqueeze(-1)
        return (factors * grad_clean).to(clean.dtype), (factors * grad_noised).to(noised.dtype)


_KIND = _JensenShannon()


def js_divergence(
    logits: Tensor, noised_logits: Tensor, *, mask: Tensor | None = None, reduction: str = "batchmean"
) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 for p = softmax(logits), q = softmax(noised_logits), m = (p + q) / 2 (Lin 1991).

    Gradients to both streams. Values are right to 1e-6 relative for float32 logits however close the streams are (there it
    is an eighth of the symmetric KL), never negative, exactly 0 for identical rows and at most ln 2: a class that is -inf in
    one stream only is no error, one that is -inf in both does not exist.

    There is no temperature: divide both logits by it, in float32, and multiply the result by its square to keep the size of
    gradients. Nor is there a weight other than 1/2 for the two streams (the beta of generalised knowledge distillation).

    Args:
        logits, noised_logits: (..., classes); float16, bfloat16, float32 or float64.
        mask, reduction: as in `symmetric_kl`.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: as `symmetric_kl`.
    """
    found = kl_losses(True, logits, noised_logits, mask, reduction, _js_divergence)
    return _js_divergence(logits, noised_logits, mask, reduction) if found is None else found[0]


def _js_divergence(logits: Tensor, noised_logits: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    op = "js_divergence"
    check_logits(op, logits, noised_logits)
    rows = logits.shape[:-1]
    weights = kl_weights(op, rows, logits.device, mask, reduction)
    value, *_ = apply_any(RowValues, _KIND, (False, False), rows_of(logits), rows_of(noised_logits), weights)
    result: Tensor = value.reshape(rows) if reduction == "none" else value.sum()
    return result.to(out_dtype(logits.dtype))
