"""Rows of logits whose gradients are operands of an output head's products: against the equations in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpost.dispatch import select
from fastpost.row_tasks import OperandTask

from .conftest import same_bits

ROWS = 5
COLS = (300, 5003)  # narrow and wide rows


def truth(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    kl_weights: Tensor,
    ce_weights: Tensor | None,
    smoothing: float,
    cap: float,
    teaches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl, plain cross-entropy, and the gradients with respect to what the cap was put on, by torch's autograd."""
    before = [(z.double() if not cap else cap * torch.atanh(z.double() / cap)).requires_grad_() for z in (clean, noised)]
    a, b = (y if not cap else cap * torch.tanh(y / cap) for y in before)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    taught = log_p if teaches else log_p.detach()
    difference = torch.where((a == -math.inf) & (b == -math.inf), torch.zeros_like(a), taught - log_q)
    kl = ((taught.exp() - log_q.exp()) * difference).sum(-1)
    value = (kl * kl_weights).sum()
    ce = torch.zeros_like(kl)
    if labels is not None and ce_weights is not None:
        counts = labels != -100
        known = labels.clamp(min=0).unsqueeze(-1)
        ce = torch.where(counts, -log_p.gather(-1, known).squeeze(-1), 0.0)
        target = F.one_hot(known.squeeze(-1), a.shape[-1]).double() * (1 - smoothing) + smoothing / a.shape[-1]
        value = value + (torch.where(counts, -(target * log_p).sum(-1), 0.0) * ce_weights).sum()
    gradients = torch.autograd.grad(value, before, materialize_grads=True)
    return kl.detach(), ce.detach(), *gradients


def streams(cols: int, apart: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both streams' logits in one padded block, as the head lays them out, and labels, of which one does not count."""
    padded = -(-cols // 64) * 64
    room = torch.full((2 * ROWS, padded), math.nan)[:, :cols]
    room.copy_(2 * torch.randn(2 * ROWS, cols))
    room[ROWS:] = room[:ROWS] + apart * torch.randn(ROWS, cols)
    labels = torch.randint(0, cols, (ROWS,))
    labels[2] = -100
    return room[:ROWS], room[ROWS:], labels


def run(
    clean: Tensor, noised: Tensor, labels: Tensor | None, weights: Tensor, rule: dict[str, Any], want: tuple[bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """kl, ce and both operands: in the logits' place for float32."""
    if dtype == torch.float32:
        first, second = clean, noised
    else:
        room = torch.full((2 * ROWS, -(-clean.shape[1] // 64) * 64), math.nan, dtype=dtype)
        first, second = room[:ROWS, : clean.shape[1]], room[ROWS:, : clean.shape[1]]
    operands = [t if w else None for t, w in zip((first, second), want, strict=True)]
    kl, ce = torch.full((2, ROWS), math.nan, dtype=torch.float64)
    counts = None if labels is None else weights[1]
    task = OperandTask(clean, noised, labels, -100, weights[0], counts, kl, ce, *operands, **rule)
    select("operand_rows", clean.device, clean.dtype)(task)
    return kl, ce, *operands


RULES: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.1},
    {"cap": 12.0},
    {"teaches": False},
    {"smoothing": 0.2, "cap": 12.0, "teaches": False},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [1e-2, 1.0])
def test_against_the_equations(backend: str, rule: dict[str, Any], cols: int, dtype: torch.dtype, apart: float) -> None:
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    for want, labelled in (
        ((True, True), True),
        ((True, True), False),
        ((True, False), True),
        ((False, True), True),
        ((False, False), True),
    ):
        clean, noised, labels = streams(cols, apart)
        chosen = labels if labelled else None
        kl, ce, *gradients = truth(clean, noised, chosen, *weights, rule.get("smoothing", 0.0), rule.get("cap", 0.0),
                                   rule.get("teaches", True))  # fmt: skip
        got_kl, got_ce, *operands = run(clean, noised, chosen, weights, rule, want, dtype)
        torch.testing.assert_close(got_kl, kl, rtol=1e-6, atol=0)
        if labelled:
            torch.testing.assert_close(got_ce, ce, rtol=1e-6, atol=1e-7)
        expected = [gradients[0] + gradients[1] if want == (True, True) else gradients[0], gradients[1]]
        for got, exact in zip(operands, expected, strict=True):
            if got is None:
                continue
            assert got.dtype == dtype
            # Rounding to the operand's dtype; and of what was summed up 1e-6.
            rounding = torch.finfo(dtype).eps / 2 * 1.01 * exact.abs() * (dtype != torch.float32)
            summed = sum(g.abs().amax(-1, keepdim=True) for g in gradients)
            assert bool(((got.double() - exact).abs() <= rounding + 1e-6 * summed).all())


@pytest.mark.parametrize("rule", [{}, {"smoothing": 0.1, "cap": 12.0}, {"teaches": False}], ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_no_weight_is_not_looked_at(backend: str, rule: dict[str, Any], cols: int, dtype: torch.dtype) -> None:
    clean, noised, labels = streams(cols, 0.1)
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    weights[:, 1] = 0
    weights[0, 3] = 0
    clean[1], noised[1], noised[3] = math.nan, math.nan, math.nan
    alone = clean[3:4].clone()
    *_, ce_only, _ = truth(alone, alone, labels[3:4], weights[0, 3:4], weights[1, 3:4], rule.get("smoothing", 0.0),
                           rule.get("cap", 0.0), False)  # fmt: skip
    kl, ce, first, second = run(clean, noised, labels, weights, rule, (True, True), dtype)
    assert first is not None
    assert second is not None
    assert [float(kl[1]), float(ce[1]), float(kl[3])] == [0, 0, 0]
    assert not first[1].any()
    assert not second[1].any()
    assert not second[3].any()
    torch.testing.assert_close(first[3].double(), ce_only[0], rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=1e-7)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_that_do_not_exist(backend: str, cols: int, dtype: torch.dtype) -> None:
    """-inf in both streams: no gradient there. In one stream only: no gradient at all, and an infinite divergence."""
    clean, noised, labels = streams(cols, 0.1)
    clean[:, 7], noised[:, 7] = -math.inf, -math.inf
    labels[labels == 7] = 8
    clean[4, 100] = -math.inf
    weights = torch.ones(2, ROWS, dtype=torch.float64)
    *_, first, second = truth(clean, noised, labels, *weights, 0.0, 0.0, True)
    kl, _, *operands = run(clean, noised, labels, weights, {}, (True, True), dtype)
    assert float(kl[4]) == math.inf
    for got, exact in zip(operands, (first + second, second), strict=True):
        assert got is not None
        assert bool(got[4].isnan().all())
        rest = [0, 1, 2, 3]
        assert not got[rest, 7].any()
        there = torch.arange(cols) != 7
        torch.testing.assert_close(
            got[rest][:, there].double(), exact[rest][:, there], rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=2e-6
        )


def test_the_same_bits_every_time(backend: str) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        clean, noised, labels = streams(5003, 0.1)
        weights = torch.rand(2, ROWS, dtype=torch.float64)
        found.append(run(clean, noised, labels, weights, {"cap": 12.0, "smoothing": 0.1}, (True, True), torch.bfloat16))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
