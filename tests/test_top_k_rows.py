"""Rows of a student's logits beside k classes of a teacher: against the equations in float64, over k + 1 probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastpost.dispatch import select
from fastpost.row_tasks import TopKTask

from .conftest import CPU_BACKENDS, same_bits

if CPU_BACKENDS == ("triton",):
    pytest.skip("Triton has no such kernel", allow_module_level=True)

DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")
ROWS = 4


def kl(a: Tensor, b: Tensor) -> Tensor:
    """Of probabilities' logarithms; a class without a share has no term."""
    there = a > -math.inf
    return torch.where(there, a.exp() * (a.where(there, 0) - b.where(there, 0)), 0).sum(-1)


def truth(
    before: Tensor, ids: Tensor, log_p: Tensor, labels: Tensor | None = None, *, divergence: str = "forward_kl",
    beta: float = 0.5, temperature: float = 1.0, has_rest: bool = True, cap: float = 0.0, smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Divergence and cross-entropy of each row, float64. log_p: of the known classes and, last, of the rest."""
    z = cap * torch.tanh(before / cap) if cap else before
    log_q = (z / temperature).log_softmax(-1)
    known = torch.zeros_like(z, dtype=torch.bool).scatter(1, ids, True)
    rest = log_q.masked_fill(known, -math.inf).logsumexp(-1, keepdim=True)
    log_q = log_q.gather(1, ids)
    if has_rest:
        log_q = torch.cat((log_q, rest), 1)
    else:
        log_p, log_q = log_p[:, :-1].log_softmax(-1), log_q.log_softmax(-1)
    m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    value = {
        "forward_kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "symmetric_kl": lambda: kl(log_p, log_q) + kl(log_q, log_p),
        "js": lambda: beta * kl(log_p, m) + (1 - beta) * kl(log_q, m),
        "total_variation": lambda: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2,
    }[divergence]()
    ce = torch.zeros_like(value)
    if labels is not None:
        ce = F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    return value, ce


def problem(cols: int, k: int, temperature: float = 1.0, apart: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A student's float32 logits, the teacher's most probable classes, and the logarithms of their probabilities and, last,
    of the rest's."""
    g = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(ROWS, cols, generator=g)
    teacher = (logits + apart * torch.randn(ROWS, cols, generator=g)).double() / temperature
    log_probs, ids = teacher.log_softmax(-1).topk(k, -1)
    rest = teacher.log_softmax(-1).scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return logits, ids, torch.cat((log_probs, rest), 1)


def run(
    logits: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, weights: Tensor | None = None,
    dtype: torch.dtype = torch.float32, inplace: bool = False, wants: bool = True, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Value, cross-entropy and gradient; the logits in rows at a distance of their own, as the head lays them out."""
    rows, cols = logits.shape
    weights = torch.ones(2, rows, dtype=torch.float64) if weights is None else weights
    value, ce = torch.full((2, rows), math.nan, dtype=torch.float64)
    room, grad = (torch.full((rows, cols + 13), math.nan, dtype=d)[:, :cols] for d in (torch.float32, dtype))
    room.copy_(logits)
    grad = room if inplace else grad
    task = TopKTask(
        room, ids.contiguous(), log_probs.contiguous(), labels, -100, weights[0], None if labels is None else weights[1],
        value, None if labels is None else ce, grad if wants else None, **options,
    )  # fmt: skip
    select("top_k_rows", logits.device, logits.dtype)(task)
    return value, ce, grad


def gradient(logits: Tensor, weights: Tensor, cap: float, *rest: Any, **options: Any) -> tuple[Tensor, ...]:
    """The truth, with the gradient of its weighted sum by torch's autograd."""
    before = logits.double() if not cap else cap * torch.atanh(logits.double() / cap)
    before.requires_grad_()
    value, ce = truth(before, *rest, cap=cap, **options)
    (got,) = torch.autograd.grad((weights[0] * value + weights[1] * ce).sum(), before)
    return value.detach(), ce.detach(), got


def agree(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found[0], exact[0], rtol=rtol, atol=1e-13)
    for got, want in zip(found[2], exact[2], strict=True):
        assert float((got.double() - want).norm()) <= rtol * float(want.norm()) + 1e-12


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("cols", "k"), [(3, 1), (3, 3), (300, 1), (300, 16), (1031, 1031), (20011, 64)])
def test_values_and_gradients(backend: str, divergence: str, cols: int, k: int) -> None:
    for has_rest, given in ((True, True), (True, False), (False, False)):
        if k == cols and has_rest and not given:  # what is left to 1 is rounding
            continue
        if k == 1 and not has_rest:  # one class has nothing to diverge in
            continue
        logits, ids, log_p = problem(cols, k)
        ones = torch.ones(2, ROWS, dtype=torch.float64)
        options = {"divergence": divergence, "beta": 0.3, "has_rest": has_rest}
        if k == cols:  # nothing is left to the rest, which is then no class
            exact = gradient(logits, ones, 0.0, ids, log_p, **{**options, "has_rest": False})
        else:
            exact = gradient(logits, ones, 0.0, ids, log_p, **options)
        agree(run(logits, ids, log_p if given else log_p[:, :k], **options), exact)
        assert same_bits(run(logits, ids, log_p if given else log_p[:, :k], wants=False, **options)[0],
                         run(logits, ids, log_p if given else log_p[:, :k], inplace=True, **options)[0])  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("cols", [300, 5003])
def test_everything_at_once(backend: str, divergence: str, temperature: float, cols: int) -> None:
    """A cap, label smoothing, weights, labels that are known, that are not, and that do not count; the same bits in place,
    and rounded once in 16 bits."""
    logits, ids, log_p = problem(cols, 7, temperature)
    logits = logits.clamp(-11.5, 11.5)
    unknown = next(c for c in range(cols) if c not in ids[1])
    labels = torch.tensor([int(ids[0, 2]), unknown, -100, cols - 1])
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    options = {"divergence": divergence, "temperature": temperature, "smoothing": 0.1, "has_rest": divergence != "js"}
    exact = gradient(logits, weights, 12.0, ids, log_p, labels, **options)
    given = log_p if options["has_rest"] else log_p[:, :-1]
    found = run(logits, ids, given, labels, weights, cap=12.0, **options)
    agree(found, exact, 1.5e-6)
    torch.testing.assert_close(found[1], exact[1], rtol=1e-6, atol=1e-7)
    if backend == "reference":
        return
    again = run(logits, ids, given, labels, weights, inplace=True, cap=12.0, **options)
    assert all(same_bits(a, b) for a, b in zip(found, again, strict=True))
    narrow = run(logits, ids, given, labels, weights, dtype=torch.bfloat16, cap=12.0, **options)
    assert same_bits(narrow[2], found[2].bfloat16())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_that_leaves_next_to_nothing_to_the_rest(backend: str, divergence: str) -> None:
    """Down to 1e-30, which only its logarithm holds; and nothing at all, which is infinite where the student gives some."""
    logits, ids, log_p = problem(2003, 8)
    for left in (1e-3, 1e-9, 1e-30):
        known = log_p[:, :-1].log_softmax(-1) + math.log1p(-left)
        given = torch.cat((known, torch.full((ROWS, 1), math.log(left), dtype=torch.float64)), 1)
        exact = gradient(logits, torch.ones(2, ROWS), 0.0, ids, given, divergence=divergence)
        agree(run(logits, ids, given, divergence=divergence), exact)
    nothing = torch.cat((log_p[:, :-1].log_softmax(-1), torch.full((ROWS, 1), -math.inf, dtype=torch.float64)), 1)
    value, _, grad = run(logits, ids, nothing, divergence=divergence)
    if divergence in ("reverse_kl", "symmetric_kl"):
        assert bool((value == math.inf).all())
        assert bool(grad.isnan().all())
    else:
        agree((value, value, grad), gradient(logits, torch.ones(2, ROWS), 0.0, ids, nothing, divergence=divergence))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_do_not_exist(backend: str, divergence: str) -> None:
    """-inf among the rest is no class; a known one that the student lacks makes a forward KL infinite."""
    logits, ids, log_p = problem(1201, 8)
    others = [next(c for c in range(1201) if c not in ids[row]) for row in range(ROWS)]
    logits[torch.arange(ROWS), others] = -math.inf
    exact = gradient(logits, torch.ones(2, ROWS), 0.0, ids, log_p, divergence=divergence)
    found = run(logits, ids, log_p, divergence=divergence)
    agree((found[0], found[1], found[2].nan_to_num(1.0)), (exact[0], exact[1], exact[2].nan_to_num(0.0)))
    logits[1, ids[1, 3]] = -math.inf
    value, _, grad = run(logits, ids, log_p, divergence=divergence)
    infinite = divergence in ("forward_kl", "symmetric_kl")
    assert bool(value[1].isinf()) == infinite
    assert bool(grad[1].isnan().all()) == infinite
    assert bool(value[[0, 2, 3]].isfinite().all())
    assert bool(grad[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_weight_and_rows_that_mean_nothing(backend: str, divergence: str) -> None:
    logits, ids, log_p = problem(1201, 8)
    labels, weights = torch.tensor([3, 2, 1, 0]), torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    whole = run(logits, ids, log_p, labels, weights, divergence=divergence)
    for poison in (math.nan, math.inf, -math.inf):
        bad = logits.clone()
        bad[1], bad[2] = poison, torch.nan if poison == -math.inf else poison
        weighed = weights.clone()
        weighed[:, 1] = 0
        value, ce, grad = run(bad, ids, log_p, labels, weighed, divergence=divergence)
        assert (value[1], ce[1]) == (0, 0)
        assert not grad[1].any()
        assert value.isnan().tolist() == ce.isnan().tolist() == [False, False, True, False]
        assert bool(grad[2].isnan().all())
        assert all(same_bits(a[[0, 3]], b[[0, 3]]) for a, b in zip((value, ce, grad), whole, strict=True))
    weights[0] = 0  # the divergence is told all the same, and only the cross-entropy has a gradient
    value, _, grad = run(logits, ids, log_p, labels, weights, divergence=divergence)
    assert same_bits(value, whole[0])
    exact = gradient(logits, weights, 0.0, ids, log_p, labels, divergence=divergence)
    agree((value, value, grad), exact)


def test_places_that_are_not_used_may_hold_any_id(backend: str) -> None:
    logits, ids, log_p = problem(1201, 8)
    fewer = run(logits, ids[:, :5], log_p[:, :5])
    ids[:, 5:], log_p[:, 5:8] = torch.tensor([-7, 10**12, 0]), -math.inf
    ids[0, 7] = ids[0, 0]
    found = run(logits, ids, log_p[:, :8])
    torch.testing.assert_close(found[0], fewer[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], fewer[2], rtol=1e-6, atol=1e-9)


def test_ids_and_labels_that_are_no_classes_show_in_the_values(backend: str) -> None:
    """`linear_top_k_distillation_loss` refuses them on the CPU; where looking would wait for a device nobody has."""
    logits, ids, log_p = problem(1201, 8)
    ids[1, 3], ids[2, 7], ids[3, 0] = 1201, -1, ids[3, 5]
    wrong = [False, True, True, True]
    value, _, grad = run(logits, ids, log_p)
    assert value.isnan().tolist() == grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == wrong
    labels, weights = torch.tensor([3, 2, -100, 0]), torch.ones(2, ROWS, dtype=torch.float64)
    weights[0] = 0
    value, ce, grad = run(logits, ids, log_p, labels, weights)
    assert value.isnan().tolist() == wrong
    assert ce.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, False, True]
    assert not grad[2].any()
    logits, ids, log_p = problem(1201, 8)
    value, ce, grad = run(logits, ids, log_p, torch.tensor([1201, -1, 0, 1]))
    assert ce.isnan().tolist() == [True, True, False, False]
    assert bool(value.isfinite().all())
    alone = run(logits, ids, log_p)[2]
    torch.testing.assert_close(grad[:2], alone[:2], rtol=1e-6, atol=1e-9)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("has_rest", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_a_teacher_who_knows_no_class_of_a_row(backend: str, has_rest: bool, given: bool) -> None:
    logits, ids, log_p = problem(301, 4)
    log_p = log_p[:, : 5 if given else 4].contiguous()
    log_p[1, :4] = -math.inf
    labels = torch.tensor([3, 2, 1, 0])
    value, ce, grad = run(logits, ids, log_p, labels, has_rest=has_rest)
    lost = [False, True, False, False]
    assert value.isnan().tolist() == grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == lost
    torch.testing.assert_close(ce, F.cross_entropy(logits.double(), labels, reduction="none"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_known_logit_that_is_nan(backend: str, divergence: str) -> None:
    """Of the only known class, so that nothing else is beside it; the label is another."""
    logits, ids, log_p = problem(301, 1)
    labels, weights = (ids[:, 0] + 1) % 301, torch.ones(2, ROWS, dtype=torch.float64)
    bad = logits.clone()
    bad[1, ids[1, 0]] = math.nan
    for of_divergence, has_rest, temperature in ((1, True, 1.0), (1, False, 1.0), (0, True, 1.0), (1, True, 0.7)):
        weights[0] = of_divergence
        options = {"divergence": divergence, "has_rest": has_rest, "temperature": temperature}
        found, whole = (run(z, ids, log_p, labels, weights, **options) for z in (bad, logits))
        assert all(bool(part[1].isnan().all()) for part in found)
        assert all(same_bits(a[[0, 2, 3]], b[[0, 2, 3]]) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "factor", "added"), [(0.3, 10, 0), (1.0, 1, 100), (1.0, 1, -100)])
def test_a_rest_that_is_dropped(backend: str, divergence: str, temperature: float, factor: float, added: float) -> None:
    """Far from 0 in units of the temperature; a label that does not count, and no labels at all."""
    logits, ids, log_p = problem(1031, 7, temperature)
    logits = factor * logits + added
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    options = {"divergence": divergence, "temperature": temperature, "has_rest": False}
    for labels in (torch.tensor([5, -100, int(ids[2, 0]), 7]), None):
        of = weights if labels is not None else weights * torch.tensor([[1.0], [0.0]])
        exact = gradient(logits, of, 0.0, ids, log_p, labels, **options)
        found = run(logits, ids, log_p[:, :-1], labels, of, **options)
        agree(found, exact, 1e-5 if backend == "reference" else 1e-6)  # the reference adds p and -1 in float32
        if labels is None:
            assert not found[2].scatter(1, ids, 0).any()
        for a, b in zip(found, run(logits, ids, log_p[:, :-1], labels, of, inplace=True, **options), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("divergence", ["forward_kl", "js"])
def test_logits_that_are_huge_or_all_the_same(backend: str, divergence: str) -> None:
    logits, ids, log_p = problem(5003, 8)
    for change in (lambda z: z + 1e4, lambda z: z * 0, lambda z: z.masked_fill(z < 0, torch.finfo(torch.float32).min)):
        changed = change(logits)
        exact = gradient(changed, torch.ones(2, ROWS), 0.0, ids, log_p, divergence=divergence)
        agree(run(changed, ids, log_p, divergence=divergence), exact)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize(("cols", "k"), [(9, 7), (300, 4)])
def test_few_known_classes_and_huge_logits(backend: str, temperature: float, cols: int, k: int) -> None:
    """The known classes are no likely ones, so that values are small; a divided logit of 1e4 would round them."""
    g = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(ROWS, cols, generator=g) + 1e4
    ids = torch.stack([torch.randperm(cols, generator=g)[:k] for _ in range(ROWS)])
    near = logits.double() - logits.double().amax(1, keepdim=True)  # exact
    log_p = ((near + 2 * torch.randn(ROWS, cols, generator=g)) / temperature).log_softmax(-1)
    rest = log_p.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat((log_p.gather(1, ids), rest), 1)
    labels, weights = torch.tensor([0, 1, 0, -100]), torch.ones(2, ROWS, dtype=torch.float64)
    exact = gradient(near, weights, 0.0, ids, log_p, labels, temperature=temperature)
    found = run(logits, ids, log_p, labels, weights, temperature=temperature)
    # The reference adds p and -1 in float32. Emulated exponentials are off by 2^-22, and so is a sum that one class makes.
    agree(found, exact, 1e-6 if backend == "cpu" else 1e-5)
    torch.testing.assert_close(found[1], exact[1], rtol=1e-6, atol=1e-6 if backend == "cuda" else 1e-13)
