"""Rows of logits whose gradients are operands of an output head's products: against the equations in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpost.dispatch import select
from fastpost.row_tasks import OperandTask

from .conftest import CPU_BACKENDS, same_bits

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
    noised_classifies: bool = False,
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
        target = F.one_hot(known.squeeze(-1), a.shape[-1]).double() * (1 - smoothing) + smoothing / a.shape[-1]
        for logs in (log_p, log_q) if noised_classifies else (log_p,):
            ce = ce + torch.where(counts, -logs.gather(-1, known).squeeze(-1), 0.0)
            value = value + (torch.where(counts, -(target * logs).sum(-1), 0.0) * ce_weights).sum()
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
    dtype: torch.dtype, op: str = "operand_rows",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """kl, ce and both operands: in the logits' place for float32."""
    rows, cols = clean.shape
    if dtype == torch.float32:
        first, second = clean, noised
    else:
        room = torch.full((2 * rows, -(-cols // 64) * 64), math.nan, dtype=dtype)
        first, second = room[:rows, :cols], room[rows:, :cols]
    operands = [t if w else None for t, w in zip((first, second), want, strict=True)]
    kl, ce = torch.full((2, rows), math.nan, dtype=torch.float64)
    counts = None if labels is None else weights[1]
    task = OperandTask(clean, noised, labels, -100, weights[0], counts, kl, ce, *operands, **rule)
    select(op, clean.device, clean.dtype)(task)
    return kl, ce, *operands


PLAIN = {"smoothing": 0.0, "cap": 0.0, "teaches": True}
RULES: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.1},
    {"cap": 12.0},
    {"teaches": False},
    {"smoothing": 0.2, "cap": 12.0, "teaches": False},
    {"noised_classifies": True},
    {"smoothing": 0.1, "cap": 12.0, "noised_classifies": True},
    {"noised_classifies": True, "teaches": False},
]


# Triton's interpreter is slow, and a kernel's sums do not know the dtype of what it writes: each of both once.
APART = [(1e-2, torch.float32), (1.0, torch.bfloat16)]
if "triton" not in CPU_BACKENDS:
    APART = [*APART, (1e-2, torch.bfloat16), (1.0, torch.float32)]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize(("apart", "dtype"), APART)
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
        kl, ce, *gradients = truth(clean, noised, chosen, *weights, **{**PLAIN, **rule})
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


# -- what a row that is not a number makes of values and gradients --------------------------------------------------------

Logits = tuple[Tensor, Tensor]
LABEL, OTHER = 3, 9  # a class that is the label of every row, and one that is not


def _with(clean: dict[int, float], noised: dict[int, float]) -> Any:
    def change(a: Tensor, b: Tensor) -> None:
        for row, changes in ((a, clean), (b, noised)):
            for place, value in changes.items():
                row[place] = value

    return change


def _all(clean: float | None, noised: float | None) -> Any:
    def change(a: Tensor, b: Tensor) -> None:
        for row, value in ((a, clean), (b, noised)):
            if value is not None:
                row.fill_(value)

    return change


MINUS = -math.inf
ODD_ROWS: dict[str, Any] = {
    "plain": _with({}, {}),
    "far apart": _with({OTHER: 12.0}, {LABEL: 10.0}),
    "missing in both": _with({OTHER: MINUS}, {OTHER: MINUS}),
    "missing in clean": _with({OTHER: MINUS}, {}),
    "missing in noised": _with({}, {OTHER: MINUS}),
    "label missing in both": _with({LABEL: MINUS}, {LABEL: MINUS}),
    "label missing in clean": _with({LABEL: MINUS}, {}),
    "label missing in noised": _with({}, {LABEL: MINUS}),
    "NaN in clean": _with({OTHER: math.nan}, {}),
    "NaN in noised": _with({}, {OTHER: math.nan}),
    "NaN label in clean": _with({LABEL: math.nan}, {}),
    "NaN label in noised": _with({}, {LABEL: math.nan}),
    "inf in clean": _with({OTHER: math.inf}, {}),
    "inf in noised": _with({}, {OTHER: math.inf}),
    "inf in both": _with({OTHER: math.inf}, {OTHER: math.inf}),
    "inf beside -inf": _with({OTHER: math.inf}, {OTHER: MINUS}),
    "NaN beside -inf": _with({OTHER: MINUS}, {OTHER: math.nan}),
    "missing and NaN": _with({OTHER: MINUS}, {OTHER + 1: math.nan}),
    "nothing in clean": _all(MINUS, None),
    "nothing in noised": _all(None, MINUS),
    "nothing in both": _all(MINUS, MINUS),
    "NaN throughout": _all(math.nan, math.nan),
}
# Weights of divergence and cross-entropy, and whether the label counts.
WEIGHED = ((0.7, 0.4, True), (0.0, 0.4, True), (0.7, 0.0, True), (0.0, 0.0, True), (0.7, 0.4, False))


def odd_rows(cols: int, cap: float, some: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """Logits of all kinds of rows under all weights, labels, the weights (2, rows), and what each row is.

    some: each kind under one of the weights only, another one for each number: Triton's interpreter is slow.
    """
    clean, noised, labels, weights, names = [], [], [], [], []
    cases = itertools.product(ODD_ROWS.items(), WEIGHED)
    for k, ((name, change), (kl, ce, counts)) in enumerate(cases):
        if some is not None and (k + k // len(WEIGHED)) % len(WEIGHED) != some % len(WEIGHED):
            continue
        a = 2 * torch.randn(cols)
        b = a + (0.05, 1.0)[k % 2] * torch.randn(cols)
        change(a, b)
        clean.append(a)
        noised.append(b)
        labels.append(LABEL if counts else -100)
        weights.append((kl, ce))
        names.append(f"{name} {kl, ce, counts}")
    streams = [torch.stack(rows) for rows in (clean, noised)]
    if cap:
        streams = [cap * torch.tanh(z / cap) for z in streams]
    return *streams, torch.tensor(labels), torch.tensor(weights, dtype=torch.float64).T.contiguous(), names


def equations(
    a: Tensor, b: Tensor, counts: bool, kl_weight: float, ce_weight: float, smoothing: float = 0.0, cap: float = 0.0,
    teaches: bool = True, noised_classifies: bool = False, mixture: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One row in float64: divergence, cross-entropy, and the gradients of both streams.

    mixture: the divergence is Jensen-Shannon's, which is finite where a class is missing in one stream.
    """
    a, b = a.double(), b.double()
    none = torch.zeros_like(a)
    diverges, classifies = kl_weight != 0, counts and ce_weight != 0
    target = torch.full_like(a, smoothing / len(a))
    target[LABEL] += 1 - smoothing

    def before_cap(gradient: Tensor, z: Tensor) -> Tensor:
        return gradient * (1 - (z / cap) ** 2) if cap else gradient

    def divergence() -> tuple[Tensor, Tensor, Tensor]:
        unknown = torch.full_like(a, math.nan)
        absent = (a == MINUS) & (b == MINUS)
        if not bool(((a < math.inf) & (b < math.inf)).all()) or bool(absent.all()):
            return torch.tensor(math.nan), unknown, unknown
        if mixture:
            log_m = torch.logaddexp(a.log_softmax(-1), b.log_softmax(-1)) - math.log(2)
            p, q = a.softmax(-1), b.softmax(-1)
            r, s = (torch.where(z == MINUS, none, z.log_softmax(-1) - log_m) for z in (a, b))
            forth, back = (p * r).sum(), (q * s).sum()
            return (forth + back) / 2, p * (r - forth) / 2, q * (s - back) / 2
        if bool(((a == MINUS) != (b == MINUS)).any()):
            return torch.tensor(math.inf), unknown, unknown
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        r = torch.where(absent, none, log_p - log_q)
        forth, back = (p * r).sum(), -(q * r).sum()
        return forth + back, p * (r - forth) + p - q, q * (-r - back) + q - p

    def cross_entropy(z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = z.log_softmax(-1)
        return -log_p[LABEL], before_cap(ce_weight * (log_p.exp() - target), z)

    kl, to_clean, to_noised = divergence() if diverges else (none[0], none, none)
    ce, grads = none[0], [none, before_cap(kl_weight * to_noised, b) if diverges else none]
    if classifies:
        ce, grads[0] = cross_entropy(a)
    if classifies and diverges and noised_classifies:
        more, task = cross_entropy(b)
        ce, grads[1] = ce + more, grads[1] + task
    if teaches and diverges:
        grads[0] = grads[0] + before_cap(kl_weight * to_clean, a)
    return kl.double(), ce, *grads


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["operand_rows"] if CPU_BACKENDS == ("triton",) else ["operand_rows", "js_operand_rows"])
def test_rows_that_are_no_numbers(backend: str, rule: dict[str, Any], cols: int, dtype: torch.dtype, op: str) -> None:
    """Every kind of row under every weight: values and gradients are right, and infinite or NaN where they should be."""
    if backend == "cuda" and op == "js_operand_rows" and rule.get("noised_classifies"):
        pytest.skip("R-Drop's divergence is the symmetric KL, and no loss has both")
    some = RULES.index(rule) if backend == "triton" else None
    clean, noised, labels, weights, names = odd_rows(cols, rule.get("cap", 0.0), some)
    kls, ces, *exact = map(torch.stack, zip(*(
        equations(a, b, int(y) != -100, float(kl), float(ce), **rule, mixture=op == "js_operand_rows")
        for a, b, y, kl, ce in zip(clean, noised, labels, *weights, strict=True)
    ), strict=True))  # fmt: skip
    wants = list(itertools.product((True, False), repeat=2))
    for want in wants if some is None else (wants[0], wants[1 + some % 3]):
        kl, ce, *operands = run(clean.clone(), noised.clone(), labels, weights, rule, want, dtype, op)
        expected = [exact[0] + exact[1] if want[1] else exact[0], exact[1]]
        # Rounding to the operand's dtype; and of what was summed up 1e-6.
        rtol = 1e-5 if dtype == torch.float32 else 4e-3
        summed = 1e-6 * sum(g.nan_to_num().abs().amax(-1, keepdim=True) for g in exact) + 1e-6
        for what, got, true, bound in (
            ("kl", kl, kls, 1e-6 * kls.abs() + 1e-7),
            ("ce", ce, ces, 1e-6 * ces.abs() + 1e-7),
            *((what, got, true, rtol * true.abs() + summed)
              for what, got, true in zip(("first", "second"), operands, expected, strict=True)),
        ):  # fmt: skip
            if got is not None:
                same = (got == true) | (got.isnan() & true.isnan())
                near = same | (true.isfinite() & ((got.double() - true).abs() <= bound))
                wrong = (~near).reshape(len(names), -1).any(-1).nonzero().flatten().tolist()
                assert not wrong, (what, want, [names[at] for at in wrong])
