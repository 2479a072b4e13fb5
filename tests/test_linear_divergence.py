"""The fused head: against the equations in float64, against `r3f_loss` on logits, memory that stays flat, bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastpost
from fastpost.ops import chunks, linear_rows
from fastpost.ops.head import power_of_two

from . import oracles
from .conftest import same_bits
from .memory import cpu_peak_bytes

ROWS, WIDTH, VOCAB = (3, 70), 24, 501
LEAST = 2_000_000  # bytes that make several chunks of it


class Problem:
    """Hidden states of two streams, a head and labels, a seventh of which do not count."""

    def __init__(self, apart: float = 1e-2, dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = ROWS) -> None:
        g = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(*rows, WIDTH, generator=g, dtype=torch.float64)
        self.noised = self.hidden + apart * torch.randn(*rows, WIDTH, generator=g, dtype=torch.float64)
        self.weight = torch.randn(VOCAB, WIDTH, generator=g, dtype=torch.float64) / 3
        self.bias = torch.randn(VOCAB, generator=g, dtype=torch.float64)
        self.labels = torch.randint(0, VOCAB, rows, generator=g)
        self.labels[torch.rand(rows, generator=g) < 1 / 7] = -100
        self.tensors = [t.to(dtype) for t in (self.hidden, self.noised, self.weight, self.bias)]

    def leaves(self, *frozen: int) -> list[Tensor]:
        return [t.clone().requires_grad_(k not in frozen) for k, t in enumerate(self.tensors)]


def fused(leaves: list[Tensor], labels: Tensor, **kwargs: Any) -> Any:
    hidden, noised, weight, bias = leaves
    return fastpost.linear_r3f_loss(hidden, noised, weight, labels, bias=bias, **{"memory_budget": LEAST, **kwargs})


def truth(
    leaves: list[Tensor],
    labels: Tensor,
    r3f_lambda: float = 1.0,
    reduction: str = "token",
    num_items: float | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    grad: str = "both",
) -> tuple[Tensor, Tensor, Tensor]:
    """From the equations, in float64, by torch's autograd."""
    hidden, noised, weight, bias = leaves
    z, zn = (h @ weight.T + bias for h in (hidden, noised))
    if softcap is not None:
        z, zn = (softcap * torch.tanh(t / softcap) for t in (z, zn))
    z, zn = z / temperature, zn / temperature
    log_p, log_q = z.log_softmax(-1), zn.log_softmax(-1)
    counts = labels != -100
    uniform = VOCAB / (VOCAB - 1) if reduction == "fairseq" else 1.0
    target = (
        F.one_hot(labels.clamp(min=0), VOCAB).double() * (1 - label_smoothing * uniform) + label_smoothing * uniform / VOCAB
    )
    ce = -(target * log_p).sum(-1)
    if grad == "noised":
        log_p = log_p.detach()
    if grad == "clean":
        log_q = log_q.detach()
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    n = counts.sum() if num_items is None else num_items
    if reduction == "sum":
        n = 1
    task = ce[counts].sum() / n
    symm = kl.sum() / len(z) if reduction == "fairseq" else kl[counts].sum() / n
    return task + r3f_lambda * symm, task, symm


CASES: list[dict[str, Any]] = [
    {},
    {"r3f_lambda": 0.3},
    {"r3f_lambda": 0.0},
    {"reduction": "sum"},
    {"reduction": "fairseq"},
    {"num_items": 50},
    {"label_smoothing": 0.1},
    {"reduction": "fairseq", "label_smoothing": 0.1},
    {"softcap": 3.0},
    {"temperature": 1.7},
    {"softcap": 3.0, "temperature": 0.5, "label_smoothing": 0.2},
    {"grad": "noised"},
    {"grad": "clean"},
    {"grad": "noised", "softcap": 3.0, "label_smoothing": 0.1, "r3f_lambda": 2.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case: dict[str, Any]) -> None:
    problem = Problem()
    ours, theirs = problem.leaves(), problem.leaves()
    got = fused(ours, problem.labels, **case)
    want = truth(theirs, problem.labels, **case)
    torch.testing.assert_close([got.loss, got.task_loss, got.symm_kl if case.get("r3f_lambda") != 0 else want[2]],
                               list(want), rtol=1e-11, atol=0)  # fmt: skip
    (3 * got.loss).backward()
    (3 * want[0]).backward()
    for a, b in zip(ours, theirs, strict=True):
        if a.grad is None:  # what the clean stream alone decides says nothing of the noised one
            assert a is ours[1]
            assert case.get("r3f_lambda") == 0
            continue
        expected = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_float32_loses_only_the_digits_that_float32_logits_lack(apart: float) -> None:
    """Against float64 from the same inputs. The noised stream's gradient is proportional to what the logits (of about 1)
    differ by, so one rounding of them shows in it as 2^-23 / apart; products rounded on their way show several times that.
    """
    problem = Problem(apart, torch.float32)
    ours = problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    got, want = fused(ours, problem.labels), truth(exact, problem.labels)
    assert float(got.loss.detach()) == pytest.approx(float(want[0].detach()), rel=1e-6)
    assert float(got.symm_kl) == pytest.approx(float(want[2].detach()), rel=1e-5)
    got.loss.backward()
    want[0].backward()
    bounds = [1e-6, 1e-6 + 2.0**-23 / apart, 1e-6, 1e-6]
    for a, b, bound in zip(ours, exact, bounds, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < bound


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_symmetric_kl(reduction: str, masked: bool) -> None:
    problem = Problem()
    mask = problem.labels != -100 if masked else None
    ours, theirs = problem.leaves(), problem.leaves()
    got = fastpost.linear_symmetric_kl(
        *ours[:3], bias=ours[3], mask=mask, reduction=reduction, memory_budget=LEAST
    )  # fmt: skip
    log_p, log_q = ((h @ theirs[2].T + theirs[3]).log_softmax(-1) for h in theirs[:2])
    kl = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    kl = kl if mask is None else kl * mask
    counted = kl.numel() if mask is None else int(mask.sum())
    divisor = {"none": 1, "sum": 1, "mean": counted, "batchmean": len(kl)}[reduction]
    want = (kl if reduction == "none" else kl.sum()) / divisor
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-15)
    upstream = torch.rand(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(1))
    got.backward(upstream)
    want.backward(upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("frozen", [(0, 1), (2,), (2, 3), (0, 1, 3), (1, 2, 3), (0, 2, 3)])
def test_what_is_frozen_costs_and_gets_nothing(frozen: tuple[int, ...]) -> None:
    problem = Problem()
    everything, some = problem.leaves(), problem.leaves(*frozen)
    fused(everything, problem.labels).loss.backward()
    fused(some, problem.labels).loss.backward()
    for k, (a, b) in enumerate(zip(everything, some, strict=True)):
        if k in frozen:
            assert b.grad is None
        else:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


def test_chunks_change_nothing_but_rounding() -> None:
    problem = Problem()
    found = []
    for budget in (LEAST, 1 << 30):
        leaves = problem.leaves()
        out = fused(leaves, problem.labels, memory_budget=budget)
        out.loss.backward()
        found.append([out.loss.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_no_gradients_wanted() -> None:
    problem = Problem()
    leaves = problem.leaves()
    with torch.no_grad():
        out = fused(leaves, problem.labels)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, truth(leaves, problem.labels)[0].detach(), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"label_smoothing": 0.1}, {"softcap": 2.0, "label_smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradients_wanted_of_capped_and_smoothed_logits(dtype: torch.dtype, options: dict[str, float]) -> None:
    """Values alone, of logits whose gradients are the kernel's last work elsewhere."""
    problem = Problem(dtype=dtype)
    leaves = problem.leaves()
    exact = [t.detach().double() for t in leaves]
    with torch.no_grad():
        out = fused(leaves, problem.labels, **options)
    expected = truth(exact, problem.labels, **options)[0]
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=0)
    if "softcap" in options:
        hidden, noised, weight, bias = leaves
        softcap = options["softcap"]
        rows = fastpost.linear_symmetric_kl(hidden, noised, weight, bias=bias, softcap=softcap, reduction="none")
        z, zn = (softcap * torch.tanh((h @ exact[2].T + exact[3]) / softcap) for h in exact[:2])
        p, q = z.log_softmax(-1), zn.log_softmax(-1)
        kl = ((p.exp() - q.exp()) * (p - q)).sum(-1)
        torch.testing.assert_close(rows.double(), kl, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-9)
        rows.sum().backward()
        assert all(bool(t.grad.isfinite().all()) for t in leaves if t.grad is not None)


def test_a_second_backward_pass_is_the_first_again() -> None:
    problem = Problem()
    leaves = problem.leaves()
    loss = fused(leaves, problem.labels).loss
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(-loss, leaves)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(first, [-2 * g for g in third], rtol=1e-12, atol=1e-15)


def test_tied_embeddings_sum_their_gradients() -> None:
    problem = Problem()
    ids = torch.arange(ROWS[0] * ROWS[1]).reshape(ROWS) % VOCAB
    found = []
    for function in (fused, truth):
        table = problem.weight.clone().requires_grad_()
        hidden = torch.tanh(F.embedding(ids, table))
        leaves = [hidden, hidden + 0.01, table, problem.bias]
        out = function(leaves, problem.labels)
        out[0].backward()
        found.append(table.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)


def test_every_label_ignored() -> None:
    problem = Problem()
    leaves = problem.leaves()
    out = fused(leaves, torch.full(ROWS, -100))
    assert [float(v.detach()) for v in out] == [0, 0, 0]
    out.loss.backward()
    assert all(t.grad is not None and not t.grad.any() for t in leaves)


def test_rows_that_do_not_count_are_not_looked_at() -> None:
    problem = Problem()
    poisoned = problem.leaves()
    with torch.no_grad():
        poisoned[0][problem.labels == -100] = torch.nan
    clean = problem.leaves()
    for leaves in (clean, poisoned):
        fused(leaves, problem.labels).loss.backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(clean, poisoned, strict=True))


# -- 16 bits --------------------------------------------------------------------------------------------------------------


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_weights_are_as_right_as_those_of_float32_logits(dtype: torch.dtype) -> None:
    problem = Problem(3e-2, dtype)
    ours, reference = problem.leaves(), problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    fused(ours, problem.labels).loss.backward()
    truth(exact, problem.labels)[0].backward()
    # As a careful user writes it: the product in 16 bits, then float32.
    hidden, noised, weight, bias = reference
    logits = [(F.linear(h, weight, bias)).float() for h in (hidden, noised)]
    fastpost.r3f_loss(*logits, problem.labels).loss.backward()
    for a, b, x in zip(ours, reference, exact, strict=True):
        assert a.dtype == a.grad.dtype == dtype
        assert relative(a.grad, x.grad) <= 2 * relative(b.grad, x.grad)


def run_as_on_a_gpu(problem: Problem, leaves: list[Tensor], operands: torch.dtype, delta: bool = True) -> list[Tensor]:
    """The operation with operands rounded to 16 bits, as tensor cores take them; kl, then the gradients."""
    hidden, noised, weight, bias = leaves
    flat = [t.detach().reshape(-1, WIDTH) for t in (hidden, noised)]
    if not delta:  # rounded beforehand, both streams by themselves
        flat = [t.to(operands).float().to(operands) for t in flat]
    n = len(flat[0])
    ones = torch.ones(n, dtype=torch.float64)
    how = (-100, 0.0, 0.0, 1.0, 64, "both", operands, "", "symmetric_kl", False)
    values, hidden_grads, *grads = torch.ops.fastpost.linear_divergence(
        *flat, weight.detach(), bias.detach(), problem.labels.reshape(-1).clamp(min=0), torch.stack((ones / n, ones * 0)),
        *how, [True] * 4,
    )  # fmt: skip
    return [values[0], *hidden_grads, *grads]


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4])
def test_the_difference_survives_operands_of_16_bits(apart: float) -> None:
    problem = Problem(apart, torch.float32)
    problem.weight = problem.weight.bfloat16().double()  # the weight's own rounding moves both streams alike
    problem.tensors[2] = problem.weight.float()
    leaves = problem.leaves()
    exact = truth([problem.hidden.float().double(), problem.noised.float().double(), problem.weight, problem.bias],
                  problem.labels.clamp(min=0))[2]  # fmt: skip
    apart_kl = run_as_on_a_gpu(problem, leaves, torch.bfloat16, delta=False)[0].mean()
    delta_kl = run_as_on_a_gpu(problem, leaves, torch.bfloat16)[0].mean()
    assert abs(float(delta_kl / exact) - 1) < 0.02
    if apart <= 1e-3:
        assert abs(float(apart_kl / exact) - 1) > 1


def test_tiny_gradients_survive_float16_operands() -> None:
    problem = Problem(1e-3, torch.float32)
    for name in ("hidden", "noised", "weight"):
        setattr(problem, name, getattr(problem, name).half().double())
    problem.tensors = [t.float() for t in (problem.hidden, problem.noised, problem.weight, problem.bias)]
    exact = [t.double().requires_grad_() for t in problem.tensors]
    truth(exact, problem.labels.clamp(min=0), num_items=problem.labels.numel())[2].backward()
    _, *grads = run_as_on_a_gpu(problem, problem.leaves(), torch.float16)
    assert all(relative(g, x.grad.reshape(g.shape)) < 5e-3 for g, x in zip(grads, exact, strict=True))
    assert float(grads[2].abs().max()) < 1e-4


def test_power_of_two() -> None:
    for x in (torch.tensor([0.0, 3.0, -5.0]), torch.tensor([1e-30]), torch.tensor([1e-3], dtype=torch.float16)):
        factor = float(power_of_two(x))
        assert math.frexp(factor)[0] == 0.5
        assert 0.5 <= factor * float(x.abs().max()) < 1
    for x in (torch.zeros(3), torch.tensor([torch.inf]), torch.tensor([torch.nan]), torch.zeros(0)):
        assert float(power_of_two(x)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_on_the_cpu_computes_in_float32(dtype: torch.dtype) -> None:
    problem = Problem(1e-2, dtype)
    found = []
    for autocast in (False, True):
        leaves = problem.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = fused(leaves, problem.labels)
        out.loss.backward()
        found.append([out.loss, *(t.grad for t in leaves)])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [512, 4096])
def test_the_budget_bounds_what_is_held(rows: int, dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype, rows=(rows,))
    leaves = problem.leaves()

    def peak(budget: int) -> int:
        return cpu_peak_bytes(lambda: fused(leaves, problem.labels, memory_budget=budget).loss.backward())

    budget = 600_000
    # Gradients while they are summed (float32) and as they are handed out; per row, its weights, labels and values.
    beside = sum(t.numel() for t in leaves) * (4 + dtype.itemsize) + 200 * rows
    both_streams = 2 * rows * VOCAB * 4
    assert peak(budget) <= budget + beside
    assert peak(1 << 30) > budget + beside  # the measure sees what happens inside of the operation
    assert both_streams > budget


def test_the_backward_pass_makes_no_second_gradients() -> None:
    problem = Problem(rows=(64,))
    leaves = problem.leaves()
    loss = fused(leaves, problem.labels).loss
    assert cpu_peak_bytes(loss.backward) <= sum(t.numel() * t.element_size() for t in leaves) / 4


# A row of the small problem in float32: two streams of 512 logits; of hidden states 3 blocks of operands, 5 of results.
PER_ROW = 2 * 512 * 4 + WIDTH * (3 * 4 + 5 * 4)


@pytest.mark.parametrize(
    ("rows", "device", "budget", "most", "size"),
    [
        (5000, "cpu", 1 << 40, 1024, 1024),
        (5000, "cuda", 1 << 40, (1 << 40) // PER_ROW, 5000),  # whole logits
        (5000, "cuda", 5000 * PER_ROW, 5000, 5000),
        (5000, "cuda", 4999 * PER_ROW, 4999, 2560),
        (5000, "cpu", 400 * PER_ROW, 400, 384),
        (5000, "cpu", 700 * PER_ROW, 700, 640),  # eight chunks; of 512 rows they would be ten
        (5000, "cpu", 100 * PER_ROW, 100, 100),
        (10, "cpu", 10 * PER_ROW, 10, 10),
    ],
)
def test_chunk_rows(rows: int, device: str, budget: int, most: int, size: int) -> None:
    found = chunks.chunk_rows("op", rows, VOCAB, WIDTH, torch.float32, torch.device(device), budget)
    assert found == most
    assert chunks.even_chunk(rows, found) == size


def test_a_budget_too_small_for_64_rows() -> None:
    problem = Problem(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"memory_budget of 1,000 bytes holds 0 rows of two streams of 501 logits; 64 rows need"
    ):
        fused(problem.leaves(), problem.labels, memory_budget=1000)
    few = Problem(dtype=torch.float32, rows=(3,))
    fused(few.leaves(), few.labels, memory_budget=20_000)


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, y: ([t[0], t[1][:2], *t[2:]], y, {}), ValueError, "noised_hidden"),
        (lambda t, y: ([t[0], t[1], t[2].T, t[3]], y, {}), ValueError, r"weight \(vocab, width\)"),
        (lambda t, y: ([*t[:3], t[3][1:]], y, {}), ValueError, "bias has shape"),
        (lambda t, y: (t, y[:2], {}), ValueError, "labels have shape"),
        (lambda t, y: (t, y + VOCAB, {}), ValueError, "is outside"),
        (lambda t, y: (t, y.double(), {}), TypeError, "labels must be integers"),
        (lambda t, y: (t, y, {"softcap": 0.0}), ValueError, "softcap"),
        (lambda t, y: (t, y, {"temperature": -1.0}), ValueError, "temperature"),
        (lambda t, y: (t, y, {"grad": "nosed"}), ValueError, "noised"),
        (lambda t, y: (t, y, {"label_smoothing": 1.0}), ValueError, "label_smoothing"),
        (lambda t, y: (t, y, {"r3f_lambda": math.nan}), ValueError, "r3f_lambda"),
        (lambda t, y: (t, y, {"num_items": -1}), ValueError, "num_items"),
        (lambda t, y: (t, y, {"reduction": "tokens"}), ValueError, "token"),
        (lambda t, y: ([t[0].long(), *t[1:]], y, {}), TypeError, "dtype"),
        (lambda t, y: ([None, *t[1:]], y, {}), TypeError, "hidden is a NoneType"),
        (lambda t, y: (t, y, {"memory_budget": math.inf}), ValueError, "memory_budget must be finite and > 0, not inf"),
        (lambda t, y: (t, y, {"memory_budget": -5}), ValueError, "memory_budget must be finite and > 0, not -5"),
        (lambda t, y: (t, y, {"memory_budget": 0}), ValueError, "memory_budget must be finite and > 0, not 0"),
        (lambda t, y: (t, y, {"memory_budget": "1GB"}), TypeError, "memory_budget must be a number, not '1GB'"),
    ],
)
def test_bad_input(change: Any, error: type[Exception], message: str) -> None:
    problem = Problem()
    tensors, labels, options = change([t.clone() for t in problem.tensors], problem.labels.clone())
    with pytest.raises(error, match=message):
        fused(tensors, labels, **options)


def test_infinite_divergence_names_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    leaves = [t.clone() for t in problem.tensors]
    leaves[0].view(-1, WIDTH)[4] = torch.inf
    monkeypatch.setenv("FASTPOST_CHECKS", "1")
    with pytest.raises(ValueError, match="linear_symmetric_kl: row 4 holds"):
        fastpost.linear_symmetric_kl(*leaves[:3], memory_budget=LEAST)


def test_a_class_that_one_stream_rules_out_names_its_row() -> None:
    problem = Problem()
    flat = [t.reshape(-1, WIDTH) for t in problem.tensors[:2]]
    logits = [h @ problem.weight.T for h in flat]
    logits[1][9, 3] = -torch.inf
    labels = torch.zeros(len(flat[0]), dtype=torch.int64)
    with pytest.raises(ValueError, match="r3f_loss: row 9 holds a class that is -inf in one stream only"):
        fastpost.r3f_loss(*logits, labels)
    assert float(fastpost.symmetric_kl(*logits)) == math.inf
    logits[1][9, 3] = torch.nan  # an overflow is for the loss scaler to see
    assert math.isnan(float(fastpost.r3f_loss(*logits, labels).loss))


# -- torch ----------------------------------------------------------------------------------------------------------------


def test_compiles_whole() -> None:
    problem = Problem(dtype=torch.float32)

    def loss(hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused([torch.tanh(hidden), torch.tanh(noised), weight, bias], problem.labels, label_smoothing=0.1).loss * 2

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()
        value = function(*leaves)
        value.backward()
        found.append([value.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def test_gradcheck() -> None:
    problem = Problem(0.3, rows=(5,))
    leaves = problem.leaves()
    labels = problem.labels

    def loss(*tensors: Tensor) -> Tensor:
        return fused(list(tensors), labels, softcap=5.0, label_smoothing=0.1).loss

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


def test_divergence_is_that_of_the_oracle() -> None:
    problem = Problem(1e-5)
    z, zn = (problem.weight @ h.reshape(-1, WIDTH).T for h in (problem.hidden, problem.noised))
    value = oracles.divergence(z.T, zn.T)[0].sum()
    ours = fastpost.linear_symmetric_kl(problem.hidden, problem.noised, problem.weight, reduction="sum")
    assert float(ours) == pytest.approx(float(value), rel=1e-6)


@pytest.mark.parametrize("given", [0, 0.0, torch.tensor(0)])
def test_no_items_and_rows_that_do_not_count(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in rows that do not count reaches neither loss nor gradients, also where such rows are walked (on a GPU)."""
    problem = Problem()
    tensors = [t.detach().clone() for t in problem.tensors]
    labels = problem.labels.clone()
    labels[::2] = -100
    tensors[0][::2] = tensors[1][::2] = torch.nan
    outside = [t[1::2] for t in tensors[:2]]
    for walked in (False, True):
        if walked:
            monkeypatch.setattr(linear_rows, "skips_rows", lambda device: False)
        for softcap in (None, 5.0):
            mine, theirs = ([t.clone().requires_grad_() for t in ts] for ts in (tensors, [*outside, *tensors[2:]]))
            got = fastpost.linear_r3f_loss(*mine[:3], labels, bias=mine[3], label_smoothing=0.1, softcap=softcap)
            want = fastpost.linear_r3f_loss(*theirs[:3], labels[1::2], bias=theirs[3], label_smoothing=0.1, softcap=softcap)
            torch.testing.assert_close(got.loss, want.loss)
            grads, expected = (torch.autograd.grad(out.loss, ts) for out, ts in ((got, mine), (want, theirs)))
            for g, e in zip(grads[:2], expected[:2], strict=True):
                assert not g[::2].any()
                torch.testing.assert_close(g[1::2], e)
            for g, e in zip(grads[2:], expected[2:], strict=True):
                torch.testing.assert_close(g, e)
        mine = [t.clone().requires_grad_() for t in tensors]
        none = torch.full_like(labels, -100)
        out = fastpost.linear_r3f_loss(*mine[:3], none, bias=mine[3], num_items=given)
        assert (float(out.loss), float(out.task_loss), float(out.symm_kl)) == (0.0, 0.0, 0.0)
        assert not any(g.any() for g in torch.autograd.grad(out.loss, mine))
