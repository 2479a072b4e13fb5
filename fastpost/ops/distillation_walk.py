"""A student's and a teacher's output heads and the divergence of their rows, as torch.library sees them.

One walk over chunks of rows. Each stream has a head of its own: a chunk costs a product for its logits and, where gradients
are wanted, one to the hidden states and one to the weight. A stream without gradients costs the first alone, and its logits
are the last that is held of it. A stream without a head is logits, of which a chunk at a time is copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.dispatch import select
from fastpost.ops.chunks import even_chunk, padded, skips_rows
from fastpost.ops.head import Head, grad_dtype, power_of_two
from fastpost.ops.reductions import out_dtype
from fastpost.ops.registry import define
from fastpost.ops.vocab_parallel import group_named
from fastpost.ops.vocab_parallel_distillation import sharded_distillation_rows
from fastpost.row_tasks import DistillationTask


class Settings(NamedTuple):
    """A call but for its tensors, as the operation takes it.

    softcap, teacher_softcap: 0: none. by_probability: each row's cross-entropy is multiplied by its label's probability, a
    constant. chunk: the most rows of a chunk. dtype, teacher_dtype: of the products' operands. smoothing: of the labels.
    group: the name of the ranks' that share the vocabulary; "": it is whole.
    """

    ignore_index: int
    divergence: str
    beta: float
    temperature: float
    softcap: float
    teacher_softcap: float
    by_probability: bool
    chunk: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype
    smoothing: float = 0.0
    group: str = ""


class Stream:
    """A stream's hidden states and head, its gradients, and memory for one chunk after another.

    Args:
        want: whether gradients of the hidden states, of the weight and of the bias are wanted.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, dtype: torch.dtype, want: list[bool]
    ) -> None:
        self.hidden, self.softcap = hidden, softcap
        self.head = Head(weight, bias, dtype)
        self.want_hidden, self.want_weight, self.want_bias = want
        self.wanted = any(want)
        # Of its logits' gradients as a kernel writes them. float16 has to know its largest first.
        self.logit_grad_dtype = self.head.work if dtype == torch.float16 else dtype
        (vocab, width), work, device = weight.shape, self.head.work, hidden.device
        # Zeros: rows that do not count are walked by nobody.
        self.grad_hidden = torch.zeros(hidden.shape if self.want_hidden else (0,), dtype=grad_dtype(hidden), device=device)
        self.grad_weight = torch.zeros((vocab, width) if self.want_weight else (0,), dtype=work, device=device)
        self.grad_bias = torch.zeros((vocab,) if self.want_bias else (0,), dtype=work, device=device)

    def take_room(self, rows: int) -> None:
        """For chunks of so many rows."""
        head, device = self.head, self.hidden.device
        vocab, width = head.weight.shape
        self.x = torch.empty((rows, width), dtype=head.dtype, device=device)
        self.logits = torch.empty((rows, padded(vocab)), dtype=head.work, device=device)[:, :vocab]
        # Gradients take the logits' place where they are of their dtype.
        apart = self.wanted and head.dtype != head.work
        self.operand = torch.empty_like(self.logits, dtype=head.dtype) if apart else self.logits
        self.grad = self.operand if self.operand.dtype == self.logit_grad_dtype else self.logits
        self.carried = torch.empty((rows if self.want_hidden else 0, width), dtype=head.work, device=device)

    def make_logits(self, rows: slice | Tensor, n: int, live: Tensor | None) -> Tensor:
        part, x, logits = self.hidden[rows], self.x[:n], self.logits[:n]
        x.copy_(part if live is None else torch.where(live[rows], part, part.new_zeros(())))
        self.head.products(x, logits)
        if self.head.bias is not None:
            logits.add_(self.head.bias)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def carry_back(self, rows: slice | Tensor, n: int, add: bool) -> None:
        """From the gradients of a chunk's logits to everything else; `add`: there were chunks before."""
        grad, operand, factor = self.grad[:n], self.operand[:n], None
        if self.want_bias:
            self.grad_bias += grad.sum(0, dtype=self.head.work)
        if self.head.dtype == torch.float16:
            # It ends at 6e-8, where the gradients of a mean over tokens lie.
            factor = power_of_two(grad)
            torch.mul(grad, factor, out=operand)
        elif grad.dtype != operand.dtype:
            operand.copy_(grad)
        if self.want_hidden:
            carried = self.carried[:n]
            self.head.hidden_gradient(operand, carried)
            if factor is not None:
                carried.div_(factor)
            self.grad_hidden[rows] = carried.to(self.grad_hidden.dtype)
        if self.want_weight:
            self.head.weight_gradient(operand, self.x[:n], self.grad_weight, add=add, factor=factor)


class Logits:
    """Logits themselves as a stream: a chunk is copied, in the dtype that rows are computed in, and its gradients back."""

    def __init__(self, logits: Tensor, dtype: torch.dtype, wanted: bool) -> None:
        self.hidden, self.work, self.wanted = logits, out_dtype(dtype), wanted
        self.logit_grad_dtype = self.work
        self.grad_hidden = torch.zeros(logits.shape if wanted else (0,), dtype=grad_dtype(logits), device=logits.device)
        self.grad_weight, self.grad_bias = (torch.zeros(0, dtype=self.work, device=logits.device) for _ in range(2))

    def take_room(self, rows: int) -> None:
        vocab = self.hidden.shape[1]
        self.logits = torch.empty((rows, padded(vocab)), dtype=self.work, device=self.hidden.device)[:, :vocab]
        self.grad = self.logits

    def make_logits(self, rows: slice | Tensor, n: int, live: Tensor | None) -> Tensor:
        part = self.hidden[rows]
        return self.logits[:n].copy_(part if live is None else torch.where(live[rows], part, part.new_zeros(())))

    def carry_back(self, rows: slice | Tensor, n: int, add: bool) -> None:
        self.grad_hidden[rows] = self.grad[:n].to(self.grad_hidden.dtype)


def _stream(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, softcap: float, dtype: torch.dtype, want: list[bool]
) -> Stream | Logits:
    if weight is None:
        return Logits(hidden, dtype, want[0])
    return Stream(hidden, weight, bias, softcap, dtype, want)


def _linear_distillation(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float,
    teacher_softcap: float,
    by_probability: bool,
    chunk: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    smoothing: float,
    group: str,
    want: list[bool],
) -> tuple[Tensor, ...]:
    how = Settings(
        ignore_index, divergence, beta, temperature, softcap, teacher_softcap, by_probability, chunk, dtype, teacher_dtype,
        smoothing, group,
    )  # fmt: skip
    streams = []
    with torch.autocast(hidden.device.type, enabled=False):
        streams.append(_stream(hidden, weight, bias, softcap, dtype, want[:3]))
        if teacher_hidden is not None:
            streams.append(_stream(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_dtype, want[3:]))
        learning = [stream for stream in streams if stream.wanted]
        if len({stream.logit_grad_dtype for stream in learning}) > 1:  # kernels write both streams' in one
            for stream in learning:
                stream.logit_grad_dtype = torch.float32
        values = _walk(streams, labels, weights, how)
    if group:  # each rank's columns have given their part of the hidden states' gradients
        for stream in streams:
            if isinstance(stream, Stream) and stream.want_hidden:
                dist.all_reduce(stream.grad_hidden, group=group_named(group))
    grads = [grad for stream in streams for grad in (stream.grad_hidden, stream.grad_weight, stream.grad_bias)]
    if teacher_hidden is None:
        grads += [weights.new_zeros(0, dtype=out_dtype(teacher_dtype)) for _ in range(3)]
    return values, *grads


def _walk(streams: list[Stream | Logits], labels: Tensor | None, weights: Tensor, how: Settings) -> Tensor:
    """All rows' values, (kinds, rows); gradients are left in the streams.

    Args:
        streams: the student and the teacher, or the student alone where no row's divergence has a weight.
    """
    student, teacher = streams[0], streams[-1]
    group = group_named(how.group) if how.group else None

    def compare(made: list[Tensor], rows: slice | Tensor, here: Tensor, found: Tensor) -> None:
        n = len(made[0])
        task = DistillationTask(
            made[0],
            made[-1],
            None if labels is None else labels[rows],
            how.ignore_index,
            here[0],
            None if labels is None else here[1],
            found[0],
            None if labels is None else found[1],
            grad_student=student.grad[:n] if student.wanted else None,
            grad_teacher=teacher.grad[:n] if teacher.wanted and teacher is not student else None,
            divergence=how.divergence,
            beta=how.beta,
            temperature=how.temperature,
            student_cap=how.softcap,
            teacher_cap=how.teacher_softcap,
            smoothing=how.smoothing,
        )
        run: Callable[[DistillationTask], object] = (
            select("distillation_rows", weights.device, made[0].dtype)
            if group is None
            else functools.partial(sharded_distillation_rows, group=group)
        )
        probabilities = _label_probabilities(task, run) if how.by_probability else None
        if probabilities is not None:
            task = task._replace(ce_weights=here[1] * probabilities)
        run(task)
        if probabilities is not None:
            found[1] = torch.where(probabilities == 0, torch.zeros_like(found[1]), found[1] * probabilities)

    return walk_chunks(streams, weights, how.chunk, compare)


def walk_chunks(
    streams: Sequence[Stream | Logits],
    weights: Tensor,
    most: int,
    compare: Callable[[list[Tensor], slice | Tensor, Tensor, Tensor], None],
) -> Tensor:
    """All rows with a weight, a chunk at a time: their logits are made, compared, and their gradients carried back.

    Args:
        weights: float64 (kinds, rows).
        most: rows of a chunk.
        compare: is given the streams' logits of a chunk, which rows they are, their weights and room for their values,
            (kinds, rows); leaves gradients in the `grad` of each stream that wants them.

    Returns:
        float64 (kinds, rows), the values; 0 where a row has no weight.
    """
    device = weights.device
    values = torch.zeros(weights.shape, dtype=torch.float64, device=device)
    used = live = None
    if skips_rows(device):
        counts = weights.any(0)
        used = None if bool(counts.all()) else counts.nonzero().squeeze(-1)
    else:  # rows that do not count may hold NaN, and 0 times NaN is not 0
        live = weights.any(0).unsqueeze(-1)
    total = weights.shape[1] if used is None else len(used)
    if total == 0:
        return values
    size = even_chunk(total, most)
    for stream in streams:
        stream.take_room(size)
    for at in range(0, total, size):
        n = min(size, total - at)
        rows = slice(at, at + n) if used is None else used[at : at + n]
        found = torch.empty((len(weights), n), dtype=torch.float64, device=device)
        compare([stream.make_logits(rows, n, live) for stream in streams], rows, weights[:, rows].contiguous(), found)
        values[:, rows] = found
        for stream in streams:
            if stream.wanted:
                stream.carry_back(rows, n, add=at > 0)
    return values


def _label_probabilities(task: DistillationTask, run: Any) -> Tensor:
    """float64. The rows' values are asked for once more, without gradients: a look at a chunk's logits, and no product."""
    assert task.ce_weights is not None
    assert task.ce_out is not None
    known = (task.ce_weights != 0).double()
    run(
        task._replace(weights=torch.zeros_like(known), ce_weights=known, grad_student=None, grad_teacher=None, smoothing=0.0)
    )
    return torch.exp(-task.ce_out)


def _fake(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None, teacher_bias: Tensor | None, labels: Tensor | None, weights: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, teacher_dtype, _, _, want = rest[-5:]

    def gradients(
        hidden: Tensor | None, weight: Tensor | None, dtype: torch.dtype, want: list[bool]
    ) -> tuple[Tensor, ...]:  # fmt: skip
        work = out_dtype(dtype)
        if hidden is None:
            return tuple(weights.new_empty(0, dtype=work) for _ in range(3))
        return (
            hidden.new_empty(hidden.shape if want[0] else 0, dtype=grad_dtype(hidden)),
            hidden.new_empty(weight.shape if weight is not None and want[1] else 0, dtype=work),
            hidden.new_empty(weight.shape[0] if weight is not None and want[2] else 0, dtype=work),
        )

    return (
        hidden.new_empty(weights.shape, dtype=torch.float64),
        *gradients(hidden, weight, dtype, want[:3]),
        *gradients(teacher_hidden, teacher_weight, teacher_dtype, want[3:]),
    )


linear_distillation = define(
    "linear_distillation(Tensor hidden, Tensor? weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? labels, Tensor weights, int ignore_index, str divergence, float beta, float temperature, "
    "float softcap, float teacher_softcap, bool by_probability, int chunk, ScalarType dtype, ScalarType teacher_dtype, "
    "float smoothing, str group, bool[] want) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_distillation,
    _fake,
)
