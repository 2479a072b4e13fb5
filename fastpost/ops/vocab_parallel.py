"""Rows of logits whose vocabulary is cut across ranks: symmetric KL and cross-entropy from two small all-reduces.

Plain torch, in blocks that stay small beside the logits. The first all-reduce agrees on each row's maxima, the second on
eight sums per row. The formulas are those of csrc/core/divergence.h, chosen per element rather than per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.row_tasks import OperandTask

_BLOCK = {"cpu": 1 << 18}  # elements at a time
_BLOCK_ELSEWHERE = 1 << 23  # where every operation is a launch


def group_named(name: str) -> dist.ProcessGroup:
    """The process group of this name: operations of torch.library take no groups."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def check_labels(labels: Tensor | None, ignore_index: int, vocab: Tensor) -> None:
    """Refuses labels outside the whole vocabulary; on the CPU, where looking waits for nothing."""
    if labels is None or labels.device.type != "cpu":
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bool(outside.any()):
        raise ValueError(f"label {int(labels[outside][0])} is outside a vocabulary of {int(vocab)}")


class _Sums(NamedTuple):
    """What a row adds up over the whole vocabulary, each float64 (rows,); exponentials without the row's maxima."""

    clean: Tensor
    noised: Tensor
    gap: Tensor  # clean - noised
    gap_moment: Tensor  # gap times d
    noised_moment: Tensor  # noised times d
    alone: Tensor  # classes that are -inf in one stream only
    label_logit: Tensor
    logits: Tensor


def sharded_operand_rows(task: OperandTask, group: dist.ProcessGroup) -> None:
    """`operand_rows` (fastpost/backends/reference.py) of this rank's columns: the same values on all ranks.

    Args:
        task: with the logits of this rank's columns, labels of the whole vocabulary, and smoothing in the cross-entropy's
            values as well. A cross-entropy of the noised stream is not served.
        group: the ranks that share the vocabulary, in the order of their ranks.

    Raises:
        ValueError: a label outside the vocabulary (on the CPU; elsewhere it gives NaN); a task with `noised_classifies`.
    """
    if task.noised_classifies:
        raise ValueError("a head that is cut across ranks has no cross-entropy of the noised stream; gather its weight")
    clean, noised, labels, ignore_index, kl_weights, ce_weights = task[:6]
    kl_out, ce_out, first, second, smoothing, cap, teaches = task[6:13]
    top, start, vocab = agree(clean, noised, group)
    check_labels(labels, ignore_index, vocab)
    own = own_labels(labels, start, clean.shape[1])
    sums = _summed(clean, noised, top, own, bool(smoothing), group)

    shift = torch.log1p(sums.gap / sums.noised)  # log of the ratio of the normalisers, the maxima taken off
    mean = sums.noised_moment / sums.noised
    kl = (torch.exp(-shift) * sums.gap_moment / sums.noised + mean * torch.expm1(-shift)).clamp(min=0)
    kl = torch.where(sums.alone > 0, torch.full_like(kl, torch.inf), kl)
    kl = torch.where(kl_weights == 0, torch.zeros_like(kl), kl)
    ce = torch.zeros_like(kl)
    if labels is not None:
        assert ce_weights is not None
        ce = torch.log(sums.clean) + top[0].double() - (1 - smoothing) * sums.label_logit
        if smoothing:
            ce = ce - smoothing / vocab * sums.logits
        ce = torch.where((labels < 0) | (labels >= vocab), torch.full_like(ce, torch.nan), ce)
        ce = torch.where(ce_weights == 0, torch.zeros_like(ce), ce)

    kl_out.copy_(kl)
    if ce_out is not None:
        ce_out.copy_(ce)

    forward = (sums.gap_moment + sums.noised_moment) / sums.clean - shift  # KL(p || q)
    for block in row_blocks(clean) if first is not None or second is not None else ():
        a, b = clean[block], noised[block]
        d, w1, w2, _ = _parts(a, b, top[:, block])
        dtype = a.dtype
        p, q = w1 / _column(sums.clean, block, dtype), w2 / _column(sums.noised, block, dtype)
        r = d - _column(shift, block, dtype)
        difference = torch.where(r.abs() < 0.5, q * torch.expm1(r.clamp(max=1)), p - q)
        weight = _column(kl_weights, block, dtype)
        noised_grad = None
        if second is not None:
            noised_grad = weight * (q * (_column(mean - shift, block, dtype) - r) - difference)
            noised_grad = torch.where(weight == 0, torch.zeros_like(noised_grad), noised_grad)
            if cap:
                noised_grad *= 1 - (b / cap).square_()
        if first is not None:
            grad = torch.zeros_like(a)
            if teaches:
                grad = weight * (p * (r - _column(forward, block, dtype)) + difference)
                grad = torch.where(weight == 0, torch.zeros_like(grad), grad)
            if ce_weights is not None and own is not None:
                weight = _column(ce_weights, block, dtype)
                labelled = weight * (p - (smoothing / vocab).to(dtype)) if smoothing else weight * p
                here, place = own[0][block].unsqueeze(-1), own[1][block]
                labelled.scatter_add_(-1, place, torch.where(here, (smoothing - 1) * weight, 0))
                grad = grad + torch.where(weight == 0, torch.zeros_like(labelled), labelled)
            if cap:
                grad *= 1 - (a / cap).square_()
            first[block] = grad if noised_grad is None else grad + noised_grad
        if second is not None and noised_grad is not None:
            second[block] = noised_grad


def agree(clean: Tensor, noised: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks: both streams' maxima (2, rows), 0 for a row without a class; this rank's first column; all columns."""
    rows, columns = clean.shape
    largest = torch.stack((clean.amax(-1), noised.amax(-1)))
    sizes = torch.zeros(dist.get_world_size(group), dtype=clean.dtype, device=clean.device)
    rank = dist.get_rank(group)
    sizes[rank] = columns
    agreed = torch.cat((largest.reshape(-1), sizes))
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    largest, sizes = agreed[: 2 * rows].view(2, rows), agreed[2 * rows :]
    top = torch.where(largest == -torch.inf, torch.zeros_like(largest), largest)
    return top, sizes[:rank].sum().long(), sizes.sum().double()


def _summed(
    clean: Tensor, noised: Tensor, top: Tensor, own: tuple[Tensor, Tensor] | None, logits_too: bool, group: dist.ProcessGroup
) -> _Sums:
    sums = torch.zeros(len(_Sums._fields), len(clean), dtype=torch.float64, device=clean.device)
    here = _Sums(*sums.unbind())  # views
    for block in row_blocks(clean):
        a, b = clean[block], noised[block]
        d, w1, w2, u = _parts(a, b, top[:, block])
        alone = (a == -torch.inf) != (b == -torch.inf)
        for total, values in zip(here, (w1, w2, u, d * u, w2 * d, alone), strict=False):
            total[block] = values.sum(-1, dtype=torch.float64)
        if own is not None:
            label_logit = a.gather(-1, own[1][block]).squeeze(-1).double()
            here.label_logit[block] = torch.where(own[0][block], label_logit, torch.zeros_like(label_logit))
        if logits_too:
            here.logits[block] = a.sum(-1, dtype=torch.float64)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    return here


def row_blocks(clean: Tensor) -> list[slice]:
    rows, columns = clean.shape
    step = max(1, _BLOCK.get(clean.device.type, _BLOCK_ELSEWHERE) // columns)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def own_labels(labels: Tensor | None, first: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """Which rows' labels are columns of this rank, and which column (some column where not): (rows,), (rows, 1)."""
    if labels is None:
        return None
    at = labels - first
    return (at >= 0) & (at < columns), at.clamp(0, columns - 1).unsqueeze(-1)


def _column(values: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
    return values[block].to(dtype).unsqueeze(-1)


def _parts(a: Tensor, b: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d = a - b less the difference of the maxima, both streams' exponentials, and w1 - w2 without cancellation."""
    dead = (a == -torch.inf) & (b == -torch.inf)
    d = a - b - (top[0] - top[1]).unsqueeze(-1)
    d = torch.where(dead, torch.zeros_like(d), d)
    w1, w2 = (torch.exp(x - m.unsqueeze(-1)) for x, m in zip((a, b), top, strict=True))
    u = torch.where(d.abs() < 0.5, w2 * torch.expm1(d.clamp(max=1)), w1 - w2)
    return d, w1, w2, u
