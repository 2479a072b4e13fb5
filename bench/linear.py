"""Losses of a fused head on the CPU: beside their own products alone, beside logits held whole, and their memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost
from fastpost.bench.registry import Case, Contender, Goal, PeakMemory, PeakShare, Work, case, peer
from fastpost.published import fairseq_symmetric_kl

ROWS, WIDTH, VOCAB = 2048, 768, 50257  # GPT-2's head
CHUNK = 1024
MB = 10**6


class Head:
    """Two streams of hidden states 1e-2 apart, GPT-2's head, labels."""

    def __init__(self, rows: int) -> None:
        torch.manual_seed(0)
        hidden = torch.randn(rows, WIDTH)
        self.leaves = [hidden, hidden + 1e-2 * torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH) * 0.05]
        for t in self.leaves:
            t.requires_grad_()
        self.labels = torch.randint(0, VOCAB, (rows,))

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(loss(*self.leaves), self.leaves)

    def fused(self, hidden: Tensor, noised: Tensor, weight: Tensor, **options: int) -> Tensor:
        return fastpost.linear_r3f_loss(hidden, noised, weight, self.labels, **options).loss

    def r_drop(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        return fastpost.linear_r_drop_loss(hidden, noised, weight, self.labels).loss

    def js(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        return fastpost.linear_js_divergence(hidden, noised, weight, reduction="mean")

    def published_r_drop(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        """The formula of R-Drop's released code."""
        logits = [h @ weight.T for h in (hidden, noised)]
        task = sum(F.cross_entropy(z, self.labels) for z in logits)
        logs, probabilities = [z.log_softmax(-1) for z in logits], [z.softmax(-1) for z in logits]
        there = F.kl_div(logs[0], probabilities[1], reduction="batchmean")
        back = F.kl_div(logs[1], probabilities[0], reduction="batchmean")
        return (task + there + back) / 2

    def on_logits(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        return fastpost.r3f_loss(hidden @ weight.T, noised @ weight.T, self.labels, inplace=True).loss

    def published(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        logits, noised_logits = hidden @ weight.T, noised @ weight.T
        return F.cross_entropy(logits, self.labels) + fairseq_symmetric_kl(noised_logits, logits)

    @torch.no_grad()
    def products(self) -> None:
        """The three products of every chunk of both streams, and nothing else."""
        hidden, noised, weight = (t.detach() for t in self.leaves)
        logits = torch.empty(2 * CHUNK, VOCAB)
        total = torch.zeros_like(weight)
        for at in range(0, len(hidden), CHUNK):
            x = torch.cat((hidden[at : at + CHUNK], noised[at : at + CHUNK]))
            torch.mm(x, weight.T, out=logits[: len(x)])
            torch.mm(logits[: len(x)], weight)
            total.addmm_(logits[: len(x)].T, x)


@case
def linear_r3f() -> Case:
    """Forward and backward of the loss, hidden states and weight trained."""
    head = Head(ROWS)
    alone, ours = "its three products alone", "linear_r3f_loss"
    whole, published = "r3f_loss on whole logits", "fairseq formula on whole logits"
    outputs = 4 * WIDTH * (VOCAB + 2 * ROWS)
    return Case(
        "linear_r3f_loss, forward + backward",
        f"{ROWS:,} x {WIDTH} x {VOCAB:,}",
        "float32",
        [
            peer(alone, head.products, slow=True, peak=True),
            Contender(ours, head.step(head.fused), slow=True, peak=True),
            Contender(whole, head.step(head.on_logits), slow=True, peak=True),
            peer(published, head.step(head.published), slow=True, peak=True),
        ],
        [
            Goal(ours, alone, dict.fromkeys(("avx512", "avx2"), 1.25)),
            Goal(ours, published, dict.fromkeys(("avx512", "avx2"), 2.0), faster=True),
            PeakMemory(ours, "", dict.fromkeys(("avx512", "avx2"), ((1 << 30) + outputs) / MB + 64), per=MB),
        ],
    )


@case
def linear_relatives() -> Case:
    """R-Drop's loss and the Jensen-Shannon divergence on the same products, forward and backward."""
    head = Head(ROWS)
    alone, r_drop, js = "its three products alone", "linear_r_drop_loss", "linear_js_divergence"
    published = "R-Drop's formula on whole logits"
    outputs = 4 * WIDTH * (VOCAB + 2 * ROWS)
    limit = ((1 << 30) + outputs) / MB + 64
    return Case(
        "linear_r_drop_loss and linear_js_divergence, forward + backward",
        f"{ROWS:,} x {WIDTH} x {VOCAB:,}",
        "float32",
        [
            peer(alone, head.products, slow=True, peak=True),
            Contender(r_drop, head.step(head.r_drop), slow=True, peak=True),
            Contender(js, head.step(head.js), slow=True, peak=True),
            peer(published, head.step(head.published_r_drop), slow=True, peak=True),
        ],
        [
            Goal(r_drop, alone, dict.fromkeys(("avx512", "avx2"), 1.25)),
            Goal(js, alone, dict.fromkeys(("avx512", "avx2"), 1.25)),
            Goal(r_drop, published, dict.fromkeys(("avx512", "avx2"), 2.0), faster=True),
            *(PeakMemory(name, "", dict.fromkeys(("avx512", "avx2"), limit), per=MB) for name in (r_drop, js)),
        ],
    )


@case
def linear_r3f_memory() -> Case:
    """What is allocated under a budget of 128 MB, for one and for four thousand rows; gradients handed out are counted."""
    budget, sizes = 128 * MB, (1024, 4096)
    heads = {f"{rows:,} rows": Head(rows) for rows in sizes}
    limits = {f"{rows:,} rows": (budget + 4 * WIDTH * (VOCAB + 2 * rows)) / MB + 64 for rows in sizes}

    def step(head: Head) -> Work:
        return head.step(lambda *leaves: head.fused(*leaves, memory_budget=budget))

    return Case(
        "linear_r3f_loss under 128 MB, forward + backward",
        f"N x {WIDTH} x {VOCAB:,}",
        "float32",
        [Contender(name, step(head), slow=True, peak=True) for name, head in heads.items()],
        [PeakMemory(name, "", dict.fromkeys(("avx512", "avx2"), limits[name]), per=MB) for name in heads],
    )


class Teacher:
    """A student and a teacher of GPT-2's vocabulary, each with a head of its own; the teacher learns nothing."""

    def __init__(self, rows: int) -> None:
        torch.manual_seed(0)
        self.leaves = [torch.randn(rows, WIDTH).requires_grad_(), (torch.randn(VOCAB, WIDTH) * 0.05).requires_grad_()]
        self.teacher = [torch.randn(rows, WIDTH), torch.randn(VOCAB, WIDTH) * 0.05]
        self.labels = torch.randint(0, VOCAB, (rows,))

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(loss(*self.leaves), self.leaves)

    def fused(self, divergence: str, **options: Any) -> Work:
        return self.step(
            lambda hidden, weight: (
                fastpost.linear_distillation_loss(
                    hidden, weight, *self.teacher, self.labels, divergence=divergence, **options
                ).loss
            )
        )

    def published(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Knowledge distillation as torch's documentation writes it."""
        teacher_hidden, teacher_weight = self.teacher
        with torch.no_grad():
            target = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
        return F.kl_div((hidden @ weight.T).log_softmax(-1), target, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def products(self, of_teacher: bool = True) -> None:
        """Three products of every chunk of the student and one of the teacher, and nothing else."""
        hidden, weight = (t.detach() for t in self.leaves)
        logits, total = torch.empty(CHUNK, VOCAB), torch.zeros_like(weight)
        for at in range(0, len(hidden), CHUNK):
            x, teacher = hidden[at : at + CHUNK], self.teacher[0][at : at + CHUNK]
            if of_teacher:
                torch.mm(teacher, self.teacher[1].T, out=logits[: len(x)])
            torch.mm(x, weight.T, out=logits[: len(x)])
            torch.mm(logits[: len(x)], weight)
            total.addmm_(logits[: len(x)].T, x)


@case
def linear_distillation() -> Case:
    """Forward and backward of each divergence, the student's hidden states and head trained."""
    teacher = Teacher(ROWS)
    alone, published, small = "its four products alone", "F.kl_div on whole logits", "forward KL under 128 MB"
    ours = {
        small: teacher.fused("forward_kl", memory_budget=128 * MB),
        "forward KL": teacher.fused("forward_kl"),
        "reverse KL": teacher.fused("reverse_kl"),
        "Jensen-Shannon": teacher.fused("js"),
        "total variation": teacher.fused("total_variation"),
        "forward KL + cross-entropy": teacher.fused("forward_kl", ce_weight=1.0),
    }
    isas = ("avx512", "avx2")
    return Case(
        "linear_distillation_loss, forward + backward",
        f"{ROWS:,} x {WIDTH} x {VOCAB:,}",
        "float32",
        [
            peer(alone, teacher.products, slow=True, peak=True),
            *(Contender(name, work, slow=True, peak=True) for name, work in ours.items()),
            peer(published, teacher.step(teacher.published), slow=True, peak=True),
        ],
        [
            *(Goal(name, alone, dict.fromkeys(isas, 1.15)) for name in ours),
            Goal("forward KL", published, dict.fromkeys(isas, 2.0), faster=True),
            Goal(small, published, dict.fromkeys(isas, 2.0), faster=True),
            PeakShare(small, published, dict.fromkeys(isas, 0.15)),
            PeakShare("forward KL", published, {}),
        ],
    )


class StoredTeacher(Teacher):
    """The same student, and a teacher of whom the most probable classes of every row are stored."""

    CLASSES = 64

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        *self.known, self.rest = fastpost.linear_top_log_probs(*self.teacher, self.CLASSES)

    def from_known(self, **options: Any) -> Work:
        return self.step(
            lambda hidden, weight: (
                fastpost.linear_top_k_distillation_loss(
                    hidden, weight, *self.known, self.labels, teacher_rest=self.rest, **options
                ).loss
            )
        )

    def gathered(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The same divergence from logits held whole: log-probabilities gathered, and the rest as one class."""
        ids, log_p = self.known
        log_q = (hidden @ weight.T).log_softmax(-1).gather(-1, ids)
        rest_p, rest_q = (torch.log1p(-t.exp().sum(-1, keepdim=True)) for t in (log_p, log_q))
        given = torch.cat((log_q, rest_q), -1), torch.cat((log_p, rest_p), -1)
        return F.kl_div(*given, reduction="batchmean", log_target=True)


@case
def linear_top_k_distillation() -> Case:
    """Forward and backward from a teacher's 64 most probable classes; the student's hidden states and head are trained."""
    teacher = StoredTeacher(ROWS)
    alone, ours, whole = "its three products alone", "64 classes, forward KL", "gathered from whole logits"
    isas = ("avx512", "avx2")
    return Case(
        "linear_top_k_distillation_loss, forward + backward",
        f"{ROWS:,} x {WIDTH} x {VOCAB:,}",
        "float32",
        [
            peer(alone, functools.partial(teacher.products, of_teacher=False), slow=True, peak=True),
            Contender(ours, teacher.from_known(memory_budget=128 * MB), slow=True, peak=True),
            peer(whole, teacher.step(teacher.gathered), slow=True, peak=True),
        ],
        [
            Goal(ours, alone, dict.fromkeys(isas, 1.15)),
            Goal(ours, whole, {}, faster=True),
            PeakShare(ours, whole, {}),
        ],
    )


@case
def linear_distillation_memory() -> Case:
    """What is allocated under a budget of 128 MB, for one and for four thousand rows; gradients handed out are counted."""
    budget, sizes = 128 * MB, (1024, 4096)
    works = {f"{rows:,} rows": Teacher(rows).fused("forward_kl", memory_budget=budget) for rows in sizes}
    limits = {f"{rows:,} rows": (budget + 4 * WIDTH * (VOCAB + rows)) / MB + 64 for rows in sizes}
    return Case(
        "linear_distillation_loss under 128 MB, forward + backward",
        f"N x {WIDTH} x {VOCAB:,}",
        "float32",
        [Contender(name, work, slow=True, peak=True) for name, work in works.items()],
        [PeakMemory(name, "", dict.fromkeys(("avx512", "avx2"), limits[name]), per=MB) for name in works],
    )
