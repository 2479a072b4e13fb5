"""A student's and a teacher's output heads and the divergence of their rows, as torch.library sees them.

One walk over chunks of rows. Each stream has a head of its own: a chunk costs a product for its logits and, where gradients
are wanted, one to the hidden states and one to the weight. A stream without gradients costs the first alone, and its logits
are the last that is held of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost.dispatch import select
from fastpost.ops.chunks import even_chunk, padded, skips_rows
from fastpost.ops.head import Head, grad_dtype, power_of_two
from fastpost.ops.reductions import out_dtype
from fastpost.ops.registry import define
from fastpost.row_tasks import DistillationTask


class Settings(NamedTuple):
    """A call but for its tensors, as the operation takes it.

    softcap, teacher_softcap: 0: none. chunk: the most rows of a chunk. dtype, teacher_dtype: of the products' operands.
    """

    ignore_index: int
    divergence: str
    beta: float
    temperature: float
    softcap: float
    teacher_softcap: float
    chunk: int
    dtype: torch.dtype
    teacher_dtype: torch.dtype


class _Stream:
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
        # Gradients take the logits' place where they are of their dtype. float16 has to know its largest first.
        apart = self.wanted and head.dtype != head.work
        self.operand = torch.empty_like(self.logits, dtype=head.dtype) if apart else self.logits
        self.grad = self.logits if head.dtype == torch.float16 else self.operand
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
        if self.want_hidden:
            carried = self.carried[:n]
            self.head.hidden_gradient(operand, carried)
            if factor is not None:
                carried.div_(factor)
            self.grad_hidden[rows] = carried.to(self.grad_hidden.dtype)
        if self.want_weight:
            self.head.weight_gradient(operand, self.x[:n], self.grad_weight, add=add, factor=factor)


def _linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float,
    teacher_softcap: float,
    chunk: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    want: list[bool],
) -> tuple[Tensor, ...]:
    how = Settings(ignore_index, divergence, beta, temperature, softcap, teacher_softcap, chunk, dtype, teacher_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        student = _Stream(hidden, weight, bias, softcap, dtype, want[:3])
        teacher = _Stream(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_dtype, want[3:])
        values = _walk(student, teacher, labels, weights, how)
    return (
        values, student.grad_hidden, student.grad_weight, student.grad_bias,
        teacher.grad_hidden, teacher.grad_weight, teacher.grad_bias,
    )  # fmt: skip


def _walk(student: _Stream, teacher: _Stream, labels: Tensor | None, weights: Tensor, how: Settings) -> Tensor:
    """All rows, a chunk at a time: their values, (kinds, rows); gradients are left in the streams."""
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
    size = even_chunk(total, how.chunk)
    for stream in (student, teacher):
        stream.take_room(size)
    for at in range(0, total, size):
        n = min(size, total - at)
        rows = slice(at, at + n) if used is None else used[at : at + n]
        logits, teacher_logits = (stream.make_logits(rows, n, live) for stream in (student, teacher))
        found = torch.empty((len(weights), n), dtype=torch.float64, device=device)
        here = weights[:, rows].contiguous()
        task = DistillationTask(
            logits,
            teacher_logits,
            None if labels is None else labels[rows],
            how.ignore_index,
            here[0],
            None if labels is None else here[1],
            found[0],
            None if labels is None else found[1],
            grad_student=student.grad[:n] if student.wanted else None,
            grad_teacher=teacher.grad[:n] if teacher.wanted else None,
            divergence=how.divergence,
            beta=how.beta,
            temperature=how.temperature,
            student_cap=how.softcap,
            teacher_cap=how.teacher_softcap,
        )
        select("distillation_rows", device, logits.dtype)(task)
        values[:, rows] = found
        for stream in (student, teacher):
            if stream.wanted:
                stream.carry_back(rows, n, add=at > 0)
    return values


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, labels: Tensor | None, weights: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, teacher_dtype, want = rest[-3:]

    def gradients(hidden: Tensor, weight: Tensor, dtype: torch.dtype, want: list[bool]) -> tuple[Tensor, ...]:
        work = out_dtype(dtype)
        return (
            hidden.new_empty(hidden.shape if want[0] else 0, dtype=grad_dtype(hidden)),
            hidden.new_empty(weight.shape if want[1] else 0, dtype=work),
            hidden.new_empty(weight.shape[0] if want[2] else 0, dtype=work),
        )

    return (
        hidden.new_empty(weights.shape, dtype=torch.float64),
        *gradients(hidden, weight, dtype, want[:3]),
        *gradients(teacher_hidden, teacher_weight, teacher_dtype, want[3:]),
    )


linear_distillation = define(
    "linear_distillation(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor? labels, Tensor weights, int ignore_index, str divergence, float beta, float temperature, "
    "float softcap, float teacher_softcap, int chunk, ScalarType dtype, ScalarType teacher_dtype, bool[] want) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_distillation,
    _fake,
)
