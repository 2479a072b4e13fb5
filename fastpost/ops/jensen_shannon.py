"""Jensen-Shannon divergence of two streams of logits, with gradients to both."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpost.ops.divergence import _check, _rows_of
from fastpost.ops.reductions import kl_weights, out_dtype
from fastpost.ops.registry import define

_BLOCK = {"cpu": 1 << 18}  # elements at a time, small beside the logits
_BLOCK_ELSEWHERE = 1 << 24  # where every operation is a launch
_SERIES = 0.3  # |t| below which (1 + t) ln(1 + t) + (1 - t) ln(1 - t) is summed up: its terms cancel


def _log_softmax(z: Tensor) -> Tensor:
    top = z.amax(-1, keepdim=True)
    shifted = z - torch.where(top == -torch.inf, torch.zeros_like(top), top)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def _rows(a: Tensor, b: Tensor, want: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values of some rows, and what their gradients are, all in float64."""
    a, b = a.double(), b.double()
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    p, q = log_p.exp(), log_q.exp()
    # In float64 the difference keeps eight digits where float32 logits are 1e-6 apart.
    r = torch.where((p == 0) & (q == 0), torch.zeros_like(p), log_p - log_q)
    t = torch.tanh(r / 2)  # p = m (1 + t), q = m (1 - t)
    m = (p + q) / 2
    square = t * t
    series = square * (1 / 2 + square * (1 / 12 + square * (1 / 30 + square * (1 / 56 + square * (1 / 90 + square / 132)))))
    exact = (torch.special.xlogy(1 + t, 1 + t) + torch.special.xlogy(1 - t, 1 - t)) / 2
    value = (m * torch.where(t.abs() < _SERIES, series, exact)).sum(-1)
    if not want:
        return value, value, value
    close, softplus = t.abs() < _SERIES, torch.nn.functional.softplus
    first, second = (  # p ln(p / m), q ln(q / m)
        torch.where(z > 0, z * torch.where(close, torch.log1p(s * t), math.log(2) - softplus(-s * r)), torch.zeros_like(z))
        for z, s in ((p, 1), (q, -1))
    )
    return value, (first - p * first.sum(-1, keepdim=True)) / 2, (second - q * second.sum(-1, keepdim=True)) / 2


def _js_rows(clean: Tensor, noised: Tensor, weights: Tensor | None, want: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = clean.shape
    value = torch.zeros(rows, dtype=torch.float64, device=clean.device)
    grads = [torch.zeros_like(t) if want else t.new_empty(0) for t in (clean, noised)]
    step = max(1, _BLOCK.get(clean.device.type, _BLOCK_ELSEWHERE) // cols)
    for at in range(0, rows, step):
        block = slice(at, min(at + step, rows))
        value[block], *found = _rows(clean[block], noised[block], want)
        if want:
            for grad, g in zip(grads, found, strict=True):
                grad[block] = (
                    g if weights is None else torch.where((weights[block] == 0)[:, None], 0, weights[block, None] * g)
                )
    if weights is not None:
        value = torch.where(weights == 0, torch.zeros_like(value), value)
    return value, grads[0], grads[1]


_op = define(
    "js_rows(Tensor clean, Tensor noised, Tensor? weights, bool want) -> (Tensor, Tensor, Tensor)",
    _js_rows,
    lambda clean, noised, weights, want: (
        clean.new_empty(clean.shape[0], dtype=torch.float64),
        clean.new_empty(clean.shape if want else 0),
        noised.new_empty(noised.shape if want else 0),
    ),
)


class _JensenShannon(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, clean: Tensor, noised: Tensor, weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(clean, noised, weights)
        value: Tensor = _op(clean, noised, weights, False)[0]
        return value.clone() if weights is None else value * weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        clean, noised, weights = ctx.saved_tensors
        weights = upstream.contiguous() if weights is None else weights * upstream
        _, *grads = _op(clean, noised, weights, True)
        return *grads, None


def js_divergence(
    logits: Tensor, noised_logits: Tensor, *, mask: Tensor | None = None, reduction: str = "batchmean"
) -> Tensor:
    """KL(p || m) / 2 + KL(q || m) / 2 for p = softmax(logits), q = softmax(noised_logits), m = (p + q) / 2 (Lin 1991).

    Gradients to both streams; float64 arithmetic in plain torch, a block of rows at a time, so memory stays small beside the
    logits. At most ln 2, so a class that is -inf in one stream only is no error; -inf in both does not exist. Close streams
    keep their digits; there it is an eighth of the symmetric KL.

    Args:
        logits, noised_logits: (..., classes); float16, bfloat16, float32 or float64.
        mask, reduction: as in `symmetric_kl`.

    Returns:
        float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: as `symmetric_kl`.
    """
    op = "js_divergence"
    _check(op, logits, noised_logits)
    rows = logits.shape[:-1]
    weights = kl_weights(op, rows, logits.device, mask, reduction)
    value = _JensenShannon.apply(_rows_of(logits), _rows_of(noised_logits), weights)  # type: ignore[no-untyped-call]
    result: Tensor = value.reshape(rows) if reduction == "none" else value.sum()
    return result.to(out_dtype(logits.dtype))
