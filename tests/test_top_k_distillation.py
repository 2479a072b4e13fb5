"""Distillation from a teacher's most probable classes: against the equations in float64, and what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastpost
from fastpost.ops import distillation_walk, top_k_distillation

from .memory import cpu_peak_bytes

ROWS, WIDTH, VOCAB, K = (3, 60), 24, 401, 7
LEAST = 1_200_000  # bytes that make several chunks of it
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")


class Problem:
    """A student's head, a teacher's logits, and labels, a seventh of which do not count."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(7)
        self.tensors = [
            torch.randn(*shape, generator=g, dtype=torch.float64).div(by).to(dtype)
            for shape, by in (((*ROWS, WIDTH), 1), ((VOCAB, WIDTH), 3), ((VOCAB,), 1))
        ]
        self.teacher = 2 * torch.randn(*ROWS, VOCAB, generator=g, dtype=torch.float64)
        self.labels = torch.randint(0, VOCAB, ROWS, generator=g)
        self.labels[torch.rand(ROWS, generator=g) < 1 / 7] = -100

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t.to(dtype or t.dtype).clone().requires_grad_() for t in self.tensors]

    def known(self, temperature: float = 1.0, k: int = K) -> tuple[Tensor, Tensor]:
        log_probs, ids = (self.teacher / temperature).log_softmax(-1).topk(k, -1)
        return ids, log_probs


def loss_of(leaves: list[Tensor], ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
    hidden, weight, bias = leaves
    return fastpost.linear_top_k_distillation_loss(
        hidden, weight, ids, log_probs, labels, bias=bias, **{"memory_budget": LEAST, **options}
    )


def truth(
    leaves: list[Tensor], ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, *, rest: str = "one_class",
    divergence: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0, divergence_weight: float = 1.0,
    ce_weight: float = 0.0, mask: Tensor | None = None, reduction: str = "token", num_items: float | None = None,
    softcap: float | None = None, label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """From the equations, over k + 1 probabilities, by torch's autograd."""
    z = F.linear(*leaves)
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    p, q = log_probs.double().exp(), (z / temperature).softmax(-1).gather(-1, ids)
    q = torch.where(p > 0, q, 0)
    if rest == "one_class":
        p, q = (torch.cat((t, 1 - t.sum(-1, keepdim=True)), -1) for t in (p, q))
    else:
        p, q = (t / t.sum(-1, keepdim=True) for t in (p, q))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        used = a > 0
        return torch.where(used, a * (a.where(used, 1).log() - b.where(used, 1).log()), 0).sum(-1)

    m = beta * p + (1 - beta) * q
    rows = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "symmetric_kl": lambda: kl(p, q) + kl(q, p),
        "js": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[divergence]()
    counts = torch.ones(rows.shape, dtype=torch.bool) if labels is None else labels != -100
    counts = counts if mask is None else counts & mask
    ce = torch.zeros_like(rows)
    if ce_weight:
        assert labels is not None
        log_z = z.log_softmax(-1)
        ce = -(1 - label_smoothing) * log_z.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ce = ce - label_smoothing * log_z.mean(-1)
    rows, ce = (torch.where(counts, x, 0) for x in (rows, ce))
    if reduction == "none":
        return divergence_weight * rows + ce_weight * ce, ce, rows
    n = 1 if reduction == "sum" else counts.sum() if num_items is None else num_items
    rows, ce = rows.sum() / n, ce.sum() / n
    return divergence_weight * rows + ce_weight * ce, ce, rows


def agree(ours: list[Tensor], theirs: list[Tensor], rtol: float = 1e-9, atol: float = 1e-13) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad.double(), rtol=rtol, atol=atol)  # type: ignore[union-attr]


CASES: list[dict[str, Any]] = [
    {},
    {"rest": "dropped"},
    {"temperature": 2.0},
    {"ce_weight": 0.5, "divergence_weight": 0.3},
    {"ce_weight": 0.5, "rest": "dropped"},
    {"ce_weight": 0.5, "temperature": 2.0, "softcap": 3.0},
    {"ce_weight": 0.5, "divergence_weight": 0.0},
    {"ce_weight": 0.5, "temperature": 2.0, "softcap": 3.0, "label_smoothing": 0.1},
    {"reduction": "sum"},
    {"num_items": 11.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_are_those_of_the_equations(divergence: str, case: dict[str, Any]) -> None:
    problem = Problem()
    ids, log_probs = problem.known(case.get("temperature", 1.0))
    options = {"divergence": divergence, "beta": 0.3, **case}
    ours, theirs = problem.leaves(), problem.leaves()
    found, exact = (
        loss_of(ours, ids, log_probs, problem.labels, **options), truth(theirs, ids, log_probs, problem.labels, **options)
    )  # fmt: skip
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-14)
    assert not found.task_loss.requires_grad
    assert not found.divergence.requires_grad
    found.loss.backward()
    exact[0].backward()
    agree(ours, theirs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_with_the_whole_vocabulary_it_is_the_divergence_of_both_models(divergence: str) -> None:
    problem = Problem()
    ids, log_probs = problem.known(k=VOCAB)
    ours, theirs = problem.leaves(), problem.leaves()
    rest = "one_class" if divergence in ("forward_kl", "js", "total_variation") else "dropped"  # nothing is left to the rest
    found = loss_of(ours, ids, log_probs, problem.labels, divergence=divergence, rest=rest)
    whole = fastpost.distillation_loss(F.linear(*theirs), problem.teacher, problem.labels, divergence=divergence)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-10, atol=0)
    found.loss.backward()
    whole.loss.backward()
    agree(ours, theirs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_at_most_that_of_the_whole_vocabulary_and_grows_with_k(divergence: str) -> None:
    problem = Problem()
    found = [
        loss_of(problem.leaves(), *problem.known(k=k), divergence=divergence, reduction="none").divergence
        for k in (1, 5, 60, 399)
    ]
    whole = fastpost.distillation_loss(F.linear(*problem.tensors), problem.teacher, divergence=divergence, reduction="none")
    for fewer, more in zip(found, [*found[1:], whole.divergence], strict=True):
        assert bool((fewer <= more * (1 + 1e-12)).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_right_to_a_millionth(divergence: str) -> None:
    """Of logits that no product rounds: the head is the identity, so that the hidden states' gradient is theirs."""
    problem = Problem()
    ids, log_probs = problem.known()
    options = {"divergence": divergence, "ce_weight": 0.5}
    logits = F.linear(*problem.tensors).float()
    heads = [
        [logits.to(dtype), torch.eye(VOCAB, dtype=dtype), torch.zeros(VOCAB, dtype=dtype)]
        for dtype in (torch.float32, torch.float64)
    ]
    ours, theirs = ([t.requires_grad_() for t in head] for head in heads)
    exact = truth(theirs, ids, log_probs, problem.labels, **options)
    found = loss_of(ours, ids, log_probs, problem.labels, memory_budget=1 << 30, **options)
    torch.testing.assert_close(found.loss.double(), exact[0].detach(), rtol=1e-6, atol=0)
    found.loss.backward()
    exact[0].backward()
    off = (ours[0].grad.double() - theirs[0].grad).abs()  # type: ignore[union-attr]
    assert bool((off <= 1e-6 * theirs[0].grad.abs().amax(-1, keepdim=True)).all())  # type: ignore[union-attr]


def test_no_rows_have_no_loss() -> None:
    hidden, weight = torch.zeros(0, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    ids, log_probs, rest = fastpost.linear_top_log_probs(hidden, weight, K)
    for of_rest in (rest, None):
        out = fastpost.linear_top_k_distillation_loss(hidden, weight, ids, log_probs, teacher_rest=of_rest)
        out.loss.backward()
        assert out.loss.item() == 0


def test_identical_models_have_none() -> None:
    problem = Problem()
    log_probs, ids = F.linear(*problem.tensors).log_softmax(-1).topk(K, -1)
    for divergence in DIVERGENCES:
        leaves = problem.leaves()
        found = loss_of(leaves, ids, log_probs, divergence=divergence)
        assert 0 <= found.loss < 1e-14
        if divergence != "total_variation":  # whose slope is a sign
            found.loss.backward()
            assert float(leaves[0].grad.abs().max()) < 1e-15  # type: ignore[union-attr]


@pytest.mark.parametrize("rest", ["one_class", "dropped"])
def test_rows_of_fewer_classes(rest: str) -> None:
    """Places that are not used may hold any id, that of a class that is there too."""
    problem = Problem()
    ids, log_probs = problem.known()
    log_probs[0, :, 3:] = -math.inf
    ids[0, :, 3:] = -1
    ids[0, :, 4:] = 0
    log_probs[1, :, 0] = -math.inf
    ids[1, :, 0] = ids[1, :, 1]
    clean = ids.clone()
    clean[0, :, 3:], clean[1, :, 0] = problem.known()[0][0, :, 3:], problem.known()[0][1, :, 0]  # each once, for the truth
    ours, theirs = problem.leaves(), problem.leaves()
    found = loss_of(ours, ids, log_probs, problem.labels, rest=rest, ce_weight=0.2)
    exact = truth(theirs, clean, log_probs, problem.labels, rest=rest, ce_weight=0.2)
    torch.testing.assert_close(found.loss, exact[0].detach(), rtol=1e-10, atol=0)
    found.loss.backward()
    exact[0].backward()
    agree(ours, theirs)


@pytest.mark.parametrize("skips", [True, False])  # as on CPUs, and on GPUs
@pytest.mark.parametrize("divergence", ["js", "total_variation"])
def test_rows_that_do_not_count_may_hold_anything_and_each_row_has_its_loss(
    divergence: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_walk, "skips_rows", lambda device: skips)
    problem = Problem()
    ids, log_probs = problem.known()
    mask = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < 0.8
    dead, poisoned = ~mask | (problem.labels == -100), ids.clone()
    ours, theirs = problem.leaves(), problem.leaves()
    with torch.no_grad():
        ours[0][dead], log_probs[dead], poisoned[dead] = math.nan, math.nan, -100
    upstream = torch.rand(ROWS, dtype=torch.float64)
    options = {"mask": mask, "reduction": "none", "ce_weight": 0.5, "divergence": divergence}
    found = loss_of(ours, poisoned, log_probs, problem.labels, **options)
    exact = truth(theirs, ids, problem.known()[1], problem.labels, **options)
    torch.testing.assert_close(found.loss, exact[0].detach(), rtol=1e-10, atol=1e-14)
    found.loss.backward(upstream)
    exact[0].backward(upstream)
    agree(ours, theirs)
    nothing = loss_of(problem.leaves(), ids, log_probs, torch.full(ROWS, -100), ce_weight=1.0)
    assert nothing.loss.item() == 0


def test_probabilities_that_leave_nothing_to_the_rest_are_served_where_that_is_meant() -> None:
    problem = Problem()
    ids, log_probs = problem.known()
    normalised = log_probs.log_softmax(-1)
    sparse = torch.where(
        torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -torch.inf, normalised
    )
    sparse[..., 0] = normalised[..., 0]
    nothing = torch.full(ROWS, -torch.inf, dtype=torch.float64)
    few = torch.full(ROWS, -100)
    few.view(-1)[:7] = 1
    hot = torch.full_like(log_probs, -torch.inf).index_fill(-1, torch.tensor(0), 0)
    one_among_others = normalised.clone()
    one_among_others[0, 0] = log_probs[0, 0]
    for given, labels, options in (
        (normalised, None, {"rest": "dropped"}),
        (normalised, None, {"teacher_rest": nothing}),
        (normalised, few, {}),
        (hot, None, {}),
        (one_among_others, None, {}),
        (sparse, None, {}),
    ):
        want = {name: value for name, value in options.items() if name != "teacher_rest"}
        theirs = truth(problem.leaves(), ids, given, labels, **want)
        found = said_of(problem, [], ids, given, labels, **options)
        torch.testing.assert_close(found.loss, theirs[0], rtol=1e-9, atol=1e-12)
    every = torch.arange(VOCAB).expand(*ROWS, VOCAB)
    said_of(problem, [], every, problem.teacher.log_softmax(-1))


def said_of(problem: Problem, expected: list[str], *given: Any, **options: Any) -> Any:
    """The loss, where it says what is expected, the first time in this process."""
    top_k_distillation._warn_of_no_rest.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = loss_of(problem.leaves(), *given, **options)
    assert len(said) == len(expected)
    for one, text in zip(said, expected, strict=True):
        assert one.category is UserWarning
        assert text in str(one.message)
        assert one.filename == __file__  # that of the caller
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_known_classes_that_add_up_to_one_are_told_once(dtype: torch.dtype) -> None:
    problem = Problem()
    ids, log_probs = problem.known()
    normalised = log_probs.to(dtype).log_softmax(-1)
    for remedy in ("over the teacher's whole vocabulary, or take rest='dropped'", "give teacher_rest"):
        found = said_of(problem, [remedy], ids, normalised)
    exact = truth(problem.leaves(), ids, normalised)
    torch.testing.assert_close(found.loss, exact[0], rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(problem.leaves(), ids, normalised)  # in this process it has been said


def test_a_sharp_teacher_goes_on_from_batch_to_batch() -> None:
    """What is left to the other classes is below float32's rounding in all rows, though none is sure of one class."""
    top_k_distillation._warn_of_no_rest.cache_clear()
    g, vocab, told = torch.Generator().manual_seed(3), 4000, 0
    hidden, weight = torch.randn(16, 8, generator=g), torch.randn(vocab, 8, generator=g)
    for _ in range(4):
        full = (12 * torch.randn(16, vocab, generator=g)).log_softmax(-1)
        log_probs, ids = full.topk(1024, -1)
        assert bool((log_probs.double().logsumexp(-1).abs() < 2e-6).all())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = fastpost.linear_top_k_distillation_loss(hidden, weight, ids, log_probs)
        told += len(said)
        p, q = full.double().exp(), (hidden.double() @ weight.double().mT).log_softmax(-1)
        left = (1 - p.gather(1, ids).sum(1)).clamp(min=0)
        others = q.exp().scatter(1, ids, 0).sum(1).log()
        known = p.gather(1, ids) * (log_probs.double() - q.gather(1, ids))
        exact = (known.sum(1) + torch.xlogy(left, left) - left * others).mean()
        torch.testing.assert_close(found.loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert told == 1


def test_probabilities_that_rounding_brings_above_one_are_scaled() -> None:
    problem = Problem()
    problem.teacher[..., 0] += 30
    ids, log_probs = problem.known()
    log_probs[..., 0] = 0.0  # as 16 bits have it
    leaves = problem.leaves()
    found = loss_of(leaves, ids, log_probs)
    found.loss.backward()
    assert all(bool(t.grad.isfinite().all()) for t in leaves)  # type: ignore[union-attr]
    assert float(found.loss) >= 0


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_top_log_probs(softcap: float | None) -> None:
    problem = Problem()
    z = F.linear(*problem.tensors)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected, at = (z / 1.5).log_softmax(-1).topk(K, -1)
    hidden, weight, bias = problem.leaves()
    ids, log_probs, rest = fastpost.linear_top_log_probs(
        hidden, weight, K, bias=bias, softcap=softcap, temperature=1.5, memory_budget=LEAST
    )
    assert torch.equal(ids, at)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=0)
    others = (z / 1.5).log_softmax(-1).scatter(-1, at, -math.inf).logsumexp(-1)
    torch.testing.assert_close(rest, others, rtol=1e-12, atol=0)
    assert bool((fastpost.linear_top_log_probs(hidden, weight, VOCAB).rest == -math.inf).all())
    for k in (0, VOCAB + 1, True, 2.0):
        with pytest.raises(ValueError, match=f"k must be a whole number from 1 to the {VOCAB} classes"):
            fastpost.linear_top_log_probs(hidden, weight, k)  # type: ignore[arg-type]


def of_logarithms(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """The divergence of each row, from logarithms, which hold what is too small beside 1."""
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "symmetric_kl": forward + reverse,
        "js": ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2,
        "total_variation": (p - q).abs().sum(-1) / 2,
    }[divergence]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", [8, 199, 200])
def test_a_teacher_that_leaves_little_to_the_rest(divergence: str, k: int) -> None:
    """In float32 the known classes' probabilities add up to 1 in many of these rows, and the rest is rounding alone."""
    teacher, hidden, weight = 16 * torch.randn(64, 200), 2 * torch.randn(64, 200), torch.eye(200)  # logits as they are
    ids, log_probs, rest = fastpost.linear_top_log_probs(teacher, weight, k)
    assert log_probs.dtype == rest.dtype == torch.float32
    assert k == 200 or bool((log_probs.double().exp().sum(-1) >= 1).any())
    log_p = teacher.double().log_softmax(-1)
    known = log_p.gather(-1, ids)
    assert bool(((log_probs.double() - known).abs() <= 1.01 * known.abs() * 2**-24 + 1e-9).all())
    left = log_p.scatter(-1, ids, -math.inf).logsumexp(-1)
    torch.testing.assert_close(rest.double(), left, rtol=1e-6, atol=0)

    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    out = fastpost.linear_top_k_distillation_loss(ours, weight, ids, log_probs, teacher_rest=rest, divergence=divergence)
    q = theirs.log_softmax(-1)
    log_p = torch.cat((known, left[:, None]), -1)
    log_q = torch.cat((q.gather(-1, ids), q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)), -1)
    if k == 200:
        log_p, log_q = log_p[:, :-1], log_q[:, :-1]
    exact = of_logarithms(log_p, log_q, divergence).mean()
    torch.testing.assert_close(out.loss.double(), exact.detach(), rtol=1e-6, atol=0)
    out.loss.backward()
    exact.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert bool(((ours.grad.double() - theirs.grad).abs() <= 1e-6 * theirs.grad.abs().amax(-1, keepdim=True)).all())


def test_a_rest_that_does_not_fit_is_refused() -> None:
    hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCAB, WIDTH)
    ids, log_probs, rest = fastpost.linear_top_log_probs(hidden, weight, K)
    for error, message, options in (
        (ValueError, "add up to a probability other than 1", {"teacher_rest": rest.exp()}),
        (ValueError, "add up to a probability other than 1", {"teacher_rest": torch.full_like(rest, -30.0)}),
        (ValueError, "expected \\(4,\\)", {"teacher_rest": rest[:2]}),
        (TypeError, "must be a tensor of floating point", {"teacher_rest": 0.5}),
        (ValueError, "leave teacher_rest out", {"teacher_rest": rest, "rest": "dropped"}),
    ):
        with pytest.raises(error, match=message):
            fastpost.linear_top_k_distillation_loss(hidden, weight, ids, log_probs, **options)


def test_memory_is_the_budget_s() -> None:
    hidden, weight = torch.randn(4096, 16, requires_grad=True), torch.randn(4001, 16, requires_grad=True)
    ids, log_probs, _ = fastpost.linear_top_log_probs(hidden, weight, 8)

    def step() -> None:
        fastpost.linear_top_k_distillation_loss(hidden, weight, ids, log_probs, memory_budget=12_000_000).loss.backward()

    step()
    assert cpu_peak_bytes(step) < 16_000_000  # logits alone would take 65 MB
    assert cpu_peak_bytes(lambda: fastpost.linear_top_log_probs(hidden, weight, 8, memory_budget=12_000_000)) < 13_000_000


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    problem = Problem()
    hidden, weight, bias = problem.tensors
    frozen = fastpost.linear_top_k_distillation_loss(
        hidden.requires_grad_(), weight, *problem.known(), problem.labels, bias=bias
    )
    frozen.loss.backward()
    assert weight.grad is None
    with torch.no_grad():
        assert not loss_of(problem.leaves(), *problem.known()).loss.requires_grad


def test_what_an_infinite_divergence_is_told_to_do_helps() -> None:
    """A class that only the student rules out, and a rest that only the teacher does."""
    problem = Problem()
    ids, log_probs = problem.known()
    leaves = problem.leaves()
    ruled_out = [*leaves[:2], torch.zeros(VOCAB, dtype=leaves[0].dtype)]
    ruled_out[2][ids[0, 0, 0]] = -math.inf
    hot = torch.full_like(log_probs, -math.inf).index_fill(-1, torch.tensor(0), 0)
    given = {"hidden": ruled_out[0], "weight": ruled_out[1]}

    def value(log_probs: Tensor, bias: Tensor | None, divergence: str, **options: Any) -> float:
        out = fastpost.linear_top_k_distillation_loss(
            **given, teacher_ids=ids, teacher_log_probs=log_probs, bias=bias, divergence=divergence, **options
        )
        return float(out.loss.detach())

    with pytest.raises(ValueError, match=r"row 0 the student has no probability .* so forward_kl is infinite") as told:
        value(log_probs, ruled_out[2], "forward_kl")
    assert "forward_kl'" not in str(told.value)
    assert "rest" not in str(told.value)
    with pytest.raises(ValueError, match=r"row 0 one of the two has no probability .* so symmetric_kl is infinite"):
        value(log_probs, ruled_out[2], "symmetric_kl")
    nothing = torch.full(hot.shape[:-1], -math.inf, dtype=hot.dtype)
    for divergence in ("reverse_kl", "symmetric_kl"):
        with pytest.raises(ValueError, match=r"give teacher_rest .*, or take rest='dropped'"):
            value(hot, None, divergence)
        with pytest.raises(ValueError, match="leave teacher_rest out, and take rest='dropped'"):
            value(hot, None, divergence, teacher_rest=nothing)
        assert math.isfinite(value(hot, None, divergence, rest="dropped"))
    for remedy in ("js", "total_variation"):
        assert math.isfinite(value(log_probs, ruled_out[2], remedy))
        assert math.isfinite(value(hot, None, remedy))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rest": "ignored"}, ValueError, "unknown rest 'ignored'"),
    ({"divergence": "kl"}, ValueError, "unknown divergence 'kl'"),
    ({"ce_weight": 1.0, "labels": None}, ValueError, "needs labels"),
    ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0"),
    ({"ids": lambda t: t.float()}, TypeError, "teacher_ids must be integers, not torch.float32"),
    ({"log_probs": lambda t: t.long()}, TypeError, "teacher_log_probs must be floating point, not torch.int64"),
    ({"ids": lambda t: t[..., :3]}, ValueError, "they must agree"),
    ({"ids": lambda t: t[0]}, ValueError, "teacher_ids has shape"),
    ({"ids": lambda t: t + VOCAB}, ValueError, r"row 0 holds an id outside of \[0, 401\)"),
    ({"ids": lambda t: t * 0}, ValueError, "row 0 holds an id twice"),
    ({"log_probs": lambda t: t.exp()}, ValueError, "row 0 holds a log-probability above 0; pass logarithms"),
    ({"log_probs": lambda t: t * 0}, ValueError, "row 0 holds probabilities that add up to more than 1"),
    ({"log_probs": lambda t: t * math.nan}, ValueError, "row 0 holds a log-probability that is NaN"),
    ({"log_probs": lambda t: t - math.inf}, ValueError, "row 0 holds no class of the teacher"),
    (
        {
            "log_probs": lambda t: torch.full_like(t, -math.inf).index_fill(-1, torch.tensor(0), 0),
            "divergence": "reverse_kl",
        },
        ValueError,
        r"the teacher has no probability .* where the student has some, so reverse_kl is infinite; .* give teacher_rest",
    ),
    ({"memory_budget": 1000}, ValueError, "memory_budget of 1,000 bytes"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = Problem()
    problem.labels[0, 0] = 1  # so that row 0 counts
    options = dict(options)
    ids, log_probs = problem.known()
    ids, log_probs = options.pop("ids", lambda t: t)(ids), options.pop("log_probs", lambda t: t)(log_probs)
    with pytest.raises(error, match=message):
        loss_of(problem.leaves(), ids, log_probs, options.pop("labels", problem.labels), **options)
