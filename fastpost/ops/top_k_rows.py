"""A teacher of whom k classes of every row are known, beside a student's output head, as torch.library sees them.

One walk over chunks of rows, as a teacher with a head has it (`distillation_walk.py`). Rows of a vocabulary that is cut
across ranks are torch operations everywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.backends.known_classes import Columns, top_k_rows
from fastpost.dispatch import select
from fastpost.ops.distillation_walk import Stream, walk_chunks
from fastpost.ops.head import grad_dtype
from fastpost.ops.reductions import out_dtype
from fastpost.ops.registry import define
from fastpost.ops.vocab_parallel import check_labels, group_named
from fastpost.row_tasks import TopKTask


class Settings(NamedTuple):
    """A call but for its tensors, as the operation takes it.

    has_rest: the rest of the vocabulary is a class of its own. softcap: 0: none. chunk: the most rows of a chunk. dtype: of
    the products' operands. smoothing: of the labels. group: the name of the ranks' that share the vocabulary; "": all here.
    """

    ignore_index: int
    divergence: str
    beta: float
    temperature: float
    has_rest: bool
    softcap: float
    chunk: int
    dtype: torch.dtype
    smoothing: float = 0.0
    group: str = ""


class _Slice(Columns):
    """One slice of a vocabulary that is cut across ranks: its columns are those of this process.

    Attributes:
        first: the first of them; vocab: how many classes there are on all ranks, float64. On the device.
    """

    def __init__(self, weight: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(weight.shape[0])
        self.group = group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        sizes = torch.zeros(ranks, dtype=torch.float64, device=weight.device)
        sizes[rank] = self.count
        self.sum(sizes)
        self.first, self.vocab = sizes[:rank].sum().long(), sizes.sum()

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def logsumexp(self, logits: Tensor, centre: Tensor, temperature: float = 1.0) -> Tensor:
        here = super().logsumexp(logits, centre, temperature)
        most = here.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        most = torch.where(most > -torch.inf, most, 0.0)
        return most + self.sum((here - most).exp()).log()


def _linear_top_k_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    divergence: str,
    beta: float,
    temperature: float,
    has_rest: bool,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    smoothing: float,
    group: str,
    want: list[bool],
) -> tuple[Tensor, ...]:
    with torch.autocast(hidden.device.type, enabled=False):
        student = Stream(hidden, weight, bias, softcap, dtype, want[:3])
        columns = _Slice(weight, group_named(group)) if group else None
        if columns is not None:
            assert isinstance(columns.vocab, Tensor)
            check_labels(labels, ignore_index, columns.vocab)
            _check_ids(ids, log_probs[:, : ids.shape[1]], weights, columns.vocab)

        def compare(made: list[Tensor], rows: slice | Tensor, here: Tensor, found: Tensor) -> None:
            task = TopKTask(
                made[0],
                ids[rows].contiguous(),
                log_probs[rows].double().contiguous(),
                None if labels is None else labels[rows],
                ignore_index,
                here[0],
                None if labels is None else here[1],
                found[0],
                None if labels is None else found[1],
                student.grad[: len(made[0])] if student.wanted else None,
                divergence,
                beta,
                temperature,
                has_rest,
                softcap,
                smoothing,
            )
            if columns is None:
                select("top_k_rows", weights.device, made[0].dtype)(task)
            else:
                top_k_rows(task, columns)

        values = walk_chunks([student], weights, chunk, compare)
        if student.want_hidden and columns is not None:  # each rank's columns have given their part
            columns.sum(student.grad_hidden)
    return (
        values, student.grad_hidden, student.grad_weight, student.grad_bias,
        weights.new_empty(0), weights.new_empty(0),
    )  # fmt: skip


def _check_ids(ids: Tensor, log_probs: Tensor, weights: Tensor, vocab: Tensor) -> None:
    """Refuses ids outside the whole vocabulary; on the CPU, where looking waits for nothing."""
    if ids.device.type != "cpu":
        return
    outside = (((ids < 0) | (ids >= vocab)) & (log_probs > -torch.inf)).any(1) & (weights != 0).any(0)
    if bool(outside.any()):
        raise ValueError(f"row {int(outside.nonzero()[0])} holds an id outside of [0, {int(vocab)})")


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, log_probs: Tensor, labels: Tensor | None,
    weights: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, _, _, want = rest[-4:]
    work = out_dtype(dtype)
    return (
        hidden.new_empty(weights.shape, dtype=torch.float64),
        hidden.new_empty(hidden.shape if want[0] else 0, dtype=grad_dtype(hidden)),
        hidden.new_empty(weight.shape if want[1] else 0, dtype=work),
        hidden.new_empty(weight.shape[0] if want[2] else 0, dtype=work),
        weights.new_empty(0),
        weights.new_empty(0),
    )


linear_top_k_distillation = define(
    "linear_top_k_distillation(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor log_probs, Tensor? labels, "
    "Tensor weights, int ignore_index, str divergence, float beta, float temperature, bool has_rest, float softcap, "
    "int chunk, ScalarType dtype, float smoothing, str group, bool[] want) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_top_k_distillation,
    _fake,
)
