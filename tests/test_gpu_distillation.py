"""Distillation on a GPU: a student's and a teacher's heads against float64, no waiting, graphs, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastpost

from .gpu import DEVICE, ON_GPU, Captured, needs_gpu, no_sync, there

pytestmark = needs_gpu
# Rows of a warp and rows of a block. Students and teachers have widths of their own.
SHAPES = {"narrow": (64, 24, 40, 501), "wide": (256, 128, 192, 8209) if ON_GPU else (20, 24, 40, 1301)}
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")


def problem(shape: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Hidden states and head of a student and of a teacher on the device; labels, of which a seventh does not count."""
    rows, width, teacher_width, vocab = SHAPES[shape]
    g = torch.Generator().manual_seed(6)

    def stream(width: int) -> list[Tensor]:
        hidden, weight = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g) * width**-0.5
        return there(hidden.to(dtype), 2 * weight.to(dtype))

    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[::7] = -100
    return [t.requires_grad_() for t in stream(width)], stream(teacher_width), labels.to(DEVICE)


def loss_of(student: list[Tensor], teacher: list[Tensor], labels: Tensor, **options: Any) -> Tensor:
    return fastpost.linear_distillation_loss(*student, *teacher, labels, **options).loss


def exact(student: list[Tensor], teacher: list[Tensor], labels: Tensor, divergence: str, temperature: float) -> list[Tensor]:
    """Loss and gradients of divergence + cross-entropy in float64, from the same (rounded) inputs."""
    wide = [t.detach().double().requires_grad_() for t in student]
    z, t = wide[0] @ wide[1].T, teacher[0].double() @ teacher[1].double().T
    log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    m = (p + q) / 2
    rows = {
        "forward_kl": (p * (log_p - log_q)).sum(-1),
        "reverse_kl": (q * (log_q - log_p)).sum(-1),
        "symmetric_kl": ((p - q) * (log_p - log_q)).sum(-1),
        "js": (p * (log_p - m.log()) + q * (log_q - m.log())).sum(-1) / 2,
        "total_variation": (p - q).abs().sum(-1) / 2,
    }[divergence]
    loss = rows[labels != -100].mean() + F.cross_entropy(z, labels)
    return [loss.detach(), *torch.autograd.grad(loss, wide)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32(shape: str, divergence: str, temperature: float) -> None:
    student, teacher, labels = problem(shape)
    loss, *gradients = exact(student, teacher, labels, divergence, temperature)
    options = {"divergence": divergence, "temperature": temperature, "ce_weight": 1.0}
    ours = loss_of(student, teacher, labels, **options)
    assert float(ours.detach()) == pytest.approx(float(loss), rel=1e-5)
    for got, want in zip(torch.autograd.grad(ours, student), gradients, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_16_bit_operands(divergence: str) -> None:
    student, teacher, labels = problem("wide", torch.bfloat16)
    loss, *gradients = exact(student, teacher, labels, divergence, 1.0)
    ours = loss_of(student, teacher, labels, divergence=divergence, ce_weight=1.0)
    assert float(ours.detach()) == pytest.approx(float(loss), rel=1e-3)
    for got, want in zip(torch.autograd.grad(ours, student), gradients, strict=True):
        assert float((got.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(shape: str, dtype: torch.dtype) -> None:
    student, teacher, labels = problem(shape, dtype)
    for divergence in DIVERGENCES:
        options = {"divergence": divergence, "temperature": 0.7, "ce_weight": 1.0, "label_smoothing": 0.1, "softcap": 20.0}
        loss_of(student, teacher, labels, **options).backward()
        with no_sync():
            loss_of(student, teacher, labels, **options).backward()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_graph(divergence: str) -> None:
    student, teacher, labels = problem("wide", torch.bfloat16)
    captured = Captured(lambda: torch.autograd.grad(loss_of(student, teacher, labels, divergence=divergence), student))
    with torch.no_grad():
        student[0].mul_(1.5)
    captured.replay()
    expected = torch.autograd.grad(loss_of(student, teacher, labels, divergence=divergence), student)
    for a, b in zip(captured.result, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_same_bits_each_time(divergence: str) -> None:
    student, teacher, labels = problem("wide")
    first, second = (
        torch.autograd.grad(loss_of(student, teacher, labels, divergence=divergence), student[0])[0] for _ in range(2)
    )
    assert torch.equal(first, second)
