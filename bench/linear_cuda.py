"""The fused head and loss on a GPU: beside its own three products alone, beside whole logits, and its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpost
from fastpost.bench.params_cuda import from_liger
from fastpost.bench.registry import Case, Contender, Goal, Launches, PeakMemory, Target, Work, cuda_case, peer
from fastpost.published import fairseq_symmetric_kl

SHAPES = {"gpt2": (4096, 768, 50257), "llama": (4096, 4096, 128256)}
CHUNK = 1024
MB = 10**6
LIGER = "Liger fused-linear JSD"


class Head:
    """Two streams of hidden states 1e-2 apart, a head, labels; operands in bfloat16."""

    def __init__(self, at: Target, rows: int, width: int, vocab: int) -> None:
        hidden = at.randn(rows, width)
        noised = hidden + at.randn(rows, width, std=1e-2)
        weight = at.randn(vocab, width, std=width**-0.5)
        self.leaves = [t.to(torch.bfloat16).requires_grad_() for t in (hidden, noised, weight)]
        self.labels = torch.randint(0, vocab, (rows,), device=at.device)

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(loss(*self.leaves), self.leaves)

    def fused(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        return fastpost.linear_r3f_loss(hidden, noised, weight, self.labels).loss

    def on_logits(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        return fastpost.r3f_loss(hidden @ weight.T, noised @ weight.T, self.labels, inplace=True).loss

    def published(self, hidden: Tensor, noised: Tensor, weight: Tensor) -> Tensor:
        logits, noised_logits = hidden @ weight.T, noised @ weight.T
        return F.cross_entropy(logits.float(), self.labels) + fairseq_symmetric_kl(noised_logits, logits)

    def liger(self, library: Any) -> Work:
        """Its nearest relative: the Jensen-Shannon divergence through one head, gradients of one stream and the weight."""
        loss = library.LigerFusedLinearJSD(jsd_beta=0.5)
        hidden, noised, weight = self.leaves

        def run() -> object:
            value = loss(noised, weight, hidden.detach(), weight.detach(), shift_labels=self.labels)
            return torch.autograd.grad(value, (noised, weight))

        return run

    @torch.no_grad()
    def products(self) -> None:
        """The three products of every chunk of both streams, and nothing else; rows of logits start at wide boundaries."""
        hidden, noised, weight = (t.detach() for t in self.leaves)
        total = torch.zeros_like(weight)
        vocab = len(weight)
        room = torch.empty(2 * CHUNK, -(-vocab // 64) * 64, dtype=weight.dtype, device=weight.device)[:, :vocab]
        for at in range(0, len(hidden), CHUNK):
            x = torch.cat((hidden[at : at + CHUNK], noised[at : at + CHUNK]))
            logits = torch.mm(x, weight.T, out=room[: len(x)])
            logits @ weight
            total.addmm_(logits.T, x)


class Teacher:
    """A student and a teacher of one vocabulary, each with a head of its own, in bfloat16. The teacher is not trained."""

    def __init__(self, at: Target, rows: int, width: int, vocab: int) -> None:
        def stream() -> list[Tensor]:
            return [t.to(torch.bfloat16) for t in (at.randn(rows, width), at.randn(vocab, width, std=width**-0.5))]

        self.leaves, self.teacher = [t.requires_grad_() for t in stream()], stream()
        self.labels = torch.randint(0, vocab, (rows,), device=at.device)

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Work:
        return lambda: torch.autograd.grad(loss(*self.leaves), self.leaves)

    def fused(self, divergence: str) -> Work:
        return self.step(
            lambda hidden, weight: (
                fastpost.linear_distillation_loss(hidden, weight, *self.teacher, self.labels, divergence=divergence).loss
            )
        )

    def published(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Knowledge distillation as torch's documentation writes it."""
        with torch.no_grad():
            target = (self.teacher[0] @ self.teacher[1].T).float().log_softmax(-1)
        return F.kl_div((hidden @ weight.T).float().log_softmax(-1), target, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def products(self, of_teacher: bool = True) -> None:
        """Three products of every chunk of the student and one of the teacher, and nothing else."""
        hidden, weight = (t.detach() for t in self.leaves)
        total, vocab = torch.zeros_like(weight), len(weight)
        room = torch.empty(CHUNK, -(-vocab // 64) * 64, dtype=weight.dtype, device=weight.device)[:, :vocab]
        for at in range(0, len(hidden), CHUNK):
            x, teacher = hidden[at : at + CHUNK], self.teacher[0][at : at + CHUNK]
            if of_teacher:
                torch.mm(teacher, self.teacher[1].T, out=room[: len(x)])
            logits = torch.mm(x, weight.T, out=room[: len(x)])
            logits @ weight
            total.addmm_(logits.T, x)


class StoredTeacher(Teacher):
    """The same student, and a teacher of whom the most probable classes of every row are stored."""

    CLASSES = 64

    def __init__(self, at: Target, rows: int, width: int, vocab: int) -> None:
        super().__init__(at, rows, width, vocab)
        *self.known, self.rest = fastpost.linear_top_log_probs(*self.teacher, min(self.CLASSES, vocab // 2))

    def from_known(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return fastpost.linear_top_k_distillation_loss(hidden, weight, *self.known, self.labels, teacher_rest=self.rest).loss

    def gathered(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The same divergence from logits held whole: log-probabilities gathered, and the rest as one class."""
        ids, log_p = self.known
        log_q = (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids)
        rest_q = torch.log1p(-log_q.exp().sum(-1, keepdim=True))
        given = torch.cat((log_q, rest_q), -1), torch.cat((log_p, self.rest.unsqueeze(-1)), -1)
        return F.kl_div(*given, reduction="batchmean", log_target=True)


@cuda_case(**SHAPES)
def linear_top_k_cuda(at: Target, shape: tuple[int, int, int]) -> Case:
    """Forward and backward from a teacher's 64 most probable classes, the student's hidden states and weight trained."""
    rows, width, vocab = at.size(shape[0], 70), at.size(shape[1], 8), at.size(shape[2], 30)
    alone, ours, whole = "its three products alone", "64 classes, forward KL", "gathered from whole logits"
    outputs = vocab * width * 6 + 2 * rows * width

    def contenders() -> list[Contender]:
        teacher = StoredTeacher(at, rows, width, vocab)
        return [
            peer(alone, functools.partial(teacher.products, of_teacher=False)),
            Contender(ours, teacher.step(teacher.from_known), peak=True, launches=True),
            peer(whole, teacher.step(teacher.gathered), slow=True, peak=True),
        ]

    goals: list[Goal] = [
        Goal(ours, alone, {"cuda": 1.15}),
        Goal(ours, whole, {"cuda": 1.0}, faster=True),
        PeakMemory(ours, "", {"cuda": ((1 << 30) + outputs) / MB + 64}, per=MB),
    ]
    return Case(
        "linear_top_k_distillation_loss, forward + backward", f"{rows:,} x {width:,} x {vocab:,}", "bfloat16", contenders,
        goals, bytes=4 * rows * vocab, work=24, memory=60 * rows * vocab + 10 * vocab * width, seconds=2,
    )  # fmt: skip


@cuda_case(**SHAPES)
def linear_distillation_cuda(at: Target, shape: tuple[int, int, int]) -> Case:
    """Forward and backward of divergences between two heads, the student's hidden states and weight trained."""
    rows, width, vocab = at.size(shape[0], 70), at.size(shape[1], 8), at.size(shape[2], 30)
    alone, published = "its four products alone", "F.kl_div on whole logits"
    names = {"forward KL": "forward_kl", "reverse KL": "reverse_kl", "Jensen-Shannon": "js"}
    outputs = vocab * width * 6 + 2 * rows * width

    def contenders() -> list[Contender]:
        teacher = Teacher(at, rows, width, vocab)
        return [
            peer(alone, teacher.products),
            *(Contender(name, teacher.fused(kind), peak=True, launches=True) for name, kind in names.items()),
            peer(published, teacher.step(teacher.published), slow=True, peak=True),
        ]

    goals: list[Goal] = [
        *(Goal(name, alone, {"cuda": 1.15}) for name in names if name != "Jensen-Shannon"),
        Goal("Jensen-Shannon", alone, {}),
        Goal("forward KL", published, {"cuda": 1.0}, faster=True),
        PeakMemory("forward KL", "", {"cuda": ((1 << 30) + outputs) / MB + 64}, per=MB),
    ]
    return Case(
        "linear_distillation_loss, forward + backward", f"{rows:,} x {width:,} x {vocab:,}", "bfloat16", contenders, goals,
        bytes=4 * rows * vocab, work=30, memory=60 * rows * vocab + 10 * vocab * width, seconds=2,
    )  # fmt: skip


@cuda_case(**SHAPES)
def linear_r3f(at: Target, shape: tuple[int, int, int]) -> Case:
    """Forward and backward of the loss, hidden states and weight trained."""
    rows, width, vocab = at.size(shape[0], 70), at.size(shape[1], 8), at.size(shape[2], 30)
    alone, ours = "its three products alone", "linear_r3f_loss"
    whole, published = "r3f_loss on whole logits", "fairseq formula on whole logits"
    # The weight's gradient is summed in float32 and handed out in 16 bits.
    outputs = vocab * width * 6 + 4 * rows * width

    def contenders() -> list[Contender]:
        head = Head(at, rows, width, vocab)
        return [
            peer(alone, head.products),
            Contender(ours, head.step(head.fused), peak=True, launches=True),
            Contender(whole, head.step(head.on_logits), slow=True, peak=True),
            peer(published, head.step(head.published), slow=True, peak=True),
            *from_liger(at, LIGER, head.liger),
        ]

    goals: list[Goal] = [
        Goal(ours, alone, {"cuda": 1.10}),
        Goal(ours, whole, {}, faster=True),
        Goal(ours, published, {"cuda": 1.0}, faster=True),
        Goal(ours, LIGER, {}, faster=True),
        Launches(ours, limit={"cuda": 80}),
        PeakMemory(ours, "", {"cuda": ((1 << 30) + outputs) / MB + 64}, per=MB),
    ]
    return Case(
        "linear_r3f_loss, forward + backward", f"{rows:,} x {width:,} x {vocab:,}", "bfloat16", contenders, goals,
        bytes=4 * rows * vocab, work=30, memory=60 * rows * vocab + 10 * vocab * width, seconds=2,
    )  # fmt: skip
