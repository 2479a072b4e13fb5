"""R-Drop and the Jensen-Shannon divergence through the fused head: against the equations in float64, memory, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastpost
from fastpost.ops import linear_rows

from .memory import cpu_peak_bytes
from .test_linear_divergence import LEAST, ROWS, VOCAB, Problem


def log_softmaxes(leaves: list[Tensor], softcap: float | None = None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    hidden, noised, weight, bias = leaves
    logits = (h @ weight.T + bias for h in (hidden, noised))
    if softcap is not None:
        logits = (softcap * torch.tanh(z / softcap) for z in logits)
    first, second = ((z / temperature).log_softmax(-1) for z in logits)
    return first, second


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()
    return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2


def close_gradients(ours: list[Tensor], theirs: list[Tensor], rtol: float, atol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=atol)


# -- R-Drop ---------------------------------------------------------------------------------------------------------------


def r_drop(leaves: list[Tensor], labels: Tensor, **kwargs: Any) -> Any:
    hidden, second, weight, bias = leaves
    return fastpost.linear_r_drop_loss(hidden, second, weight, labels, bias=bias, **{"memory_budget": LEAST, **kwargs})


def r_drop_truth(
    leaves: list[Tensor],
    labels: Tensor,
    alpha: float = 1.0,
    reduction: str = "token",
    num_items: float | None = None,
    label_smoothing: float = 0.0,
    **logits: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """2106.14448, section 2, averaged over both passes."""
    counts = labels != -100
    log_p, log_q = (t[counts] for t in log_softmaxes(leaves, **logits))
    target = F.one_hot(labels[counts], VOCAB).double() * (1 - label_smoothing) + label_smoothing / VOCAB
    n = 1 if reduction == "sum" else counts.sum() if num_items is None else num_items
    task = -(target * (log_p + log_q)).sum() / (2 * n)
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / (2 * n)
    return task + alpha * kl, task, kl


R_DROP_CASES: list[dict[str, Any]] = [
    {},
    {"alpha": 0.3},
    {"alpha": 0.0},
    {"alpha": 0.0, "label_smoothing": 0.1},
    {"reduction": "sum"},
    {"num_items": 50},
    {"label_smoothing": 0.1},
    {"softcap": 3.0, "temperature": 0.5, "label_smoothing": 0.2, "alpha": 2.0},
]


@pytest.mark.parametrize("case", R_DROP_CASES, ids=str)
def test_r_drop_in_float64(case: dict[str, Any]) -> None:
    problem = Problem(0.1)
    ours, theirs = problem.leaves(), problem.leaves()
    got, want = r_drop(ours, problem.labels, **case), r_drop_truth(theirs, problem.labels, **case)
    symm_kl = want[2] if case.get("alpha") != 0 else torch.zeros_like(want[2])
    torch.testing.assert_close(list(got), [want[0], want[1], symm_kl], rtol=1e-11, atol=0)
    assert not got.task_loss.requires_grad
    assert not got.symm_kl.requires_grad
    (3 * got.loss).backward()
    (3 * want[0]).backward()
    close_gradients(ours, theirs, 1e-9, 1e-13)


def test_r_drop_in_float32() -> None:
    problem = Problem(0.3, torch.float32)
    ours = problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    got, want = r_drop(ours, problem.labels), r_drop_truth(exact, problem.labels)
    for a, b in zip(got, want, strict=True):
        assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-6)
    got.loss.backward()
    want[0].backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_r_drop_of_16_bit_weights(dtype: torch.dtype) -> None:
    problem = Problem(0.3, dtype)
    ours = problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    got, want = r_drop(ours, problem.labels), r_drop_truth(exact, problem.labels)
    assert float(got.loss.detach()) == pytest.approx(float(want[0].detach()), rel=1e-5)
    got.loss.backward()
    want[0].backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == dtype
        rounded = float((b.grad.to(dtype).double() - b.grad).norm() / b.grad.norm())
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 1.1 * rounded + 1e-5


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_r_drop_looks_at_no_row_that_does_not_count(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where such rows are skipped nor where they are walked (on a GPU)."""
    problem = Problem(0.1)
    for skips in (True, False):
        monkeypatch.setattr(linear_rows, "skips_rows", lambda device, skips=skips: skips)
        clean, poisoned = problem.leaves(), problem.leaves()
        with torch.no_grad():
            for stream in poisoned[:2]:
                stream[problem.labels == -100] = math.nan
        losses = []
        for leaves in (clean, poisoned):
            losses.append(r_drop(leaves, problem.labels, alpha=alpha).loss)
            losses[-1].backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=0)
        close_gradients(poisoned, clean, 0, 0)
        none = r_drop(poisoned, torch.full(ROWS, -100), alpha=alpha)
        assert [float(v.detach()) for v in none] == [0, 0, 0]


@pytest.mark.parametrize("frozen", [(0, 1), (2, 3), (1, 2, 3)])
def test_r_drop_with_frozen_parts(frozen: tuple[int, ...]) -> None:
    problem = Problem(0.1)
    everything, some = problem.leaves(), problem.leaves(*frozen)
    for leaves in (everything, some):
        r_drop(leaves, problem.labels).loss.backward()
    for k, (a, b) in enumerate(zip(everything, some, strict=True)):
        if k in frozen:
            assert b.grad is None
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be finite and >= 0, not -1"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"reduction": "tokens"}, ValueError, "token"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"num_items": -1}, ValueError, "num_items"),
        ({"memory_budget": 1000}, ValueError, "holds 0 rows of two streams"),
    ],
)
def test_r_drop_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem()
    with pytest.raises(error, match=f"^linear_r_drop_loss: .*{message}|{message}"):
        r_drop(problem.leaves(), problem.labels, **change)


def test_r_drop_bad_tensors() -> None:
    problem = Problem()
    hidden, second, weight, _ = problem.leaves()
    with pytest.raises(ValueError, match=r"^linear_r_drop_loss: hidden has shape .*second_hidden"):
        fastpost.linear_r_drop_loss(hidden, second[:1], weight, problem.labels)
    with pytest.raises(ValueError, match=r"^linear_r_drop_loss: label 501 in row"):
        fastpost.linear_r_drop_loss(hidden, second, weight, torch.full(ROWS, VOCAB))
    with pytest.raises(TypeError, match=r"^linear_r_drop_loss: second_hidden has dtype torch\.int64"):
        fastpost.linear_r_drop_loss(hidden, second.long(), weight, problem.labels)


# -- Jensen-Shannon -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.5}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_js_in_float64(reduction: str, masked: bool, options: dict[str, Any]) -> None:
    problem = Problem(1.0)
    mask = problem.labels != -100 if masked else None
    ours, theirs = problem.leaves(), problem.leaves()
    got = fastpost.linear_js_divergence(
        *ours[:3], bias=ours[3], mask=mask, reduction=reduction, memory_budget=LEAST, **options
    )
    rows = jensen_shannon(*log_softmaxes(theirs, **options))
    rows = rows if mask is None else rows * mask
    counted = rows.numel() if mask is None else int(mask.sum())
    divisor = {"none": 1, "sum": 1, "mean": counted, "batchmean": len(rows)}[reduction]
    want = (rows if reduction == "none" else rows.sum()) / divisor
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)
    upstream = torch.rand(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    got.backward(upstream)
    want.backward(upstream)
    close_gradients(ours, theirs, 1e-8, 1e-12)


@pytest.mark.parametrize("apart", [3.0, 0.3])
def test_js_in_float32(apart: float) -> None:
    problem = Problem(apart, torch.float32)
    ours = problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    got = fastpost.linear_js_divergence(*ours[:3], bias=ours[3], reduction="mean", memory_budget=LEAST)
    want = jensen_shannon(*log_softmaxes(exact)).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    got.backward()
    want.backward()
    # The difference of the streams is a product of its own, and rounded once when it is added to the clean logits.
    for a, b, bound in zip(ours, exact, [1e-6, 1e-6 + 2.0**-23 / apart, 1e-6, 1e-6], strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < bound


@pytest.mark.parametrize("grad", ["noised", "clean"])
def test_js_into_one_stream(grad: str) -> None:
    problem = Problem(1.0)
    ours, theirs = problem.leaves(), problem.leaves()
    fastpost.linear_js_divergence(*ours[:3], bias=ours[3], grad=grad, reduction="sum", memory_budget=LEAST).backward()
    log_p, log_q = log_softmaxes(theirs)
    jensen_shannon(*((log_p.detach(), log_q) if grad == "noised" else (log_p, log_q.detach()))).sum().backward()
    frozen = 0 if grad == "noised" else 1
    assert ours[frozen].grad is None or not ours[frozen].grad.any()
    taught = [k for k in range(4) if k != frozen]
    close_gradients([ours[k] for k in taught], [theirs[k] for k in taught], 1e-8, 1e-12)


def test_js_of_identical_streams_is_nothing() -> None:
    problem = Problem(0.0, torch.float32)
    ours = problem.leaves()
    rows = fastpost.linear_js_divergence(*ours[:3], bias=ours[3], reduction="none")
    assert not rows.any()
    rows.sum().backward()
    assert not any(t.grad.any() for t in ours)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_js_beside_the_cross_entropy(label_smoothing: float) -> None:
    problem = Problem(1.0)
    ours, theirs = problem.leaves(), problem.leaves()
    got = fastpost.linear_r3f_loss(
        *ours[:3], problem.labels, bias=ours[3], r3f_lambda=0.3, divergence="js", label_smoothing=label_smoothing,
        memory_budget=LEAST,
    )  # fmt: skip
    log_p, log_q = log_softmaxes(theirs)
    counts = problem.labels != -100
    task = F.cross_entropy(log_p[counts], problem.labels[counts], label_smoothing=label_smoothing)
    divergence = jensen_shannon(log_p, log_q)[counts].mean()
    torch.testing.assert_close(list(got), [task + 0.3 * divergence, task, divergence], rtol=1e-9, atol=0)
    got.loss.backward()
    (task + 0.3 * divergence).backward()
    close_gradients(ours, theirs, 1e-8, 1e-12)


def test_js_bad_input() -> None:
    problem = Problem()
    leaves = problem.leaves()
    with pytest.raises(ValueError, match=r"^linear_js_divergence: hidden has shape .*noised_hidden"):
        fastpost.linear_js_divergence(leaves[0], leaves[1][:1], leaves[2])
    with pytest.raises(ValueError, match="unknown reduction 'token'"):
        fastpost.linear_js_divergence(*leaves[:3], reduction="token")
    with pytest.raises(ValueError, match=r"unknown divergence 'jsd'\. Did you mean 'js'"):
        fastpost.linear_r3f_loss(*leaves[:3], problem.labels, divergence="jsd")


# -- both -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [512, 4096])
def test_the_budget_bounds_what_is_held(rows: int) -> None:
    problem = Problem(dtype=torch.float32, rows=(rows,))
    leaves = problem.leaves()
    budget = 600_000
    beside = sum(t.numel() for t in leaves) * 8 + 200 * rows
    for loss in (
        lambda: r_drop(leaves, problem.labels, memory_budget=budget).loss,
        lambda: fastpost.linear_js_divergence(*leaves[:3], bias=leaves[3], memory_budget=budget),
    ):
        assert cpu_peak_bytes(lambda loss=loss: loss().backward()) <= budget + beside
    assert 2 * rows * VOCAB * 4 > budget


def test_gradcheck_and_compile() -> None:
    problem = Problem(0.3, rows=(5,))
    labels = problem.labels

    def loss(hidden: Tensor, second: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        leaves = [hidden, second, weight, bias]
        return r_drop(leaves, labels, softcap=5.0, label_smoothing=0.1).loss + fastpost.linear_js_divergence(
            hidden, second, weight, bias=bias, softcap=5.0
        )

    assert torch.autograd.gradcheck(loss, problem.leaves(), fast_mode=True)
    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()
        value = function(*leaves)
        value.backward()
        found.append([value.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
