"""Rows of logits on a GPU: symmetric KL beside reads and copies of its inputs, and beside the published formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import fastpost
from fastpost.bench.params_cuda import COPY, also_triton, copy_of, name_of
from fastpost.bench.registry import Bandwidth, Case, Contender, Floor, Goal, PeakMemory, Target, Work, cuda_case, peer
from fastpost.published import fairseq_symmetric_kl

PAIRS = 1 << 28  # positions of one stream
WIDTHS = (16384, 50257, 128256)
VARIANTS = {f"{cols}_{name_of(dtype)}": (cols, dtype) for cols in WIDTHS for dtype in (torch.float32, torch.bfloat16)}
TRAINED = {name: value for name, value in VARIANTS.items() if value[0] != WIDTHS[0]}
INPLACE, FRESH, PUBLISHED, COMPILED = "in place", "fresh gradients", "fairseq formula", "fairseq formula, torch.compile"


class Logits:
    """Two streams of logits 0.1 apart, as a model hands them over: results, so they may be overwritten."""

    def __init__(self, at: Target, rows: int, cols: int, dtype: torch.dtype) -> None:
        clean = at.randn(rows, cols, std=3.0)
        noised = clean + at.randn(rows, cols, std=0.1)
        self.kept = [t.to(dtype).requires_grad_() for t in (clean, noised)]
        self.used: list[Tensor] = []

    def renew(self) -> None:
        self.used = []
        self.used = [t.clone() for t in self.kept]

    def forward_backward(self, divergence: Callable[..., Tensor], **options: object) -> Work:
        return lambda: torch.autograd.grad(divergence(*self.used, **options), self.used)


def sizes(at: Target, cols: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, columns, and bytes of one stream."""
    cols = at.size(cols, 3)
    rows = max(1, at.size(PAIRS) // cols)
    return rows, cols, rows * cols * dtype.itemsize


@cuda_case(**VARIANTS)
def kl_forward(at: Target, variant: tuple[int, torch.dtype]) -> Case:
    """Values alone: floor one read of each stream."""
    dtype = variant[1]
    rows, cols, size = sizes(at, *variant)

    def contenders() -> list[Contender]:
        clean, noised = (t.detach() for t in Logits(at, rows, cols, dtype).kept)
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
        "symmetric_kl, forward", f"{rows:,} x {cols:,}", name_of(dtype), contenders, goals,
        bytes=2 * size, work=5, memory=4 * size + 12 * rows * cols,
    )  # fmt: skip


@cuda_case(**TRAINED)
def kl_train(at: Target, variant: tuple[int, torch.dtype]) -> Case:
    """Values and both gradients. Floor of two passes: forward reads both streams, backward reads and writes both."""
    dtype = variant[1]
    rows, cols, size = sizes(at, *variant)

    def contenders() -> list[Contender]:
        logits = Logits(at, rows, cols, dtype)
        inplace = logits.forward_backward(fastpost.symmetric_kl, inplace=True)
        triton = [replace(c, before=logits.renew) for c in also_triton(at, INPLACE, inplace, 4 * size)]
        return [
            copy_of(logits.kept[0].detach()),
            Contender(INPLACE, inplace, 4 * size, logits.renew, peak=True),
            *triton,
            Contender(FRESH, logits.forward_backward(fastpost.symmetric_kl), 4 * size, logits.renew, peak=True),
            peer(PUBLISHED, logits.forward_backward(fairseq_symmetric_kl), 0, logits.renew, slow=True, peak=True),
        ]

    goals: list[Goal] = [
        Floor(INPLACE, COPY, {"cuda": 1.15}, bytes=6 * size),
        Floor(FRESH, COPY, {}, bytes=6 * size),
        Goal(INPLACE, PUBLISHED, {"cuda": 10.0}, faster=True),
        PeakMemory(INPLACE, "", {"cuda": 0.1}, per=rows * cols),
        PeakMemory(FRESH, "", {}, per=rows * cols),
        PeakMemory(INPLACE, PUBLISHED, {"cuda": 30.0}, faster=True, per=rows * cols),
    ]
    return Case(
        "symmetric_kl, forward + backward", f"{rows:,} x {cols:,}", name_of(dtype), contenders, goals,
        bytes=4 * size, work=7, memory=10 * size + 60 * rows * cols, seconds=2,
    )  # fmt: skip


@cuda_case(**TRAINED)
def kl_compiled(at: Target, variant: tuple[int, torch.dtype]) -> Case:
    """Beside the published formula through torch.compile."""
    dtype = variant[1]
    rows, cols, size = sizes(at, *variant)

    def contenders() -> list[Contender]:
        torch._dynamo.reset()  # each width its own static kernel, whatever ran before
        logits = Logits(at, rows, cols, dtype)
        inplace = logits.forward_backward(fastpost.symmetric_kl, inplace=True)
        compiled = logits.forward_backward(at.compiled(fairseq_symmetric_kl))
        return [
            Contender(INPLACE, inplace, 4 * size, logits.renew),
            peer(COMPILED, compiled, 0, logits.renew, peak=True),
        ]

    goals = [Goal(INPLACE, COMPILED, {"cuda": 2.0}, faster=True)]
    return Case(
        "symmetric_kl, forward + backward, torch.compile", f"{rows:,} x {cols:,}", name_of(dtype), contenders, goals,
        bytes=4 * size, work=6, memory=10 * size + 40 * rows * cols, seconds=12,
    )  # fmt: skip
