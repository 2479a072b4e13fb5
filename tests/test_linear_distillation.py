"""Distillation from hidden states: against the equations in float64, memory that stays flat, what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastpost
from fastpost.ops import chunks, distillation_walk, head
from fastpost.ops.linear_distillation import DistillationOptions, OutputLayer, distillation_loss_of

from .conftest import same_bits
from .memory import cpu_peak_bytes

ROWS, WIDTH, TEACHER_WIDTH, VOCAB = (3, 70), 24, 40, 501
LEAST = 1_200_000  # bytes that make several chunks of it
NAMES = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")


class Problem:
    """A student and a wider teacher over one vocabulary, and labels, a seventh of which do not count."""

    def __init__(self, dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = ROWS) -> None:
        g = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.tensors = [
            t.to(dtype)
            for t in (
                normal(*rows, WIDTH), normal(VOCAB, WIDTH) / 3, normal(VOCAB),
                normal(*rows, TEACHER_WIDTH), normal(VOCAB, TEACHER_WIDTH) / 4, normal(VOCAB),
            )
        ]  # fmt: skip
        self.labels = torch.randint(0, VOCAB, rows, generator=g)
        self.labels[torch.rand(rows, generator=g) < 1 / 7] = -100

    def leaves(self, *frozen: int) -> list[Tensor]:
        return [t.clone().requires_grad_(k not in frozen) for k, t in enumerate(self.tensors)]


def fused(leaves: list[Tensor], labels: Tensor | None = None, **kwargs: Any) -> Any:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = leaves
    return fastpost.linear_distillation_loss(
        hidden, weight, teacher_hidden, teacher_weight, labels, bias=bias, teacher_bias=teacher_bias,
        **{"memory_budget": LEAST, **kwargs},
    )  # fmt: skip


def truth(
    leaves: list[Tensor],
    labels: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Tensor | None = None,
    reduction: str = "token",
    num_items: float | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    grad: str = "student",
    ce_weighting: str = "none",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the equations, in float64, by torch's autograd; leaves are both heads' tensors, or both logits."""
    z, t = leaves if len(leaves) == 2 else [F.linear(*leaves[k : k + 3]) for k in (0, 3)]
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if teacher_softcap:
        t = teacher_softcap * torch.tanh(t / teacher_softcap)
    if grad == "student":
        t = t.detach()
    log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    if divergence == "js":
        log_m = (beta * p + (1 - beta) * q).log()
        rows = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    elif divergence == "total_variation":
        rows = (p - q).abs().sum(-1) / 2
    else:
        rows = {"forward_kl": forward, "reverse_kl": reverse, "symmetric_kl": forward + reverse}[divergence]
    counts = torch.ones(rows.shape, dtype=torch.bool) if labels is None else labels != -100
    counts = counts if mask is None else counts & mask
    ce = torch.zeros_like(rows)
    if ce_weight:
        assert labels is not None
        log_z = z.log_softmax(-1)
        ce = -(1 - label_smoothing) * log_z.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ce = ce - label_smoothing * log_z.mean(-1)
        if ce_weighting == "probability":
            ce = z.softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).detach() * ce
    rows, ce = (torch.where(counts, x, torch.zeros_like(x)) for x in (rows, ce))
    if reduction == "none":
        return divergence_weight * rows + ce_weight * ce, ce, rows
    n = 1 if reduction == "sum" else counts.sum() if num_items is None else num_items
    rows, ce = rows.sum() / n, ce.sum() / n
    return divergence_weight * rows + ce_weight * ce, ce, rows


def agree(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-9, atol: float = 1e-13) -> None:
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# -- against the equations ------------------------------------------------------------------------------------------------

CASES: list[dict[str, Any]] = [
    {},
    {"grad": "both"},
    {"temperature": 2.0},
    {"temperature": 0.7, "grad": "both", "ce_weight": 0.5, "divergence_weight": 2.0},
    {"ce_weight": 1.0},
    {"reduction": "sum", "ce_weight": 0.1},
    {"num_items": 50, "ce_weight": 1.0},
    {"softcap": 3.0, "teacher_softcap": 5.0, "grad": "both", "ce_weight": 1.0, "temperature": 1.5},
    {"teacher_softcap": 5.0, "grad": "both"},
    {"divergence_weight": 0.0, "ce_weight": 1.0},
    {"divergence_weight": 0.3, "ce_weight": 2.0, "ce_weighting": "probability", "softcap": 3.0, "temperature": 1.5},
    {"ce_weight": 0.5, "label_smoothing": 0.1, "softcap": 3.0, "temperature": 1.5},
    {"divergence_weight": 0.0, "ce_weight": 2.0, "label_smoothing": 0.3, "ce_weighting": "probability"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients_in_float64(divergence: str, case: dict[str, Any]) -> None:
    problem = Problem()
    ours, theirs = problem.leaves(), problem.leaves()
    got = fused(ours, problem.labels, divergence=divergence, **case)
    want = truth(theirs, problem.labels, divergence=divergence, **case)
    if case.get("divergence_weight") == 0:
        want = (want[0], want[1], torch.zeros_like(want[2]))
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=0)
    assert not got.task_loss.requires_grad
    assert not got.divergence.requires_grad
    (3 * got.loss).backward()
    (3 * want[0]).backward()
    agree(ours, theirs)


WEIGHED = {"divergence_weight": 0.3, "ce_weight": 2.0, "ce_weighting": "probability", "divergence": "reverse_kl"}


@pytest.mark.parametrize(("reduction", "grad"), [("token", "student"), ("none", "both")])
def test_from_logits(reduction: str, grad: str) -> None:
    """As from hidden states, with a chunk of rows copied at a time; padding may hold anything."""
    problem = Problem()
    z, t = (F.linear(*problem.tensors[k : k + 3]) for k in (0, 3))
    ours, theirs = ([x.clone().requires_grad_() for x in (z, t)] for _ in range(2))
    how = {"reduction": reduction, "grad": grad, **WEIGHED}
    got = fastpost.distillation_loss(*ours, problem.labels, memory_budget=LEAST, **how)
    want = truth(theirs, problem.labels, **how)
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=1e-15)
    factors = torch.rand(want[0].shape, dtype=torch.float64)
    for loss in (got.loss, want[0]):
        (factors * loss).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("reduction", ["token", "none"])
def test_weights_by_probability_of_one_chunk_whose_rows_all_count(reduction: str) -> None:
    """The rows' weights are the caller's own: they serve the value, and another backward pass."""
    problem = Problem()
    problem.labels.clamp_(min=0)
    ours, theirs = problem.leaves(), problem.leaves()
    how = {"reduction": reduction, **WEIGHED}
    got, want = fused(ours, problem.labels, memory_budget=1 << 30, **how), truth(theirs, problem.labels, **how)
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=1e-15)
    for _ in range(2):
        got.loss.sum().backward(retain_graph=True)
    (2 * want[0]).sum().backward()
    agree(ours, theirs)


@pytest.mark.parametrize("headless", [False, True])
def test_a_student_without_a_teacher(headless: bool) -> None:
    """DFT alone: the same bits as with a teacher whose divergence has no weight, without a product for one."""
    problem = Problem(torch.float32)
    found = []
    for alone in (True, False):
        tensors = [t.clone().requires_grad_() for t in problem.tensors[:3]]
        layer = OutputLayer(F.linear(*tensors)) if headless else OutputLayer(*tensors)
        options = DistillationOptions(divergence_weight=0.0, ce_weight=1.0, ce_weighting="probability", memory_budget=LEAST)
        loss = distillation_loss_of("test", layer, None if alone else layer, problem.labels, options).loss
        loss.backward()
        found.append([loss.detach(), *(t.grad for t in tensors)])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    exact = [t.double().requires_grad_() for t in problem.tensors[:3]]
    z, kept = F.linear(*exact)[problem.labels != -100].log_softmax(-1), problem.labels[problem.labels != -100]
    own = z.gather(-1, kept[:, None])
    want = -(own.exp().detach() * own).mean()
    want.backward()
    torch.testing.assert_close(found[0][0].double(), want.detach(), rtol=1e-5, atol=0)
    for got, t in zip(found[0][1:], exact, strict=True):
        torch.testing.assert_close(got.double(), t.grad, rtol=1e-4, atol=1e-7)


def test_weights_by_probability_of_labels_that_cannot_be() -> None:
    """A label of probability 0 has weight 0, and its infinite cross-entropy adds nothing."""
    logits = torch.tensor([[0.0, 1.0, -1e4], [2.0, 0.0, 1.0]], requires_grad=True)
    how = {"divergence_weight": 0.0, "ce_weight": 1.0, "ce_weighting": "probability", "num_items": 1}
    out = fastpost.distillation_loss(logits, logits.detach(), torch.tensor([2, 0]), **how)
    out.loss.backward()
    p = logits.detach().softmax(-1)[1, 0]
    assert out.task_loss == pytest.approx(float(-p * p.log()), rel=1e-6)
    assert logits.grad[0].abs().max() == 0
    assert logits.grad[1, 0] == pytest.approx(float(p * (p - 1)), rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("grad", ["student", "both"])
def test_beta_weighs_the_teacher(beta: float, grad: str) -> None:
    problem = Problem()
    ours, theirs = problem.leaves(), problem.leaves()
    got, want = (f(x, divergence="js", beta=beta, grad=grad)[0] for f, x in ((fused, ours), (truth, theirs)))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    got.backward()
    want.backward()
    agree(ours, theirs)


@pytest.mark.parametrize("grad", ["student", "both"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_right_to_1e_6(divergence: str, grad: str) -> None:
    """Value and gradients, against float64 from the same inputs."""
    problem = Problem(torch.float32)
    ours = problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    how: dict[str, Any] = {
        "divergence": divergence,
        "ce_weight": 0.5,
        "grad": grad,
        "temperature": 1.3,
        "label_smoothing": 0.1,
    }
    got, want = fused(ours, problem.labels, **how), truth(exact, problem.labels, **how)
    for a, b in zip(got, want, strict=True):
        assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-6)
    got.loss.backward()
    want[0].backward()
    for name, a, b in zip(NAMES, ours, exact, strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    ours = problem.leaves()
    exact = [t.detach().double().requires_grad_() for t in ours]
    got, want = (f(x, problem.labels, ce_weight=0.5, grad="both") for f, x in ((fused, ours), (truth, exact)))
    assert got.loss.dtype == torch.float32
    assert float(got.loss.detach()) == pytest.approx(float(want[0].detach()), rel=1e-6)
    got.loss.backward()
    want[0].backward()
    for a, b in zip(ours, exact, strict=True):
        assert a.grad.dtype == dtype
        rounded = float((b.grad.to(dtype).double() - b.grad).norm() / b.grad.norm())
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 1.1 * rounded + 1e-6


def test_streams_of_different_dtypes() -> None:
    """A bfloat16 teacher of a float32 student; one float64 argument makes everything float64."""
    problem = Problem(torch.float32)
    ours = [*problem.leaves()[:3], *(t.bfloat16() for t in problem.tensors[3:])]
    exact = [t.detach().double().requires_grad_(k < 3) for k, t in enumerate(ours)]
    got, want = fused(ours), truth(exact)
    assert float(got.loss.detach()) == pytest.approx(float(want[0].detach()), rel=1e-6)
    got.loss.backward()
    want[0].backward()
    for a, b in zip(ours[:3], exact[:3], strict=True):
        assert float((a.grad.double() - b.grad).norm() / b.grad.norm()) < 1e-6
    assert fused([*ours[:3], *(t.double() for t in problem.tensors[3:])]).loss.dtype == torch.float64


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_loss_of_every_row(ce_weight: float) -> None:
    problem = Problem()
    ours, theirs = problem.leaves(), problem.leaves()
    got = fused(ours, problem.labels, reduction="none", ce_weight=ce_weight, grad="both")
    want = truth(theirs, problem.labels, reduction="none", ce_weight=ce_weight, grad="both")
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=0)
    upstream = torch.rand(ROWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got.loss.backward(upstream)
    want[0].backward(upstream)
    agree(ours, theirs)


@pytest.mark.parametrize("labelled", [False, True])
def test_mask(labelled: bool) -> None:
    problem = Problem()
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < 0.5
    labels, options = (problem.labels, {"ce_weight": 1.0}) if labelled else (None, {})
    ours, theirs = problem.leaves(), problem.leaves()
    got, want = fused(ours, labels, mask=mask, **options), truth(theirs, labels, mask=mask, **options)
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=0)
    got.loss.backward()
    want[0].backward()
    agree(ours, theirs)
    items = fused(problem.tensors, labels, mask=mask, num_items=10, **options).loss
    torch.testing.assert_close(items, truth(problem.tensors, labels, mask=mask, num_items=10, **options)[0])


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2), (3,), (4, 5), (0, 4, 5), (1, 2, 3)])
def test_frozen_parts_get_nothing(frozen: tuple[int, ...]) -> None:
    problem = Problem()
    everything, some = problem.leaves(), problem.leaves(*frozen)
    for leaves in (everything, some):
        fused(leaves, problem.labels, grad="both", ce_weight=1.0).loss.backward()
    for k, (a, b) in enumerate(zip(everything, some, strict=True)):
        if k in frozen:
            assert b.grad is None
        else:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grad", ["student", "both"])
def test_one_head_for_both(grad: str) -> None:
    """Self-distillation: the head's gradient is that of both streams, or of the student's alone."""
    problem = Problem()
    found = []
    for function in (fused, truth):
        student, weight, bias, *_ = problem.leaves()
        teacher = (student.detach() + 0.1).requires_grad_()
        function([student, weight, bias, teacher, weight, bias], grad=grad)[0].backward()
        found.append((student.grad, weight.grad, bias.grad, teacher.grad))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert (found[0][3] is None) == (grad == "student")


def test_identical_streams_are_exactly_nothing() -> None:
    problem = Problem(torch.float32)
    for divergence in DIVERGENCES:
        student, weight, bias, *_ = problem.leaves()
        out = fused([student, weight, bias, student.detach(), weight.detach(), bias.detach()], divergence=divergence)
        assert float(out.loss.detach()) == 0
        out.loss.backward()
        assert not student.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize(("beta", "apart"), [(1e-4, 1e-2), (1e-6, 1e-3)])
def test_js_over_beta_becomes_the_forward_kl(beta: float, apart: float) -> None:
    """GKD's limit: JS(beta) / beta -> KL(p || q)."""
    problem = Problem()
    js = float(fused(problem.tensors, divergence="js", beta=beta).loss) / beta
    assert js == pytest.approx(float(fused(problem.tensors).loss), rel=apart)


def test_chunks_change_nothing_but_rounding() -> None:
    problem = Problem()
    found = []
    for budget in (LEAST, 1 << 30):
        leaves = problem.leaves()
        out = fused(leaves, problem.labels, memory_budget=budget, ce_weight=1.0, grad="both")
        out.loss.backward()
        found.append([out.loss.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_a_second_backward_pass_is_the_first_again() -> None:
    problem = Problem()
    leaves = problem.leaves()
    loss = fused(leaves, problem.labels, grad="both").loss
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(-loss, leaves)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(first, [-2 * g for g in third], rtol=1e-12, atol=1e-15)


def test_no_row_counts() -> None:
    problem = Problem()
    for options in ({"labels": torch.full(ROWS, -100), "ce_weight": 1.0}, {"mask": torch.zeros(ROWS, dtype=torch.bool)},
                    {"labels": problem.labels, "num_items": 0}):  # fmt: skip
        leaves = problem.leaves()
        out = fused(leaves, **options)
        assert [float(v.detach()) for v in out] == [0, 0, 0]
        out.loss.backward()
        assert not any(t.grad.any() for t in leaves[:3])


@pytest.mark.parametrize("skips", [True, False])
def test_rows_that_do_not_count_are_not_looked_at(skips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where they are skipped nor where they are walked (on a GPU)."""
    monkeypatch.setattr(distillation_walk, "skips_rows", lambda device: skips)
    problem = Problem()
    clean, poisoned = problem.leaves(), problem.leaves()
    with torch.no_grad():
        poisoned[0][problem.labels == -100] = torch.nan
        poisoned[3][problem.labels == -100] = torch.inf
    for leaves in (clean, poisoned):
        fused(leaves, problem.labels, ce_weight=1.0, grad="both", softcap=5.0).loss.backward()
    assert all(same_bits(a.grad, b.grad) for a, b in zip(clean, poisoned, strict=True))


# -- as on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_of_16_bits(dtype: torch.dtype) -> None:
    """Operands rounded as tensor cores take them: each gradient as right as the rounding lets it be."""
    problem = Problem(torch.float32)
    tensors = [t.to(dtype).float() for t in problem.tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    truth(exact, num_items=1e4, grad="both")[0].backward()
    n = math.prod(ROWS)
    flat = [t.reshape(n, -1) if t.ndim == 3 else t for t in tensors]
    weights = torch.full((1, n), 1e-4, dtype=torch.float64)
    how = distillation_walk.Settings(-100, "forward_kl", 0.5, 1.0, 0.0, 0.0, False, 64, dtype, dtype, 0.0, "")
    _, *grads = torch.ops.fastpost.linear_distillation(*flat, None, weights, *how, [True] * 6)
    for g, t in zip(grads, exact, strict=True):
        assert float((g.double() - t.grad.reshape(g.shape)).norm() / t.grad.norm()) < 2 * torch.finfo(dtype).eps


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", ["student", "both"])
@pytest.mark.parametrize("rows", [512, 4096])
def test_the_budget_bounds_what_is_held(rows: int, grad: str) -> None:
    problem = Problem(torch.float32, (rows,))
    leaves = problem.leaves()

    def peak(budget: int) -> int:
        return cpu_peak_bytes(
            lambda: fused(leaves, problem.labels, memory_budget=budget, grad=grad, ce_weight=1.0).loss.backward()
        )

    budget = 500_000
    taught = leaves if grad == "both" else leaves[:3]
    beside = sum(t.numel() for t in taught) * 4 + 150 * rows
    assert peak(budget) <= budget + beside
    assert peak(1 << 30) > budget + beside  # the measure sees what happens inside of the operation
    assert 2 * rows * VOCAB * 4 > budget


def test_a_teacher_that_learns_nothing_costs_its_logits_alone() -> None:
    """Beside what the student's gradients take, a chunk of the teacher's logits and its row of operands."""
    problem = Problem(torch.float32, (512,))
    student, teacher = problem.leaves(3, 4, 5), problem.leaves()
    peaks = [cpu_peak_bytes(lambda x=x: fused(x, memory_budget=1 << 30).loss.backward()) for x in (student, teacher)]
    assert peaks[0] == peaks[1]  # that it could learn does not matter
    both = cpu_peak_bytes(lambda: fused(teacher, memory_budget=1 << 30, grad="both").loss.backward())
    assert both - peaks[0] >= 4 * (VOCAB * TEACHER_WIDTH + 512 * TEACHER_WIDTH)
    with torch.no_grad():
        assert not fused(teacher).loss.requires_grad


def test_a_budget_too_small_for_64_rows() -> None:
    problem = Problem(torch.float32)
    with pytest.raises(ValueError, match=r"linear_distillation_loss: memory_budget of 1,000 bytes holds 0 rows of two"):
        fused(problem.leaves(), memory_budget=1000)


def test_bytes_of_a_row() -> None:
    """Two streams of 512 logits; a learning stream's operand, carried gradient and its copy; the other's operand alone."""
    work = torch.float32
    both = chunks.distillation_row_bytes(VOCAB, [(24, work, True), (40, work, False)])
    assert both == 2 * 512 * 4 + 24 * (4 + 8 + 4) + 40 * (4 + 4)
    narrow = chunks.distillation_row_bytes(VOCAB, [(24, torch.bfloat16, True), (40, torch.bfloat16, False)])
    assert narrow == 512 * (4 + 2) + 512 * 4 + 24 * (2 + 8 + 4) + 40 * (2 + 4)


# -- torch ----------------------------------------------------------------------------------------------------------------


def test_gradcheck() -> None:
    problem = Problem(rows=(5,))

    def loss(*tensors: Tensor) -> Tensor:
        return fused(list(tensors), problem.labels, softcap=5.0, ce_weight=0.3, divergence="js", beta=0.2, grad="both").loss

    assert torch.autograd.gradcheck(loss, problem.leaves(), fast_mode=True)


@pytest.mark.parametrize("reduction", ["token", "none"])
def test_compiles_whole(reduction: str) -> None:
    problem = Problem(torch.float32)

    def loss(*tensors: Tensor) -> Tensor:
        hidden, *rest = tensors
        return fused([torch.tanh(hidden), *rest], problem.labels, ce_weight=0.3, reduction=reduction).loss.sum() * 2

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = problem.leaves()
        value = function(*leaves)
        value.backward()
        found.append([value.detach(), *(t.grad for t in leaves[:3])])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_autocast_on_the_cpu_computes_in_float32() -> None:
    problem = Problem(torch.float32)
    found = []
    for enabled in (False, True):
        leaves = problem.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = fused(leaves)
        out.loss.backward()
        found.append([out.loss, *(t.grad for t in leaves[:3])])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def test_under_checkpointing() -> None:
    """The loss computed again in the backward pass gives the same gradients."""
    problem = Problem()
    found = []
    for again in (False, True):
        leaves = problem.leaves()

        def loss(*tensors: Tensor) -> Tensor:
            return fused([torch.tanh(tensors[0]), *tensors[1:]], problem.labels, ce_weight=1.0).loss

        value = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False) if again else loss(*leaves)
        value.backward()
        found.append([t.grad for t in leaves[:3]])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "unknown divergence 'kl'"),
        ({"divergence": "js", "beta": 0.0}, ValueError, "beta must lie in .*'forward_kl' and 'reverse_kl'"),
        ({"divergence": "js", "beta": 1}, ValueError, "beta must lie in"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0"),
        ({"temperature": 1e-300}, ValueError, "temperature must be finite and > 0"),
        ({"temperature": "2"}, TypeError, "temperature must be a number, not '2'"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, TypeError, r"pass float\(temperature\)"),
        ({"divergence_weight": torch.tensor(2.0, requires_grad=True)}, TypeError, r"pass float\(divergence_weight\)"),
        ({"beta": None}, TypeError, "beta must be a number, not None"),
        ({"ce_weight": 1.0}, ValueError, "ce_weight=1 needs labels"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight must be finite and >= 0"),
        ({"ce_weighting": "dft"}, ValueError, "unknown ce_weighting 'dft'"),
        ({"ce_weighting": "probability"}, ValueError, "weighs the cross-entropy, and ce_weight is 0"),
        ({"ce_weight": 1.0, "label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"ce_weight": 1.0, "label_smoothing": -0.1}, ValueError, "label_smoothing must be finite and >= 0"),
        ({"label_smoothing": 0.1}, ValueError, "label_smoothing=0.1 is of the cross-entropy, and ce_weight is 0"),
        ({"divergence_weight": math.nan}, ValueError, "divergence_weight must be finite"),
        ({"reduction": "mean"}, ValueError, "unknown reduction 'mean'"),
        ({"grad": "teacher"}, ValueError, "unknown grad 'teacher'"),
        ({"softcap": 0.0}, ValueError, "softcap must be"),
        ({"teacher_softcap": -1.0}, ValueError, "teacher_softcap must be"),
        ({"num_items": -1}, ValueError, "num_items must be finite and >= 0"),
        ({"num_items": 1, "reduction": "sum"}, ValueError, "num_items goes with reduction 'token'"),
        ({"labels": torch.full(ROWS, VOCAB)}, ValueError, "label 501 in row 0 is outside"),
        ({"labels": torch.zeros(3)}, ValueError, "labels have shape"),
        ({"labels": torch.zeros(ROWS)}, TypeError, "labels must be integers"),
        ({"mask": torch.zeros(3, dtype=torch.bool)}, ValueError, "mask has shape"),
        ({"mask": torch.zeros(ROWS)}, TypeError, "mask must be bool"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused(Problem().leaves(), **change)


@pytest.mark.parametrize("reduction", ["token", "none"])
def test_a_teacher_that_was_run_in_inference_mode(reduction: str) -> None:
    """Its hidden states, head, labels and logits have no version, and torch saves none of these for a backward pass."""
    problem = Problem()
    with torch.inference_mode():
        teacher, labels = [t.detach() * 1 for t in problem.leaves()[3:]], problem.labels * 1
        logits = F.linear(*teacher)
    assert all(t.is_inference() for t in (*teacher, labels, logits))
    ours, theirs = problem.leaves(), problem.leaves()
    expected = truth(theirs, problem.labels, ce_weight=0.5, reduction=reduction)[0]
    expected.sum().backward()
    found = fused([*ours[:3], *teacher], labels, ce_weight=0.5, reduction=reduction).loss
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    torch.testing.assert_close([t.grad for t in ours[:3]], [t.grad for t in theirs[:3]], rtol=1e-9, atol=1e-13)
    again = problem.leaves()[:3]
    options: dict[str, Any] = {"ce_weight": 0.5, "reduction": reduction}
    fastpost.distillation_loss(F.linear(*again), logits, labels, **options).loss.sum().backward()
    torch.testing.assert_close([t.grad for t in again], [t.grad for t in theirs[:3]], rtol=1e-9, atol=1e-13)
    batched = problem.leaves()[:3]
    loss = fused([*batched, *teacher], labels, ce_weight=0.5, reduction=reduction).loss.sum()
    (twice,) = torch.autograd.grad(loss, batched[0], torch.tensor([1.0, 2.0], dtype=loss.dtype), is_grads_batched=True)
    once = theirs[0].grad
    assert once is not None
    torch.testing.assert_close(twice, torch.stack((once, 2 * once)))


@pytest.mark.parametrize(
    ("at", "change", "error", "message"),
    [
        (
            4,
            lambda t: t[:-1],
            ValueError,
            r"the student's vocabulary has 501 classes, the teacher's 500; pass the rows of both",
        ),
        (3, lambda t: t[:2], ValueError, r"hidden has shape \(3, 70, 24\), teacher_hidden \(2, 70, 40\); all but the last"),
        (
            1,
            lambda t: t.T,
            ValueError,
            r"hidden \(\.\.\., width\) has shape \(3, 70, 24\), weight \(vocab, width\) \(24, 501\)",
        ),
        (4, lambda t: t.T, ValueError, r"teacher_hidden \(\.\.\., width\) has shape"),
        (5, lambda t: t[1:], ValueError, "teacher_bias has shape"),
        (3, lambda t: t.long(), TypeError, r"teacher_hidden has dtype torch\.int64"),
        (1, lambda t: None, TypeError, "weight is a NoneType, not a tensor"),
    ],
)
def test_bad_tensors(at: int, change: Any, error: type[Exception], message: str) -> None:
    tensors = Problem().tensors
    tensors[at] = change(tensors[at])
    if at == 4 and "vocabulary" in message:
        tensors[5] = tensors[5][:-1]
    with pytest.raises(error, match=f"^linear_distillation_loss: .*{message}|^linear_distillation_loss: {message}"):
        fused(tensors)


def test_a_divergence_that_is_infinite_names_its_row() -> None:
    tensors = Problem().tensors
    tensors[2] = tensors[2].clone()
    tensors[2][7] = -math.inf  # a class that the student rules out
    with pytest.raises(
        ValueError, match=r"in row 0 the student has no probability .* where the teacher has some, so forward_kl"
    ):
        fused(tensors)
    with pytest.raises(ValueError, match=r"in row 0 one of the two has no probability .* so symmetric_kl is infinite"):
        fused(tensors, divergence="symmetric_kl")
    swapped = tensors[3:] + tensors[:3]
    with pytest.raises(
        ValueError, match=r"in row 0 the teacher has no probability .* where the student has some, so reverse_kl"
    ):
        fused(swapped, divergence="reverse_kl")
    for remedy in ("js", "total_variation"):
        assert math.isfinite(float(fused(tensors, divergence=remedy).loss))
        assert math.isfinite(float(fused(swapped, divergence=remedy).loss))
    assert math.isfinite(float(fused(tensors, divergence="reverse_kl").loss))
    assert math.isfinite(float(fused(tensors, divergence="js").loss))
    tensors[5] = tensors[5].clone()
    tensors[5][7] = -math.inf  # and the teacher: it does not exist
    assert math.isfinite(float(fused(tensors).loss))


def test_vocabularies_are_mapped_by_index() -> None:
    problem = Problem()
    index = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:300]
    hidden, weight, bias, *teacher = problem.tensors
    mapped = fused([hidden, weight[index], bias[index], teacher[0], teacher[1][index], teacher[2][index]]).loss
    log_q, log_p = (F.linear(*x)[..., index].log_softmax(-1) for x in ((hidden, weight, bias), teacher))
    assert float(mapped) == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-9)


def test_the_operands_dtype_is_the_weights() -> None:
    assert head.operand_dtype(torch.zeros(1), torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert head.operand_dtype(torch.zeros(1).bfloat16(), torch.zeros(1)) == torch.float32  # CPUs multiply in float32


def test_liger_and_trl_conventions() -> None:
    """beta is the teacher's share, as in TRL's generalised Jensen-Shannon: m = beta p + (1 - beta) q."""
    problem = Problem()
    out = fused(problem.tensors, divergence="js", beta=0.3)
    log_q, log_p = (F.linear(*problem.tensors[k : k + 3]).log_softmax(-1) for k in (0, 3))
    log_m = torch.logsumexp(torch.stack((log_q + math.log(0.7), log_p + math.log(0.3))), dim=0)
    rows = 0.3 * F.kl_div(log_m, log_p, log_target=True, reduction="none").sum(-1)
    rows = rows + 0.7 * F.kl_div(log_m, log_q, log_target=True, reduction="none").sum(-1)
    assert np.isclose(float(out.loss), float(rows.mean()), rtol=1e-10)
