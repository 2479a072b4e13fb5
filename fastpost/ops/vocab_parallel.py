"""Rows of logits whose vocabulary is cut across ranks: symmetric KL and cross-entropy from small all-reduces.

The ranks agree on each row's maxima, then add up a dozen numbers per row, and these once more for rows that have to be
looked at again (not in the reference). What a rank adds up, and the gradients of its columns, are the backends' work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.backends import reference
from fastpost.backends.vocab_shards import own_columns
from fastpost.dispatch import select, serving
from fastpost.ops.reductions import means
from fastpost.row_tasks import ELSEWHERE, IGNORED, OperandTask, ShardTask


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


def sharded_operand_rows(task: OperandTask, group: dist.ProcessGroup) -> None:
    """`operand_rows` (fastpost/backends/reference.py) of this rank's columns: the same values on all ranks.

    Args:
        task: with the logits of this rank's columns, labels of the whole vocabulary, and smoothing in the cross-entropy's
            values as well. A cross-entropy of the noised stream is not served.
        group: the ranks that share the vocabulary, in the order of their ranks. One backend serves all of them.

    Raises:
        ValueError: a label outside the vocabulary (on the CPU; elsewhere it gives NaN); a task with `noised_classifies`.
    """
    if task.noised_classifies:
        raise ValueError("a head that is cut across ranks has no cross-entropy of the noised stream; gather its weight")
    clean, labels = task.clean, task.labels
    top, start, vocab = agree(clean, task.noised, group)
    check_labels(labels, task.ignore_index, vocab)
    if labels is not None:
        labels = own_columns(labels, task.ignore_index, start, clean.shape[1], vocab)
    gap = _smoothing_gap(clean, labels, vocab, group) if task.smoothing and labels is not None else None  # before gradients
    shard = ShardTask(task._replace(labels=labels, ignore_index=IGNORED), top, vocab)
    sums_of, finish = (_function(op, clean) for op in ("shard_sums", "shard_operands"))

    def added_up(before: Tensor | None) -> Tensor | None:
        sums: Tensor | None = sums_of(shard, before)
        if sums is not None:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
        return sums

    before = added_up(None)
    again = added_up(before)
    finish(shard, before, before if again is None else again)
    if gap is not None and task.ce_out is not None:
        weighs = torch.zeros_like(gap) if task.ce_weights is None else task.ce_weights
        task.ce_out.add_(torch.where(weighs == 0, 0.0, gap), alpha=task.smoothing)


def _function(op: str, logits: Tensor) -> Callable[..., Any]:
    """The backend's function; the reference's where a backend was chosen by hand that has none."""
    served = serving(op, logits.device, logits.dtype)
    return getattr(reference, op) if served is None else select(op, logits.device, logits.dtype)


def _smoothing_gap(clean: Tensor, labels: Tensor, vocab: Tensor, group: dist.ProcessGroup) -> Tensor:
    """z_y - mean(z) of every row, float64; 0 where the label does not count. labels: of a ShardTask."""
    own = clean.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).double()
    sums = torch.stack((torch.where(labels >= 0, own, torch.zeros_like(own)), means(clean) * clean.shape[1]))
    dist.all_reduce(sums, dist.ReduceOp.SUM, group=group)
    return torch.where(labels >= ELSEWHERE, sums[0] - sums[1] / vocab, torch.zeros_like(own))


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


def own_labels(labels: Tensor | None, first: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """Which rows' labels are columns of this rank, and which column (some column where not): (rows,), (rows, 1)."""
    if labels is None:
        return None
    at = labels - first
    return (at >= 0) & (at < columns), at.clamp(0, columns - 1).unsqueeze(-1)
