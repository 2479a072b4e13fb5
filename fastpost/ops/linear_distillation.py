"""Distillation of one language model into another from their hidden states: no logits of either are ever held whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.errors import unknown
from fastpost.ops.chunks import distillation_row_bytes, fitting_rows
from fastpost.ops.distillation_walk import Settings
from fastpost.ops.divergence import check_bounded, check_finite
from fastpost.ops.fused_loss import fused_loss
from fastpost.ops.head import check_head, check_number, operand_dtype
from fastpost.ops.reductions import item_divisor, kl_weights, out_dtype, r3f_weights

DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")
GRADS = ("student", "both")
REDUCTIONS = ("token", "sum", "none")


class DistillationLoss(NamedTuple):
    """loss = ce_weight * task_loss + divergence_weight * divergence; only `loss` carries a graph."""

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    reduction: str = "token",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    grad: str = "student",
    memory_budget: int = 1 << 30,
) -> DistillationLoss:
    """The divergence of a student from a teacher over the whole vocabulary, both from hidden states and their output heads.

    With p = softmax(teacher's logits / T) and q = softmax(student's logits / T), divergence_weight * D(p, q) plus, with
    ce_weight, the student's cross-entropy at its labels, of logits without T (2015, 1503.02531; on-policy distillation and
    generalised Jensen-Shannon: GKD, 2306.13649). Both streams' logits live a chunk at a time; without gradients to the
    teacher they cost four products, of which the teacher's is one. For float32 logits, as the products round them, right to
    1e-6 in value and gradient, however close the streams are; never negative, exactly 0 for identical logits.

    Args:
        hidden: (..., width) of the student; float16, bfloat16, float32 or float64.
        weight: (vocab, width) of the student's head; may be the embedding's (tied), and may be frozen.
        teacher_hidden: (..., teacher_width), with the same leading shape.
        teacher_weight: (vocab, teacher_width); may be `weight` itself. The same vocabulary in the same order: where they
            differ, give the rows that both share, teacher_weight[index] (and teacher_bias[index]).
        labels: integers of shape (...), each a class or `ignore_index`; rows whose label is that do not count. A causal
            model's labels have to be shifted before. None: every row that `mask` leaves counts.
        divergence: "forward_kl", KL(p || q); "reverse_kl", KL(q || p); "symmetric_kl", their sum; "js", beta * KL(p || m) +
            (1 - beta) * KL(q || m) with m = beta * p + (1 - beta) * q; "total_variation", sum |p - q| / 2.
        beta: of "js", in (0, 1). GKD's 0 and 1, which are limits in name only, are "forward_kl" and "reverse_kl".
        temperature: T > 0. The divergence is not multiplied by T^2, as Hinton's gradients would be: put that into
            divergence_weight.
        divergence_weight, ce_weight: >= 0. ce_weight needs labels.
        mask: bool of shape (...); rows where it is False do not count, as if their label were `ignore_index`.
        reduction: "token" averages over the rows that count (or divides by num_items), "sum" adds them up, "none" gives
            shape (...), zeros where a row does not count, and makes the logits a second time in the backward pass.
        num_items: divisor in place of the count, for gradient accumulation, a number or a tensor with one; "token" only. 0
            gives loss 0 with zero gradients.
        bias, teacher_bias: (vocab,) or None.
        softcap, teacher_softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None: as they are. A model
            that scales its logits: scale its hidden states.
        grad: "student": the teacher is a constant, and nothing is computed or kept for its gradients; "both": gradients of
            the divergence flow into the teacher's arguments as well, where they require them.
        memory_budget: bytes for what is held of the logits, as in `linear_r3f_loss`.

    Returns:
        DistillationLoss(loss, task_loss, divergence), float32 (float64 where an argument is); task_loss (0 without
        ce_weight) and divergence are detached and not yet weighted. Where no row counts, the loss is 0 with zero gradients.

    Raises:
        ValueError: shapes or devices that do not fit, vocabularies of different sizes, an option that does not exist or is
            out of range, labels out of range, a budget too small for 64 rows; on the CPU, and under FASTPOST_CHECKS=1, a
            class of -inf that makes the divergence infinite.
        TypeError: dtypes that are not served; a DTensor.
    """
    op = "linear_distillation_loss"
    _check(op, hidden, weight, bias, softcap, teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    _check_options(op, divergence, beta, temperature, divergence_weight, ce_weight, reduction, grad, labels)
    counts, targets, scale = _rows(op, hidden, weight.shape[0], labels, mask, reduction, ignore_index, num_items)
    each = counts * scale
    weights = [each * divergence_weight, *([each * ce_weight] if ce_weight else [])]
    if grad == "student":
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()

    dtypes = operand_dtype(weight, hidden), operand_dtype(teacher_weight, teacher_hidden)
    if torch.float64 in dtypes:  # both streams' logits are of one dtype
        dtypes = torch.float64, torch.float64
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]), weight, bias,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_weight, teacher_bias,
    )  # fmt: skip
    learns = [torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors[k : k + 3]) for k in (0, 3)]
    streams = [(w.shape[1], dtype, wants) for w, dtype, wants in zip((weight, teacher_weight), dtypes, learns, strict=True)]
    vocab = weight.shape[0]
    per_row = distillation_row_bytes(vocab, streams)
    chunk = fitting_rows(op, len(tensors[0]), per_row, vocab, hidden.device, memory_budget)
    how = Settings(
        ignore_index, divergence, beta, temperature, softcap or 0.0, teacher_softcap or 0.0, chunk, *dtypes
    )  # fmt: skip
    value, _, values = fused_loss("distillation", how, tensors, targets if ce_weight else None, weights, reduction == "none")
    check_finite(op, values[0])
    check_bounded(op, values[0])
    return _result(value, values * each, hidden.shape[:-1], reduction, out_dtype(dtypes[0]))


def _result(
    value: Tensor, parts: Tensor, rows: torch.Size, reduction: str, dtype: torch.dtype
) -> DistillationLoss:  # fmt: skip
    """Of the weighted value and the kinds' parts of every row, (kinds, rows)."""
    parts = parts.detach() if reduction == "none" else parts.detach().sum(-1)
    task = parts[1] if len(parts) > 1 else torch.zeros_like(parts[0])
    shape = rows if reduction == "none" else ()
    return DistillationLoss(*(t.reshape(shape).to(dtype) for t in (value, task, parts[0])))


def _rows(
    op: str, hidden: Tensor, vocab: int, labels: Tensor | None, mask: Tensor | None, reduction: str, ignore_index: int,
    num_items: float | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | float]:  # fmt: skip
    """Which rows count, as float64 (rows,); their labels; what sums over them are multiplied by."""
    rows, device = hidden.shape[:-1], hidden.device
    if num_items is not None and reduction != "token":
        raise ValueError(f"{op}: num_items goes with reduction 'token', not {reduction!r}")
    masked = kl_weights(op, rows, device, mask, "sum")  # 1 and 0, checked
    if labels is None:
        counts = torch.ones(math.prod(rows), dtype=torch.float64, device=device) if masked is None else masked
        if reduction != "token":
            return counts, None, 1.0
        if num_items is not None:
            return counts, None, 1.0 / item_divisor(op, num_items, device)
        return counts, None, counts.sum().clamp(min=1).reciprocal()
    if masked is not None and isinstance(labels, Tensor) and labels.shape == rows:
        labels = torch.where(masked.reshape(rows).to(labels.device) != 0, labels, torch.full_like(labels, ignore_index))
    weights = r3f_weights(
        op, rows, vocab, device, labels, r3f_lambda=1.0, reduction="token" if reduction == "token" else "sum",
        ignore_index=ignore_index, num_items=num_items, label_smoothing=0.0,
    )  # fmt: skip
    return weights.kl_rows, weights.labels, weights.kl_scale


def _check(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, teacher_softcap: float | None,
) -> None:  # fmt: skip
    check_head(op, hidden, weight, bias, softcap)
    check_head(op, teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, "teacher_")
    if teacher_hidden.device != hidden.device:
        raise ValueError(f"{op}: hidden is on {hidden.device}, teacher_hidden on {teacher_hidden.device}")
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)}, teacher_hidden {tuple(teacher_hidden.shape)}; all but the last "
            "dimension must agree"
        )
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"{op}: the student's vocabulary has {weight.shape[0]:,} classes, the teacher's {teacher_weight.shape[0]:,}; "
            "pass the rows of both heads that stand for the same tokens, in one order: weight[index], teacher_weight[index]"
        )


def _check_options(
    op: str, divergence: str, beta: float, temperature: float, divergence_weight: float, ce_weight: float, reduction: str,
    grad: str, labels: Tensor | None,
) -> None:  # fmt: skip
    for name, given, valid in (
        ("divergence", divergence, DIVERGENCES),
        ("reduction", reduction, REDUCTIONS),
        ("grad", grad, GRADS),
    ):
        if given not in valid:
            raise unknown(name, given, valid)
    if divergence == "js":
        check_number(op, "beta", beta, least=0)
    if divergence == "js" and not 0 < beta < 1:
        raise ValueError(
            f"{op}: beta must lie in (0, 1), not {beta}; what GKD calls 0 and 1 are divergence='forward_kl' and 'reverse_kl'"
        )
    check_number(op, "temperature", temperature)
    for name, factor in (("divergence_weight", divergence_weight), ("ce_weight", ce_weight)):
        check_number(op, name, factor, least=0)
    if ce_weight and labels is None:
        raise ValueError(f"{op}: ce_weight={ce_weight:g} needs labels")
