"""The fused head on a GPU: 16-bit products with float32 results against float64, no waiting, graphs, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastpost

from . import test_linear_divergence as bodies
from .gpu import DEVICE, ON_GPU, Captured, needs_gpu, no_sync, peak_bytes, there

pytestmark = needs_gpu
SHAPE = (512, 256, 8209) if ON_GPU else (70, 24, 501)
BUDGET = 1 << 25 if ON_GPU else bodies.LEAST


def problem(apart: float, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Hidden states of two streams, weight and bias on the device; labels, of which a seventh does not count."""
    rows, width, vocab = SHAPE
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, width, generator=g)
    noised = hidden + apart * torch.randn(rows, width, generator=g)
    weight, bias = torch.randn(vocab, width, generator=g) / 3, torch.randn(vocab, generator=g)
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[::7] = -100
    tensors = there(*(t.to(dtype) for t in (hidden, noised, weight, bias)))
    return [t.requires_grad_() for t in tensors], labels.to(DEVICE)


def loss_of(leaves: list[Tensor], labels: Tensor, **options: Any) -> Tensor:
    hidden, noised, weight, bias = leaves
    return fastpost.linear_r3f_loss(hidden, noised, weight, labels, bias=bias, memory_budget=BUDGET, **options).loss


def exact(leaves: list[Tensor], labels: Tensor, **options: Any) -> tuple[float, list[Tensor]]:
    """Loss and gradients in float64 from the same (rounded) inputs."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    hidden, noised, weight, bias = wide
    log_p, log_q = ((h @ weight.T + bias).log_softmax(-1) for h in (hidden, noised))
    counts = labels != -100
    task = F.nll_loss(log_p, labels, ignore_index=-100)
    symm = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)[counts].mean()
    loss = task + options.get("r3f_lambda", 1.0) * symm
    return float(loss.detach()), list(torch.autograd.grad(loss, wide))


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, truth, strict=True)]


def test_float32() -> None:
    leaves, labels = problem(1e-2, torch.float32)
    loss, gradients = exact(leaves, labels)
    ours = loss_of(leaves, labels)
    assert float(ours.detach()) == pytest.approx(loss, rel=1e-5)
    # Logits of 5 that differ by 0.05: their last rounding alone is 1.4e-5 of the noised stream's gradient, which is
    # proportional to the difference; the other gradients know nothing of it.
    bounds = [5e-6, 5e-5, 5e-6, 5e-6]
    found = errors(list(torch.autograd.grad(ours, leaves)), gradients)
    assert all(error < bound for error, bound in zip(found, bounds, strict=True)), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_as_right_as_float32_logits(dtype: torch.dtype) -> None:
    leaves, labels = problem(3e-2, dtype)
    _, truth = exact(leaves, labels)
    ours = torch.autograd.grad(loss_of(leaves, labels), leaves)
    hidden, noised, weight, bias = leaves
    logits = [F.linear(h, weight, bias).float() for h in (hidden, noised)]
    reference = torch.autograd.grad(fastpost.r3f_loss(*logits, labels).loss, leaves)
    for a, b in zip(errors(list(ours), truth), errors(list(reference), truth), strict=True):
        assert a <= 2 * b


@pytest.mark.parametrize("apart", [1e-2, 1e-3])
def test_the_difference_survives_autocast(apart: float) -> None:
    leaves, _ = problem(apart, torch.float32)
    leaves = [*leaves[:2], leaves[2].detach().bfloat16().float().requires_grad_(), leaves[3]]
    hidden, noised, weight, bias = (t.detach().double() for t in leaves)
    log_p, log_q = ((h @ weight.T + bias).log_softmax(-1) for h in (hidden, noised))
    truth = float(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum())
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = fastpost.linear_symmetric_kl(*leaves[:3], bias=leaves[3], reduction="sum", memory_budget=BUDGET)
    assert float(ours.detach()) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    leaves, labels = problem(1e-2, dtype)
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 20.0, "temperature": 0.7}
    loss_of(leaves, labels, **options).backward()
    with no_sync():
        loss_of(leaves, labels, **options).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph(dtype: torch.dtype) -> None:
    leaves, labels = problem(1e-2, dtype)
    captured = Captured(lambda: torch.autograd.grad(loss_of(leaves, labels), leaves))
    with torch.no_grad():
        leaves[0].mul_(1.5)
    captured.replay()
    expected = torch.autograd.grad(loss_of(leaves, labels), leaves)
    for a, b in zip(captured.result, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_stays_within_the_budget() -> None:
    leaves, labels = problem(1e-2, torch.bfloat16)
    gradients = sum(t.numel() * (4 + t.element_size()) for t in leaves)  # summed in float32, handed out in 16 bits
    torch.autograd.grad(loss_of(leaves, labels), leaves)
    peak = peak_bytes(lambda: torch.autograd.grad(loss_of(leaves, labels), leaves))
    assert peak <= BUDGET + gradients + (64 << 20)


def test_compiles_whole() -> None:
    leaves, labels = problem(1e-2, torch.bfloat16)
    compiled = torch.compile(
        lambda *t: loss_of(list(t), labels), fullgraph=True, backend="inductor" if ON_GPU else "aot_eager"
    )
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss_of(leaves, labels), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_nan_in_rows_that_do_not_count() -> None:
    """They are walked here; neither their hidden states nor the weight get anything of them."""
    tensors = [torch.randn(6, 8, device=DEVICE) for _ in range(2)] + [torch.randn(11, 8, device=DEVICE)]
    labels = torch.tensor([1, -100, 3, -100, 5, 0], device=DEVICE)
    counts = labels != -100
    alone = [t[counts] if len(t) == 6 else t for t in tensors]
    tensors[0][~counts] = tensors[1][~counts] = torch.nan
    found = []
    for ts, y in ((tensors, labels), (alone, labels[counts])):
        ts = [t.clone().requires_grad_() for t in ts]
        found.append(torch.autograd.grad(fastpost.linear_r3f_loss(*ts, y).loss, ts))
    assert not found[0][0][~counts].any()
    assert not found[0][1][~counts].any()
    for got, want in ((found[0][0][counts], found[1][0]), (found[0][1][counts], found[1][1]), (found[0][2], found[1][2])):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
