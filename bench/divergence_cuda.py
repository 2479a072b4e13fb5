"""Rows of logits on a GPU: symmetric KL beside reads and copies of its inputs, and beside the published formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost
from fastpost.bench.divergence import kl_div_both_ways
from fastpost.bench.params_cuda import COPY, DTYPES, also_triton, copy_of, from_liger, name_of, only_triton
from fastpost.bench.registry import Bandwidth, Case, Contender, Floor, Goal, PeakMemory, Target, Work, cuda_case, peer
from fastpost.dispatch import select
from fastpost.published import fairseq_symmetric_kl
from fastpost.row_tasks import IGNORED, DistillationTask, OperandTask, ShardTask, TopKTask

PAIRS = 1 << 28  # positions of one stream
WIDTHS = (16384, 50257, 128256)
# How far the streams' logits are apart: the kernels have a path for rows that are near and one for those that are not.
CLOSE, MEDIUM, FAR = 0.01, 0.1, 3.0
Variant = tuple[int, torch.dtype, float]
VARIANTS = {f"{cols}_{name}": (cols, dtype, MEDIUM) for cols in WIDTHS for name, dtype in DTYPES.items()}
ELSEWHERE = {
    f"{WIDTHS[-1]}_{name}_{where}": (WIDTHS[-1], dtype, apart)
    for name, dtype in DTYPES.items()
    for where, apart in (("close", CLOSE), ("far", FAR))
}
TRAINED = {name: value for name, value in VARIANTS.items() if value[0] != WIDTHS[0]}
INPLACE, FRESH, PUBLISHED, COMPILED = "in place", "fresh gradients", "fairseq formula", "fairseq formula, torch.compile"
TORCH, LIGER = "F.kl_div both ways", "Liger JSD"


class Logits:
    """Two streams of logits, as a model hands them over: results, so they may be overwritten."""

    def __init__(self, at: Target, rows: int, cols: int, dtype: torch.dtype, apart: float = MEDIUM) -> None:
        clean = at.randn(rows, cols, std=3.0)
        noised = clean + at.randn(rows, cols, std=apart)
        self.kept = [t.to(dtype).requires_grad_() for t in (clean, noised)]
        self.used: list[Tensor] = []

    def renew(self) -> None:
        self.used = []
        self.used = [t.clone() for t in self.kept]

    def forward_backward(self, divergence: Callable[..., Tensor], **options: object) -> Work:
        return lambda: torch.autograd.grad(divergence(*self.used, **options), self.used)


def js_formula(noised: Tensor, clean: Tensor) -> Tensor:
    """The Jensen-Shannon divergence by torch's own functions, summed."""
    q, p = (F.log_softmax(t, dim=-1, dtype=torch.float32) for t in (noised, clean))
    m = torch.logaddexp(q, p) - math.log(2)
    return (F.kl_div(m, p, reduction="sum", log_target=True) + F.kl_div(m, q, reduction="sum", log_target=True)) / 2


def shape_of(rows: int, cols: int, apart: float) -> str:
    """In words; streams are 0.1 apart where nothing is said."""
    return f"{rows:,} x {cols:,}" + ("" if apart == MEDIUM else f", streams {apart:g} apart")


def sizes(at: Target, cols: int, dtype: torch.dtype, apart: float = MEDIUM) -> tuple[int, int, int]:
    """Rows, columns, and bytes of one stream."""
    cols = at.size(cols, 3)
    rows = max(1, at.size(PAIRS) // cols)
    return rows, cols, rows * cols * dtype.itemsize


@cuda_case(**VARIANTS, **ELSEWHERE)
def kl_forward(at: Target, variant: Variant) -> Case:
    """Values alone: floor one read of each stream."""
    dtype, apart = variant[1:]
    rows, cols, size = sizes(at, *variant)

    def contenders() -> list[Contender]:
        clean, noised = (t.detach() for t in Logits(at, rows, cols, dtype, apart).kept)
        work = lambda: fastpost.symmetric_kl(clean, noised, reduction="sum")  # noqa: E731
        words = [t.view(-1)[: t.numel() // 2 * 2].view(torch.float32) for t in (clean, noised)]
        return [
            copy_of(clean),
            peer("read (torch.sum)", lambda: [w.sum() for w in words], 2 * size),
            Contender("symmetric_kl", work, 2 * size, peak=True),
            *also_triton(at, "symmetric_kl", work, 2 * size),
        ]

    goals: list[Goal] = [
        Bandwidth("symmetric_kl", "read (torch.sum)", {"cuda": 0.90}, other=COPY),
        PeakMemory("symmetric_kl", "", {"cuda": 0.1}, per=rows * cols),
    ]
    return Case(
        "symmetric_kl, forward", shape_of(rows, cols, apart), name_of(dtype), contenders, goals,
        bytes=2 * size, work=5, memory=4 * size + 12 * rows * cols,
    )  # fmt: skip


def padded(at: Target, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for rows of logits whose starts lie 64 columns apart, or a multiple of that, as the library lays its own out."""
    return torch.empty(rows, -(-cols // 64) * 64, dtype=dtype, device=at.device)


@cuda_case(**{f"{cols}_{kind}": (cols, kind) for cols in WIDTHS[1:] for kind in ("forward_kl", "reverse_kl", "js")})
def distillation_rows(at: Target, variant: tuple[int, str]) -> Case:
    """The row kernel of distillation alone: float32 logits of both streams, the student's gradients in bfloat16.

    Floor: Jensen-Shannon reads both streams three times, a KL twice; gradients are written once.
    """
    cols, kind = variant
    rows, cols, size = sizes(at, cols, torch.float32)
    rows, size = max(1, rows // 4), size // rows * max(1, rows // 4)
    readings = 3 if kind == "js" else 2

    def contenders() -> list[Contender]:
        room = padded(at, rows, cols)
        student, teacher = room[:, :cols], padded(at, rows, cols)[:, :cols]
        student.copy_(at.randn(rows, cols, std=3.0))
        teacher.copy_(student + at.randn(rows, cols))
        gradient = padded(at, rows, cols, torch.bfloat16)[:, :cols]
        weights = torch.ones(rows, dtype=torch.float64, device=at.device)
        task = DistillationTask(
            student, teacher, None, -100, weights, None, torch.empty_like(weights), None, gradient, divergence=kind
        )

        def work() -> None:
            select("distillation_rows", student.device, student.dtype)(task)

        return [copy_of(room), Contender(kind, work, 2 * size, peak=True)]

    goals: list[Goal] = [
        Floor(kind, COPY, {} if kind == "js" else {"cuda": 1.15}, bytes=readings * 2 * size + size // 2),
        PeakMemory(kind, "", {"cuda": 0.1}, per=rows * cols),
    ]
    return Case(
        f"distillation_rows, {kind}", shape_of(rows, cols, 1.0), "float32", contenders, goals,
        bytes=2 * size, work=7, memory=4 * size,
    )  # fmt: skip


@cuda_case(**DTYPES)
def top_k_rows(at: Target, dtype: torch.dtype) -> Case:
    """The row kernel of distillation from 64 known classes alone; the gradient in this dtype, of float32 logits.

    Floor: the logits are read twice, the gradient is written once.
    """
    rows, cols = at.size(4096), at.size(WIDTHS[-1], 3)
    size, written = 4 * rows * cols, rows * cols * dtype.itemsize
    ours, operations = "forward_kl", "the same by torch's operations"

    def contenders() -> list[Contender]:
        room = padded(at, rows, cols)
        logits, gradient = room[:, :cols], padded(at, rows, cols, dtype)[:, :cols]
        logits.copy_(at.randn(rows, cols, std=3.0))
        kept = room.clone()
        known, ids = (logits + at.randn(rows, cols)).log_softmax(-1).topk(min(64, cols - 1), -1)
        weights = torch.ones(rows, dtype=torch.float64, device=at.device)
        task = TopKTask(
            logits, ids, known.double(), None, -100, weights, None, torch.empty_like(weights), None, gradient,
            divergence="forward_kl",
        )  # fmt: skip

        def work() -> None:
            select("top_k_rows", logits.device, logits.dtype)(task)

        def by_operations() -> None:
            with fastpost.use_backend("reference"):
                work()

        def renew() -> None:
            room.copy_(kept)  # the task lets them be overwritten

        return [
            copy_of(kept),
            Contender(ours, work, size + written, renew, peak=True),
            Contender(operations, by_operations, 0, renew, "reference", slow=True),
        ]

    goals: list[Goal] = [
        Floor(ours, COPY, {"cuda": 1.15}, bytes=2 * size + written),
        Goal(ours, operations, {"cuda": 5.0}, faster=True),
        PeakMemory(ours, "", {"cuda": 0.1}, per=rows * cols),
    ]
    return Case(
        "top_k_rows, forward_kl", shape_of(rows, cols, MEDIUM), name_of(dtype), contenders, goals,
        bytes=size + written, work=12, memory=12 * size, seconds=1,
    )  # fmt: skip


@cuda_case(**DTYPES)
def shard_rows(at: Target, dtype: torch.dtype) -> Case:
    """One rank's part of rows whose 128,256 classes are cut across eight, what the ranks exchange left out; operands of this
    dtype, of float32 logits.

    Floor: both streams are read twice, both operands are written once.
    """
    rows, cols = at.size(4096), at.size(WIDTHS[-1] // 8, 3)
    size, written = 2 * 4 * rows * cols, 2 * rows * cols * dtype.itemsize
    ours, operations = "a rank's part", "the same by torch's operations"

    def contenders() -> list[Contender]:
        room = padded(at, 2 * rows, cols)
        clean, noised = room[:, :cols].split(rows)
        clean.copy_(at.randn(rows, cols, std=3.0))
        noised.copy_(clean + at.randn(rows, cols, std=MEDIUM))
        first, second = padded(at, 2 * rows, cols, dtype)[:, :cols].split(rows)
        weights = torch.ones(rows, dtype=torch.float64, device=at.device)
        task = OperandTask(clean, noised, None, IGNORED, weights, None, torch.empty_like(weights), None, first, second)
        top = torch.stack((clean.amax(-1), noised.amax(-1)))
        shard = ShardTask(task, top, torch.full((), float(cols), dtype=torch.float64, device=at.device))

        def work() -> None:
            sums_of, finish = (select(op, clean.device, clean.dtype) for op in ("shard_sums", "shard_operands"))
            before = sums_of(shard, None)
            again = sums_of(shard, before)
            finish(shard, before, before if again is None else again)

        def by_operations() -> None:
            with fastpost.use_backend("reference"):
                work()

        return [
            copy_of(room),
            Contender(ours, work, size + written, peak=True),
            Contender(operations, by_operations, 0, backend="reference", slow=True),
        ]

    goals: list[Goal] = [
        Floor(ours, COPY, {"cuda": 1.3}, bytes=2 * size + written),
        Goal(ours, operations, {"cuda": 5.0}, faster=True),
        PeakMemory(ours, "", {"cuda": 0.1}, per=rows * cols),
    ]
    return Case(
        "shard_rows, an eighth of the classes", shape_of(rows, cols, MEDIUM), name_of(dtype), contenders, goals,
        bytes=size + written, work=12, memory=6 * size, seconds=1,
    )  # fmt: skip


@cuda_case(**TRAINED, **ELSEWHERE)
def kl_train(at: Target, variant: Variant) -> Case:
    """Values and both gradients. Floor of two passes: forward reads both streams, backward reads and writes both."""
    dtype, apart = variant[1:]
    rows, cols, size = sizes(at, *variant)

    def contenders() -> list[Contender]:
        logits = Logits(at, rows, cols, dtype, apart)
        inplace = logits.forward_backward(fastpost.symmetric_kl, inplace=True)
        triton = [replace(c, before=logits.renew) for c in also_triton(at, INPLACE, inplace, 4 * size)]
        return [
            copy_of(logits.kept[0].detach()),
            Contender(INPLACE, inplace, 4 * size, logits.renew, peak=True),
            *triton,
            Contender(FRESH, logits.forward_backward(fastpost.symmetric_kl), 4 * size, logits.renew, peak=True),
            *([peer(PUBLISHED, logits.forward_backward(fairseq_symmetric_kl), 0, logits.renew, slow=True, peak=True),
               peer(TORCH, logits.forward_backward(kl_div_both_ways), 0, logits.renew, slow=True, peak=True)]
              if apart == MEDIUM else []),
        ]  # fmt: skip

    goals: list[Goal] = [
        Floor(INPLACE, COPY, {"cuda": 1.10}, bytes=6 * size),
        Floor(FRESH, COPY, {}, bytes=6 * size),
        Goal(INPLACE, PUBLISHED, {"cuda": 10.0}, faster=True),
        Goal(INPLACE, TORCH, {}, faster=True),
        PeakMemory(INPLACE, "", {"cuda": 0.1}, per=rows * cols),
        PeakMemory(FRESH, "", {}, per=rows * cols),
        PeakMemory(INPLACE, PUBLISHED, {"cuda": 30.0}, faster=True, per=rows * cols),
    ]
    return Case(
        "symmetric_kl, forward + backward", shape_of(rows, cols, apart), name_of(dtype), contenders, goals,
        bytes=4 * size, work=7, memory=10 * size + 60 * rows * cols, seconds=2,
    )  # fmt: skip


@cuda_case(**TRAINED)
def kl_compiled(at: Target, variant: Variant) -> Case:
    """Beside the published formula through torch.compile."""
    dtype, apart = variant[1:]
    rows, cols, size = sizes(at, *variant)

    def contenders() -> list[Contender]:
        torch._dynamo.reset()  # each width its own static kernel, whatever ran before
        logits = Logits(at, rows, cols, dtype, apart)
        inplace = logits.forward_backward(fastpost.symmetric_kl, inplace=True)
        compiled = logits.forward_backward(at.compiled(fairseq_symmetric_kl))
        return [
            Contender(INPLACE, inplace, 4 * size, logits.renew),
            peer(COMPILED, compiled, 0, logits.renew, peak=True),
        ]

    goals = [Goal(INPLACE, COMPILED, {"cuda": 3.0 if dtype == torch.float32 else 5.0}, faster=True)]
    return Case(
        "symmetric_kl, forward + backward, torch.compile", shape_of(rows, cols, apart), name_of(dtype), contenders, goals,
        bytes=4 * size, work=6, memory=10 * size + 40 * rows * cols, seconds=12,
    )  # fmt: skip


@cuda_case(**{name: value for name, value in VARIANTS.items() if value[0] == WIDTHS[-1]})
def js_train(at: Target, variant: Variant) -> Case:
    """The Jensen-Shannon divergence with both gradients. Liger's, where installed, gives one stream's."""
    dtype, apart = variant[1:]
    rows, cols, size = sizes(at, *variant)
    ours, formula = "js_divergence", "torch formula"

    def contenders() -> list[Contender]:
        logits = Logits(at, rows, cols, dtype, apart)

        def liger(library: Any) -> Work:
            jsd = library.LigerJSD(beta=0.5)

            def divergence(noised: Tensor, clean: Tensor) -> Tensor:
                value: Tensor = jsd(noised.log_softmax(-1), clean.detach().log_softmax(-1))
                return value

            return lambda: torch.autograd.grad(divergence(*logits.used), logits.used[0])

        return [
            copy_of(logits.kept[0].detach()),
            only_triton(at, ours, logits.forward_backward(fastpost.js_divergence), 4 * size, before=logits.renew, peak=True),
            peer(formula, logits.forward_backward(js_formula), 0, logits.renew, slow=True, peak=True),
            *from_liger(at, LIGER, liger, logits.renew),
        ]

    goals: list[Goal] = [
        Floor(ours, COPY, {}, bytes=6 * size),
        Goal(ours, formula, {}, faster=True),
        Goal(ours, LIGER, {}, faster=True),
    ]
    return Case(
        "js_divergence, forward + backward", shape_of(rows, cols, apart), name_of(dtype), contenders, goals,
        bytes=4 * size, work=12, memory=10 * size + 60 * rows * cols, seconds=2,
    )  # fmt: skip
