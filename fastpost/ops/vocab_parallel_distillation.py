"""A teacher's and a student's rows whose vocabulary is cut across ranks: `distillation_rows` with three small all-reduces.

Plain torch in float64, in blocks that stay small beside the logits. The ranks agree on each row's maxima, then on the sums
of exponentials, then on the divergence and the two means that its gradients need. What a class adds is computed as in
fastpost/backends/reference.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.backends.reference import DivergenceTerms, divergence_terms
from fastpost.backends.vocab_shards import row_blocks
from fastpost.ops.vocab_parallel import agree, check_labels, own_labels
from fastpost.row_tasks import DistillationTask


class _Sums(NamedTuple):
    """What a row adds up over the whole vocabulary, each float64 (rows,); exponentials without the row's maxima."""

    teacher: Tensor  # at the temperature
    student: Tensor
    plain: Tensor  # the student's without the temperature
    meaningless: Tensor  # logits that are NaN or +inf, in either stream
    label_logit: Tensor
    logits: Tensor  # the student's


def sharded_distillation_rows(task: DistillationTask, group: dist.ProcessGroup) -> None:
    """`distillation_rows` (fastpost/backends/reference.py) of this rank's columns: the same values on all ranks.

    Args:
        task: with the logits of this rank's columns and labels of the whole vocabulary.
        group: the ranks that share the vocabulary, in the order of their ranks.

    Raises:
        ValueError: a label outside the vocabulary (on the CPU; elsewhere it gives NaN).
    """
    student, teacher, labels, temperature = task.student, task.teacher, task.labels, task.temperature
    top, start, vocab = agree(teacher, student, group)
    check_labels(labels, task.ignore_index, vocab)
    own = own_labels(labels, start, student.shape[1])
    top = top.double()
    sums = _summed(task, top, own, group)
    log_normalisers = top / temperature + torch.stack((sums.teacher, sums.student)).log()

    def terms_of(block: slice) -> DivergenceTerms:
        log_p, log_q = (
            z[block].double() / temperature - log[block].unsqueeze(-1)
            for z, log in zip((teacher, student), log_normalisers, strict=True)
        )
        return divergence_terms(log_p, log_q, task.divergence, task.beta)

    found = torch.zeros(4, len(student), dtype=torch.float64, device=student.device)
    for block in row_blocks(student):
        terms = terms_of(block)
        for total, part in zip(found, terms[:3], strict=False):
            total[block] = part.sum(-1)
        found[3, block] = terms.is_infinite.sum(-1, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.SUM, group=group)
    value, teacher_mean, student_mean, infinite = found
    value = value.clamp(min=0).masked_fill(infinite > 0, torch.inf)
    value = value.masked_fill((sums.meaningless > 0) | (sums.teacher == 0) | (sums.student == 0), torch.nan)
    diverges, defined = task.weights != 0, value.isfinite()
    task.value_out.copy_(torch.where(diverges, value, torch.zeros_like(value)))

    ce_weights = torch.zeros_like(task.weights)
    log_plain = top[1] + sums.plain.log()
    if labels is not None and task.ce_weights is not None:
        ce_weights = torch.where(labels != task.ignore_index, task.ce_weights, torch.zeros_like(ce_weights))
        ce = log_plain - (1 - task.smoothing) * sums.label_logit
        if task.smoothing:
            ce = ce - task.smoothing / vocab * sums.logits
        ce = ce.masked_fill((labels < 0) | (labels >= vocab), torch.nan)
        if task.ce_out is not None:
            task.ce_out.copy_(torch.where(ce_weights == 0, torch.zeros_like(ce), ce))

    if task.grad_student is None and task.grad_teacher is None:
        return
    for block in row_blocks(student):
        terms = terms_of(block)
        # Everything is made before a gradient takes the logits' place.
        plain = student[block].double()
        grads = [
            _weighted((share - x * mean[block].unsqueeze(-1)) / temperature, task.weights[block], defined[block])
            for share, x, mean in (
                (terms.student_share, terms.q, student_mean),
                (terms.teacher_share, terms.p, teacher_mean),
            )
        ]
        if own is not None:
            weight = ce_weights[block].unsqueeze(-1)
            labelled = weight * ((plain - log_plain[block].unsqueeze(-1)).exp() - task.smoothing / vocab)
            labelled.scatter_add_(
                -1, own[1][block], torch.where(own[0][block].unsqueeze(-1), (task.smoothing - 1) * weight, 0)
            )
            grads[0] += torch.where(weight == 0, torch.zeros_like(labelled), labelled)
        places = (
            (task.grad_student, plain, task.student_cap),
            (task.grad_teacher, teacher[block].double(), task.teacher_cap),
        )
        for grad, (out, logits, cap) in zip(grads, places, strict=True):
            if out is not None:
                slope = 1 - (logits / cap).square() if cap else 1
                out[block] = torch.where(grad == 0, grad, grad * slope).to(out.dtype)


def _summed(
    task: DistillationTask, top: Tensor, own: tuple[Tensor, Tensor] | None, group: dist.ProcessGroup
) -> _Sums:  # fmt: skip
    student, teacher, temperature = task.student, task.teacher, task.temperature
    sums = torch.zeros(len(_Sums._fields), len(student), dtype=torch.float64, device=student.device)
    here = _Sums(*sums.unbind())  # views
    for block in row_blocks(student):
        a, b = teacher[block].double(), student[block].double()
        off_a, off_b = (z - m[block].unsqueeze(-1) for z, m in zip((a, b), top, strict=True))
        here.teacher[block] = (off_a / temperature).exp().sum(-1)
        here.student[block] = (off_b / temperature).exp().sum(-1)
        here.meaningless[block] = sum((z.isnan() | (z == torch.inf)).sum(-1, dtype=torch.float64) for z in (a, b))
        if own is not None:
            here.plain[block] = here.student[block] if temperature == 1 else off_b.exp().sum(-1)
            label_logit = b.gather(-1, own[1][block]).squeeze(-1)
            here.label_logit[block] = torch.where(own[0][block], label_logit, torch.zeros_like(label_logit))
            if task.smoothing:
                here.logits[block] = b.sum(-1)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    return here


def _weighted(grad: Tensor, weights: Tensor, defined: Tensor) -> Tensor:
    """The weighted gradients of rows: NaN where the divergence is not defined, and 0 where it has no weight."""
    grad = grad.masked_fill(~defined.unsqueeze(-1), torch.nan)
    weights = weights.unsqueeze(-1)
    return torch.where(weights == 0, torch.zeros_like(grad), weights * grad)
