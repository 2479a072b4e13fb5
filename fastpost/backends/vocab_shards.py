"""Rows of logits whose vocabulary is cut across ranks, in torch operations: the reference.

In float64, so that no row has to be looked at again, and in blocks that stay small beside the logits. What a row without a
divergence gets is told by `OperandTask`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.row_tasks import ELSEWHERE, IGNORED, NO_CLASS, ShardTask

_BLOCK = {"cpu": 1 << 18}  # elements at a time
_BLOCK_ELSEWHERE = 1 << 21  # where every operation is a launch


class _Sums(NamedTuple):
    """What a row adds up, each float64 (rows,); exponentials without the row's maxima."""

    clean: Tensor
    noised: Tensor
    gap: Tensor  # clean - noised
    gap_moment: Tensor  # gap times d
    noised_moment: Tensor  # noised times d
    alone: Tensor  # classes that are -inf in one stream only
    meaningless: Tensor  # classes that are NaN or +inf in either
    label_logit: Tensor


def own_columns(labels: Tensor, ignore_index: int, first: Tensor | int, columns: int, vocab: Tensor | int) -> Tensor:
    """Labels of a whole vocabulary as a ShardTask has them, for the rank with so many columns from `first` on."""
    column, outside = labels - first, (labels < 0) | (labels >= vocab)
    column = torch.where((column >= 0) & (column < columns), column, ELSEWHERE)
    return torch.where(labels == ignore_index, IGNORED, torch.where(outside, NO_CLASS, column))


@torch.no_grad()
def shard_sums(shard: ShardTask, before: Tensor | None) -> Tensor | None:
    """As `ShardTask` says: (8, rows)."""
    if before is not None:
        return None
    clean, noised, labels = shard.task[:3]
    sums = torch.zeros(len(_Sums._fields), len(clean), dtype=torch.float64, device=clean.device)
    here = _Sums(*sums.unbind())  # views
    for block in row_blocks(clean):
        a, b = clean[block].double(), noised[block].double()
        d, w1, w2 = _parts(a, b, shard.top[:, block])
        u = torch.where(d.abs() < 0.5, w2 * torch.expm1(d.clamp(max=1)), w1 - w2)  # w1 - w2 without cancellation
        alone, meaningless = (a == -torch.inf) != (b == -torch.inf), ~((a < torch.inf) & (b < torch.inf))
        for total, values in zip(here, (w1, w2, u, d * u, w2 * d, alone, meaningless), strict=False):
            total[block] = values.sum(-1)
        if labels is not None:
            own = labels[block]
            logit = a.gather(-1, own.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            here.label_logit[block] = torch.where(own >= 0, logit, torch.zeros_like(logit))
    return sums


@torch.no_grad()
def shard_operands(shard: ShardTask, before: Tensor, sums: Tensor) -> None:
    """As `ShardTask` says; `before` is the sums already."""
    task, top, vocab = shard.task, shard.top, shard.vocab
    clean, noised, labels, ignore_index, kl_weights, ce_weights = task[:6]
    first, second, smoothing, cap = task.first, task.second, task.smoothing, task.cap
    total = _Sums(*sums.unbind())
    shift = torch.log1p(total.gap / total.noised)  # log of the ratio of the normalisers, the maxima taken off
    mean = total.noised_moment / total.noised
    kl = (torch.exp(-shift) * total.gap_moment / total.noised + mean * torch.expm1(-shift)).clamp(min=0)
    kl = torch.where(total.alone > 0, torch.inf, kl)
    kl = torch.where(total.meaningless > 0, torch.nan, kl)
    task.kl_out.copy_(torch.where(kl_weights == 0, torch.zeros_like(kl), kl))
    if task.ce_out is not None:
        ce = torch.zeros_like(kl)
        if labels is not None and ce_weights is not None:
            ce = torch.log(total.clean) + (top[0].double() - total.label_logit)
            ce = torch.where(labels == NO_CLASS, torch.full_like(ce, torch.nan), ce)
            ce = torch.where((ce_weights == 0) | (labels == ignore_index), torch.zeros_like(ce), ce)
        task.ce_out.copy_(ce)

    forward = (total.gap_moment + total.noised_moment) / total.clean - shift  # KL(p || q)
    undefined = ((kl_weights != 0) & ~kl.isfinite()).unsqueeze(-1)
    for block in row_blocks(clean) if first is not None or second is not None else ():
        a, b = clean[block].double(), noised[block].double()
        d, w1, w2 = _parts(a, b, top[:, block])
        columns = (total.clean, total.noised, shift, forward, mean, kl_weights)
        clean_sum, noised_sum, shifted, forward_kl, noised_mean, weight = (x[block].unsqueeze(-1) for x in columns)
        p, q, r = w1 / clean_sum, w2 / noised_sum, d - shifted
        difference = torch.where(r.abs() < 0.5, q * torch.expm1(r.clamp(max=1)), p - q)
        noised_grad: Tensor | float = 0.0
        if second is not None:
            noised_grad = weight * (q * (noised_mean - shifted - r) - difference)
            noised_grad = torch.where(weight == 0, 0.0, torch.where(undefined[block], torch.nan, noised_grad))
            if cap:
                noised_grad = noised_grad * (1 - (b / cap).square())
        if first is not None:
            grad = torch.zeros_like(a)
            if task.teaches:
                grad = weight * (p * (r - forward_kl) + difference)
                grad = torch.where(weight == 0, 0.0, torch.where(undefined[block], torch.nan, grad))
            if labels is not None and ce_weights is not None:
                own, weight = labels[block].unsqueeze(-1), ce_weights[block].unsqueeze(-1)
                weight = torch.where((own == ignore_index) | (own == NO_CLASS), 0.0, weight)
                labelled = weight * (p - smoothing / vocab)
                labelled.scatter_add_(-1, own.clamp(min=0), torch.where(own >= 0, (smoothing - 1) * weight, 0.0))
                grad = grad + torch.where(weight == 0, 0.0, labelled)
            if cap:
                grad = grad * (1 - (a / cap).square())
        if second is not None:
            second[block] = noised_grad
        if first is not None:
            first[block] = grad if second is None else grad + noised_grad


def row_blocks(clean: Tensor) -> list[slice]:
    """Rows to take at a time."""
    rows, columns = clean.shape
    step = max(1, _BLOCK.get(clean.device.type, _BLOCK_ELSEWHERE) // columns)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def _parts(a: Tensor, b: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams less their maxima: d, the difference, and the exponentials. The maxima first: they may be huge."""
    x, y = (stream - largest.double().unsqueeze(-1) for stream, largest in zip((a, b), top, strict=True))
    d = torch.where((a == -torch.inf) & (b == -torch.inf), 0.0, x - y)
    return d, x.exp(), y.exp()
