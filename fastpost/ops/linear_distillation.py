"""Distillation of one language model into another from their hidden states: no logits of either are ever held whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.errors import unknown
from fastpost.ops.autograd import checks_values
from fastpost.ops.chunks import distillation_row_bytes, fitting_rows
from fastpost.ops.distillation_walk import Settings
from fastpost.ops.divergence import check_finite
from fastpost.ops.fused_loss import fused_loss
from fastpost.ops.head import check_head, check_tensor, operand_dtype
from fastpost.ops.reductions import item_divisor, kl_weights, out_dtype, r3f_weights
from fastpost.ops.scalars import POSITIVE, check_number

DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")
GRADS = ("student", "both")
REDUCTIONS = ("token", "sum", "none")
WEIGHTINGS = ("none", "probability")
SHARDED = "under tensor parallelism pass its local part, .to_local(), and vocab_group="


class DistillationLoss(NamedTuple):
    """loss = ce_weight * task_loss + divergence_weight * divergence; only `loss` carries a graph."""

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor


class OutputLayer(NamedTuple):
    """A model's part in the loss: what reaches its head, and the head; weight None: `hidden` are its logits."""

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias

    def constant(self) -> OutputLayer:
        weight, bias = (None if t is None else t.detach() for t in (self.weight, self.bias))
        return OutputLayer(self.hidden.detach(), weight, bias, self.softcap)


class DistillationOptions(NamedTuple):
    """The options of `linear_distillation_loss` that are not of one model."""

    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    divergence_weight: float = 1.0
    ce_weight: float = 0.0
    ce_weighting: str = "none"
    mask: Tensor | None = None
    reduction: str = "token"
    ignore_index: int = -100
    num_items: float | Tensor | None = None
    grad: str = "student"
    memory_budget: int = 1 << 30
    label_smoothing: float = 0.0
    vocab_group: dist.ProcessGroup | None = None


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
    ce_weighting: str = "none",
    label_smoothing: float = 0.0,
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
    vocab_group: dist.ProcessGroup | None = None,
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
        divergence_weight, ce_weight: >= 0; at 0 that term is left out, and its value is 0. ce_weight needs labels.
        ce_weighting: "none", or "probability": each row's cross-entropy is multiplied by the probability of its label, which
            sends no gradient (DFT, 2508.05629). It costs a second look at the logits and no product.
        label_smoothing: in [0, 1), in torch's convention (the weight of the uniform distribution in the target of the
            cross-entropy). With ce_weighting, the smoothed cross-entropy is what the probability weighs.
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
        vocab_group: process group whose ranks hold one slice of the vocabulary each, in the order of their ranks, of both
            heads' weights and biases; hidden states are the same on all of them, labels are of the whole vocabulary.
            Gradients of hidden states are summed over the group. The rows are then torch operations in float64.

    Returns:
        DistillationLoss(loss, task_loss, divergence), float32 (float64 where an argument is); task_loss (0 without
        ce_weight; with ce_weighting, of the cross-entropies so weighted) and divergence (0 with divergence_weight=0, which
        leaves it out) are detached and not yet multiplied by their weights. Where no row counts, the loss is 0 with zero
        gradients.

    Raises:
        ValueError: shapes or devices that do not fit, vocabularies of different sizes, an option that does not exist or is
            out of range, labels out of range, a budget too small for 64 rows; on the CPU, and under FASTPOST_CHECKS=1, a
            class of -inf that makes the divergence infinite.
        TypeError: dtypes that are not served; a DTensor.
    """
    op = "linear_distillation_loss"
    for name, given in (("weight", weight), ("teacher_weight", teacher_weight)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{op}: {name} is a {type(given).__name__}, not a tensor")
    return distillation_loss_of(
        op,
        OutputLayer(hidden, weight, bias, softcap),
        OutputLayer(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
        labels,
        DistillationOptions(
            divergence, beta, temperature, divergence_weight, ce_weight, ce_weighting, mask, reduction, ignore_index,
            num_items, grad, memory_budget, label_smoothing, vocab_group,
        ),
    )  # fmt: skip


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    ce_weight: float = 0.0,
    ce_weighting: str = "none",
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: str = "token",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    grad: str = "student",
    memory_budget: int = 1 << 30,
    vocab_group: dist.ProcessGroup | None = None,
) -> DistillationLoss:
    """`linear_distillation_loss` from logits, for models whose head is no plain matrix.

    Beside both logits and the gradients' block of that size, a chunk of rows is held.

    Args:
        logits: (..., vocab) of the student; float16, bfloat16, float32 or float64.
        teacher_logits: of the same shape.
        labels: as in `linear_distillation_loss`, and so is everything after them. Under a vocab_group both logits are this
            rank's columns.

    Returns:
        DistillationLoss(loss, task_loss, divergence), as there.

    Raises:
        ValueError, TypeError: as there.
    """
    return distillation_loss_of(
        "distillation_loss",
        OutputLayer(logits),
        OutputLayer(teacher_logits),
        labels,
        DistillationOptions(
            divergence, beta, temperature, divergence_weight, ce_weight, ce_weighting, mask, reduction, ignore_index,
            num_items, grad, memory_budget, label_smoothing, vocab_group,
        ),
    )  # fmt: skip


def distillation_loss_of(
    op: str, student: OutputLayer, teacher: OutputLayer | None, labels: Tensor | None, options: DistillationOptions
) -> DistillationLoss:
    """`linear_distillation_loss`, each model with its head or as logits.

    Args:
        op: the caller's name, for errors.
        teacher: None: no divergence, whatever its weight.
    """
    if teacher is None:
        options = options._replace(divergence_weight=0.0)
    _check(op, student, teacher)
    check_options(op, options, labels)
    counts, targets, scale = counted_rows(op, student, labels, options)
    each = counts * scale
    weights = [each * options.divergence_weight, *([each * options.ce_weight] if options.ce_weight else [])]
    if options.grad == "student" and teacher is not None:
        teacher = teacher.constant()

    layers = [student] if teacher is None else [student, teacher]
    dtypes = [_operands(layer) for layer in layers]
    if torch.float64 in dtypes:  # both streams' logits are of one dtype
        dtypes = [torch.float64] * len(layers)
    learns = [torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer.tensors) for layer in layers]
    widths = [0 if layer.weight is None else layer.weight.shape[1] for layer in layers]
    per_row = distillation_row_bytes(student.vocab, list(zip(widths, dtypes, learns, strict=True)))
    tensors = [
        layer.hidden.reshape(-1, layer.hidden.shape[-1]) if k == 0 else t
        for layer in layers
        for k, t in enumerate(layer.tensors)
    ]
    chunk = fitting_rows(
        op, math.prod(student.hidden.shape[:-1]), per_row, student.vocab, student.hidden.device, options.memory_budget,
        options.vocab_group,
    )  # fmt: skip
    settings = Settings(
        options.ignore_index, options.divergence, options.beta, options.temperature, student.softcap or 0.0,
        layers[-1].softcap or 0.0, bool(options.ce_weight) and options.ce_weighting == "probability", chunk, dtypes[0],
        dtypes[-1], float(options.label_smoothing),
        "" if options.vocab_group is None else options.vocab_group.group_name,
    )  # fmt: skip
    value, _, values = fused_loss(
        "distillation",
        settings,
        [*tensors, None, None, None][:6],
        targets if options.ce_weight else None,
        weights,
        options.reduction == "none",
    )
    check_infinite(op, values[0], options.divergence)
    check_finite(op, values[0])
    return loss_of(value, values * each, student.hidden.shape[:-1], options.reduction, out_dtype(dtypes[0]))


_INFINITE = {
    "forward_kl": "the student has no probability (a class of -inf) where the teacher has some",
    "reverse_kl": "the teacher has no probability (a class of -inf) where the student has some",
    "symmetric_kl": "one of the two has no probability (a class of -inf) where the other has some",
}


def check_infinite(op: str, values: Tensor, divergence: str, remedy: str = "") -> None:
    """On the CPU and under FASTPOST_CHECKS=1: raises ValueError naming the first row whose divergence is infinite.

    Nothing can be learnt from it. NaN passes: an overflow is for the loss scaler to see.

    Args:
        remedy: another one, after those that always serve.
    """
    if divergence in _INFINITE and checks_values(values.device) and bool((values == torch.inf).any()):
        at = int((values == torch.inf).nonzero()[0])
        raise ValueError(
            f"{op}: in row {at} {_INFINITE[divergence]}, so {divergence} is infinite; mask the row, or take divergence 'js' "
            f"or 'total_variation', which are finite there{remedy}"
        )


def _operands(layer: OutputLayer) -> torch.dtype:
    """What the products' operands are rounded to; of logits, what they are compared in."""
    return out_dtype(layer.hidden.dtype) if layer.weight is None else operand_dtype(layer.weight, layer.hidden)


def loss_of(
    value: Tensor, parts: Tensor, rows: torch.Size, reduction: str, dtype: torch.dtype
) -> DistillationLoss:  # fmt: skip
    """Of the weighted value and the kinds' parts of every row, (kinds, rows)."""
    parts = parts.detach() if reduction == "none" else parts.detach().sum(-1)
    task = parts[1] if len(parts) > 1 else torch.zeros_like(parts[0])
    shape = rows if reduction == "none" else ()
    return DistillationLoss(*(t.reshape(shape).to(dtype) for t in (value, task, parts[0])))


def counted_rows(
    op: str, student: OutputLayer, labels: Tensor | None, options: DistillationOptions
) -> tuple[Tensor, Tensor | None, Tensor | float]:  # fmt: skip
    """Which rows count, as float64 (rows,); their labels; what sums over them are multiplied by."""
    rows, device, vocab = student.hidden.shape[:-1], student.hidden.device, student.vocab
    mask, reduction, ignore_index, num_items = options.mask, options.reduction, options.ignore_index, options.num_items
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
        op, rows, vocab if options.vocab_group is None else None, device, labels, r3f_lambda=1.0,
        reduction="token" if reduction == "token" else "sum",
        ignore_index=ignore_index, num_items=num_items, label_smoothing=0.0,
    )  # fmt: skip
    return weights.kl_rows, weights.labels, weights.kl_scale


def _check(op: str, student: OutputLayer, teacher: OutputLayer | None) -> None:
    _check_layer(op, student, "")
    if teacher is None:
        return
    _check_layer(op, teacher, "teacher_")
    name = "hidden" if student.weight is not None else "logits"
    if teacher.hidden.device != student.hidden.device:
        raise ValueError(f"{op}: {name} is on {student.hidden.device}, teacher_{name} on {teacher.hidden.device}")
    if teacher.hidden.shape[:-1] != student.hidden.shape[:-1]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(student.hidden.shape)}, teacher_{name} {tuple(teacher.hidden.shape)}; all but "
            "the last dimension must agree"
        )
    if student.vocab != teacher.vocab:
        raise ValueError(
            f"{op}: the student's vocabulary has {student.vocab:,} classes, the teacher's {teacher.vocab:,}; "
            "pass the rows of both heads that stand for the same tokens, in one order: weight[index], teacher_weight[index]"
        )


def _check_layer(op: str, layer: OutputLayer, prefix: str) -> None:
    if layer.weight is not None:
        check_head(op, layer.hidden, layer.weight, layer.bias, layer.softcap, prefix, SHARDED)
        return
    check_tensor(op, f"{prefix}logits", layer.hidden, SHARDED)
    if layer.hidden.ndim < 1 or layer.hidden.shape[-1] == 0:
        raise ValueError(f"{op}: {prefix}logits have shape {tuple(layer.hidden.shape)}, expected (..., vocab)")


def check_options(op: str, options: DistillationOptions, labels: Tensor | None) -> None:
    for name, given, valid in (
        ("divergence", options.divergence, DIVERGENCES),
        ("reduction", options.reduction, REDUCTIONS),
        ("ce_weighting", options.ce_weighting, WEIGHTINGS),
        ("grad", options.grad, GRADS),
    ):
        if given not in valid:
            raise unknown(name, given, valid)
    check_number(op, "beta", options.beta)
    if options.divergence == "js" and not 0 < options.beta < 1:
        raise ValueError(
            f"{op}: beta must lie in (0, 1), not {options.beta}; what GKD calls 0 and 1 are divergence='forward_kl' and "
            "'reverse_kl'"
        )
    check_number(op, "temperature", options.temperature, POSITIVE)
    for name, factor in (("divergence_weight", options.divergence_weight), ("ce_weight", options.ce_weight)):
        check_number(op, name, factor)
    check_number(op, "label_smoothing", options.label_smoothing)
    if options.label_smoothing >= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), not {options.label_smoothing}")
    if options.ce_weight and labels is None:
        raise ValueError(f"{op}: ce_weight={options.ce_weight:g} needs labels")
    if options.ce_weighting != "none" and not options.ce_weight:
        raise ValueError(f"{op}: ce_weighting={options.ce_weighting!r} weighs the cross-entropy, and ce_weight is 0")
    if options.label_smoothing and not options.ce_weight:
        raise ValueError(f"{op}: label_smoothing={options.label_smoothing:g} is of the cross-entropy, and ce_weight is 0")
