"""Distillation from the most probable classes of a teacher, as they are stored or sent: no teacher is needed in training."""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.errors import unknown
from fastpost.ops.autograd import checks_values
from fastpost.ops.chunks import distillation_row_bytes, fitting_rows, padded
from fastpost.ops.fused_loss import fused_loss
from fastpost.ops.head import Head, check_head, operand_dtype
from fastpost.ops.linear_distillation import (
    SHARDED,
    DistillationLoss,
    DistillationOptions,
    OutputLayer,
    check_infinite,
    check_options,
    counted_rows,
    loss_of,
)
from fastpost.ops.reductions import out_dtype
from fastpost.ops.scalars import POSITIVE, check_number
from fastpost.ops.top_k_rows import Settings


class TopLogProbs(NamedTuple):
    """A teacher's most probable classes, as `linear_top_log_probs` returns them.

    Attributes:
        ids: int64 (..., k). log_probs: (..., k). rest: (...), the log-probability of all other classes together.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor


RESTS = ("one_class", "dropped")
_ALL = 2e-6  # of float32: as near to 1 do log-probabilities come that were normalised over the k classes
_MANY = 8  # rows that leave nothing; a few may do so by chance
_SURE = 0.99  # of one class: then little is left to the others
_ROUNDING = 1.05  # sums of probabilities up to here: logarithms that were stored in 16 bits give up to 1.01


def linear_top_k_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_rest: Tensor | None = None,
    rest: str = "one_class",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: str = "token",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    memory_budget: int = 1 << 30,
    vocab_group: dist.ProcessGroup | None = None,
) -> DistillationLoss:
    """`linear_distillation_loss` from the k most probable classes of a teacher, as a file or a server has them.

    p are the teacher's probabilities of those classes, q the student's, which are taken over its whole vocabulary. What is
    left of both is one more class, so that D(p, q) never exceeds the divergence of the whole vocabularies, and equals it
    where k is the whole vocabulary. Right to 1e-6 in value and gradient for float32 logits.

    Args:
        hidden: (..., width) of the student; float16, bfloat16, float32 or float64.
        weight: (vocab, width) of the student's head.
        teacher_ids: integers (..., k), classes in [0, vocab), each once in a row.
        teacher_log_probs: floating point (..., k), their log-probabilities over the teacher's whole vocabulary
            (`linear_top_log_probs`). -inf: a place is not used, whatever its id (rows of different k).
        teacher_rest: floating point (...), the log-probability of all other classes together. None: what the known ones
            leave to 1, which is rounding alone where they are nearly all: 1e-7 of float32, 1e-2 of 16 bits. Where that is
            so in every row, as it is after a normalisation over the k classes, a UserWarning says it, once per process (on
            the CPU and under FASTPOST_CHECKS=1; float32 or wider).
        rest: "one_class", the rest of the vocabulary is one more class; "dropped", both models are normalised over the k
            classes, which says nothing of how much the student gives to others.
        temperature: T > 0, at which the log-probabilities were taken; divides the student's logits in the divergence.
        labels, divergence, beta, divergence_weight, ce_weight, label_smoothing: as in `linear_distillation_loss`.
        mask, reduction, ignore_index, num_items, bias, softcap, memory_budget: as there too.
        vocab_group: as there; ids are of the whole vocabulary, and they and the log-probabilities are the same on all ranks.

    Returns:
        DistillationLoss(loss, task_loss, divergence), as there: with divergence_weight=0 the divergence is 0.

    Raises:
        ValueError: as there; also, on the CPU and under FASTPOST_CHECKS=1, an id out of range or twice in a row,
            log-probabilities above 0, NaN, or that add up to more than 1 (with `teacher_rest`: to anything but 1), a row
            without any, and an infinite divergence: "forward_kl" where the student rules out what the teacher does not,
            "reverse_kl" where the teacher leaves nothing to the rest; `teacher_rest` with rest="dropped".
        TypeError: as there; ids that are no integers.
    """
    op = "linear_top_k_distillation_loss"
    check_head(op, hidden, weight, bias, softcap, sharded=SHARDED)
    if rest not in RESTS:
        raise unknown("rest", rest, RESTS)
    options = DistillationOptions(
        divergence, beta, temperature, divergence_weight, ce_weight, mask=mask, reduction=reduction,
        ignore_index=ignore_index, num_items=num_items, memory_budget=memory_budget,
        label_smoothing=label_smoothing, vocab_group=vocab_group,
    )  # fmt: skip
    check_options(op, options, labels)
    layer = OutputLayer(hidden, weight, bias, softcap)
    counts, targets, scale = counted_rows(op, layer, labels, options)
    vocab = None if vocab_group is not None else weight.shape[0]  # of a vocabulary cut across ranks, checked later
    _check_teacher(op, hidden, vocab, teacher_ids, teacher_log_probs, counts)
    if teacher_rest is not None:
        _check_rest(op, hidden, teacher_log_probs, teacher_rest, rest, counts)
    elif rest == "one_class":
        _look_for_a_rest(teacher_log_probs, counts, weight.shape[0])
    rows, k = len(counts), teacher_ids.shape[-1]
    log_probs = teacher_log_probs.detach().reshape(rows, k)
    is_used = (log_probs > -torch.inf) & (counts > 0).unsqueeze(1)
    ids = torch.where(is_used, teacher_ids.reshape(rows, k).long(), 0)  # others may be anything
    each = counts * scale
    weights = [each * divergence_weight, *([each * ce_weight] if ce_weight else [])]

    dtype = operand_dtype(weight, hidden)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in layer.tensors)
    copies = 2 + (softcap is not None) + (temperature != 1)  # of a chunk's logits, beside those that every stream has
    per_row = distillation_row_bytes(layer.vocab, [(weight.shape[1], dtype, learns)])
    per_row += copies * padded(layer.vocab) * out_dtype(dtype).itemsize
    chunk = fitting_rows(op, rows, per_row, layer.vocab, hidden.device, memory_budget, vocab_group)
    value, _, values = fused_loss(
        "top_k_distillation",
        Settings(
            ignore_index, divergence, beta, temperature, rest == "one_class", softcap or 0.0, chunk, dtype,
            float(label_smoothing), "" if vocab_group is None else vocab_group.group_name,
        ),
        [hidden.reshape(rows, hidden.shape[-1]), weight, bias, ids, _with_rest(log_probs, teacher_rest)],
        targets if ce_weight else None,
        weights,
        reduction == "none",
    )  # fmt: skip
    # Of the classes in use only the rest can have no probability in the teacher.
    known = "give teacher_rest (linear_top_log_probs has it), or" if teacher_rest is None else "leave teacher_rest out, and"
    may_lack = divergence != "forward_kl" and rest == "one_class"
    remedy = f"; where it is the teacher that leaves nothing to the rest, {known} take rest='dropped'" if may_lack else ""
    check_infinite(op, values[0], divergence, remedy)
    return loss_of(value, values * each, hidden.shape[:-1], reduction, out_dtype(dtype))


def _check_teacher(op: str, hidden: Tensor, vocab: int | None, ids: Tensor, log_probs: Tensor, counts: Tensor) -> None:
    for name, t, kind in (("teacher_ids", ids, "integers"), ("teacher_log_probs", log_probs, "floating point")):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
        is_integer = not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool
        if (kind == "integers") != is_integer or (not is_integer and not t.is_floating_point()):
            raise TypeError(f"{op}: {name} must be {kind}, not {t.dtype}")
        if t.device != hidden.device:
            raise ValueError(f"{op}: hidden is on {hidden.device}, {name} on {t.device}")
        if t.ndim != hidden.ndim or t.shape[:-1] != hidden.shape[:-1] or t.shape[-1] == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {(*hidden.shape[:-1], 'k')} with k >= 1")
    if ids.shape != log_probs.shape:
        raise ValueError(
            f"{op}: teacher_ids has shape {tuple(ids.shape)}, teacher_log_probs {tuple(log_probs.shape)}; they must agree"
        )
    if not checks_values(hidden.device):
        return
    ids, log_probs = ids.reshape(-1, ids.shape[-1]), log_probs.detach().reshape(-1, ids.shape[-1])
    used = counts > 0
    known = log_probs > -torch.inf
    most = math.inf if vocab is None else vocab
    for faulty, told in (
        ((((ids < 0) | (ids >= most)) & known).any(1) & used, f"holds an id outside of [0, {most})"),
        (log_probs.isnan().any(1) & used, "holds a log-probability that is NaN"),
        ((log_probs > 0).any(1) & used, "holds a log-probability above 0; pass logarithms, not probabilities or logits"),
        (~known.any(1) & used, "holds no class of the teacher; mask it, or set its label to ignore_index"),
        (
            (log_probs.double().logsumexp(1) > math.log(_ROUNDING)) & used,
            "holds probabilities that add up to more than 1; they are to be of the teacher's whole vocabulary",
        ),
        (_repeats(ids, known) & used, "holds an id twice"),
    ):
        if bool(faulty.any()):
            raise ValueError(f"{op}: row {int(faulty.nonzero()[0])} {told}")


def _check_rest(op: str, hidden: Tensor, log_probs: Tensor, of_rest: Tensor, rest: str, counts: Tensor) -> None:
    if rest == "dropped":
        raise ValueError(f"{op}: rest='dropped' leaves the rest out; leave teacher_rest out, or take rest='one_class'")
    if not isinstance(of_rest, Tensor) or not of_rest.is_floating_point():
        raise TypeError(f"{op}: teacher_rest must be a tensor of floating point numbers")
    if of_rest.device != hidden.device or of_rest.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: teacher_rest has shape {tuple(of_rest.shape)} on {of_rest.device}, expected "
            f"{tuple(hidden.shape[:-1])} on {hidden.device}"
        )
    if not checks_values(hidden.device):
        return
    total = _with_rest(log_probs.detach().reshape(len(counts), log_probs.shape[-1]), of_rest).double().logsumexp(1)
    faulty = ~(total.abs() < math.log(_ROUNDING)) & (counts > 0)
    if bool(faulty.any()):
        raise ValueError(
            f"{op}: in row {int(faulty.nonzero()[0])} the known classes and teacher_rest add up to a probability other than "
            "1; teacher_rest is the logarithm of what the known ones leave"
        )


def _look_for_a_rest(log_probs: Tensor, counts: Tensor, classes: int) -> None:
    """Warns of probabilities that may have been normalised over the k classes; `classes`: at most the vocabulary.

    Where the teacher is sure of one class, or all are known, they add up to 1 by right; and 16 bits cannot tell. A sharp
    teacher's do as well, so this is no error.
    """
    if not checks_values(log_probs.device) or log_probs.dtype.itemsize < 4:
        return
    log_probs = log_probs.detach().reshape(len(counts), log_probs.shape[-1])
    known = (log_probs > -torch.inf).sum(1)
    telling = (counts > 0) & (known < classes) & (log_probs.amax(1) < math.log(_SURE))
    if int(telling.sum()) >= _MANY and bool((log_probs[telling].double().logsumexp(1).abs() < _ALL).all()):
        _warn_of_no_rest()


@functools.cache  # once per process
def _warn_of_no_rest() -> None:
    warnings.warn(
        "linear_top_k_distillation_loss: in every row the known classes add up to 1, so that the rest of the vocabulary is "
        "rounding alone. If they were normalised over themselves, give their log-probabilities over the teacher's whole "
        "vocabulary, or take rest='dropped'; if the teacher leaves next to nothing to other classes, give teacher_rest "
        "(linear_top_log_probs has it; -inf is nothing)",
        stacklevel=4,
    )


def _with_rest(log_probs: Tensor, of_rest: Tensor | None) -> Tensor:
    """The rest's log-probability as a last column, where there is one."""
    if of_rest is None:
        return log_probs
    dtype = torch.promote_types(log_probs.dtype, of_rest.dtype)
    return torch.cat((log_probs.to(dtype), of_rest.detach().to(dtype).reshape(-1, 1)), 1)


def _repeats(ids: Tensor, known: Tensor) -> Tensor:
    """Rows in which an id that is used is there twice."""
    apart = -1 - torch.arange(ids.shape[1], device=ids.device)  # places that are not used differ from all others
    ordered = torch.where(known, ids.long(), apart).sort(1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(1)


@torch.no_grad()
def linear_top_log_probs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    memory_budget: int = 1 << 30,
) -> TopLogProbs:
    """The k most probable classes of every row and their log-probabilities over the whole vocabulary, and that of all others
    together, to be stored for `linear_top_k_distillation_loss`. Logits live a chunk of rows at a time; no gradients.

    Args:
        hidden: (..., width) of the teacher; float16, bfloat16, float32 or float64.
        weight: (vocab, width) of its head.
        k: classes, from 1 to vocab.
        bias, softcap, memory_budget: as in `linear_distillation_loss`.
        temperature: T > 0; the logits are divided by it.

    Returns:
        TopLogProbs(ids, log_probs, rest): int64 (..., k), the most probable first; float32 (..., k) and (...) (float64 where
        an argument is), right to their last digit, the rest to 1e-6. -inf where all classes are known.

    Raises:
        ValueError: shapes or devices that do not fit, k or a number out of range, a budget too small for 64 rows.
        TypeError: dtypes that are not served; a DTensor.
    """
    op = "linear_top_log_probs"
    check_head(op, hidden, weight, bias, softcap)
    check_number(op, "temperature", temperature, POSITIVE)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= weight.shape[0]:
        raise ValueError(f"{op}: k must be a whole number from 1 to the {weight.shape[0]:,} classes, not {k!r}")
    dtype = operand_dtype(weight, hidden)
    flat, head = hidden.reshape(-1, hidden.shape[-1]), Head(weight, bias, dtype)
    vocab, work = weight.shape[0], out_dtype(dtype)
    per_row = distillation_row_bytes(vocab, [(weight.shape[1], dtype, False)]) + padded(vocab) * work.itemsize
    chunk = fitting_rows(op, len(flat), per_row, vocab, hidden.device, memory_budget)
    ids = torch.empty((len(flat), k), dtype=torch.int64, device=hidden.device)
    log_probs = torch.empty((len(flat), k), dtype=work, device=hidden.device)
    of_rest = torch.empty(len(flat), dtype=work, device=hidden.device)
    room = torch.empty((min(chunk, len(flat)), vocab), dtype=work, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for at in range(0, len(flat), chunk):
            part = flat[at : at + chunk]
            logits = room[: len(part)]
            head.products(part.to(dtype), logits)
            if head.bias is not None:
                logits.add_(head.bias)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            largest, ids[at : at + chunk] = logits.topk(k, 1)
            classes = (largest.double() - largest[:, :1].double()) / temperature
            # What is left is small beside 1: it is summed up by itself, at its own scale.
            logits.scatter_(1, ids[at : at + chunk], -torch.inf)
            peak = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(work).min)
            left = logits.sub_(peak).div_(temperature).exp_().sum(1, keepdim=True).double().log()
            left += (peak.double() - largest[:, :1].double()) / temperature
            total = torch.cat((classes, left), 1).logsumexp(1, keepdim=True)
            log_probs[at : at + chunk] = classes - total
            of_rest[at : at + chunk] = (left - total).squeeze(1)
    shape = hidden.shape[:-1]
    return TopLogProbs(ids.reshape(*shape, k), log_probs.reshape(*shape, k), of_rest.reshape(shape))
