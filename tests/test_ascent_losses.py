"""Ascent losses against their equations in float64, written over softmax, and their published limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpost.gap import losses

BATCH, TIME, VOCAB = 3, 7, 11


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(BATCH, TIME, VOCAB, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, TIME), generator=g)
    labels[0, 5:] = -100
    labels[2, :3] = -100
    return logits, labels


def log_likelihoods(logits: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """log p of each counted token, sequence by sequence, one at a time."""
    found = []
    for row, target in zip(logits.double(), labels, strict=True):
        tokens = []
        for t in range(TIME - 1):
            if target[t + 1] != -100:
                e = torch.exp(row[t] - row[t].max())
                tokens.append(torch.log(e[target[t + 1]] / e.sum()))
        found.append(tokens)
    return found


def sigmoid_log(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def ascent(logits: Tensor, labels: Tensor) -> Tensor:
    tokens = [t for row in log_likelihoods(logits, labels) for t in row]
    return sum(tokens) / len(tokens)


def weighted(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    tokens = [t for row in log_likelihoods(logits, labels) for t in row]
    return sum(torch.exp(t).detach() ** beta * t for t in tokens) / len(tokens)


def satimp(logits: Tensor, labels: Tensor, beta1: float, beta2: float) -> Tensor:
    tokens = [t for row in log_likelihoods(logits, labels) for t in row]
    weights = [torch.exp(t).detach() ** beta1 * (1 - torch.exp(t).detach()) ** beta2 for t in tokens]
    return sum(w * t for w, t in zip(weights, tokens, strict=True)) / len(tokens)


def undial(logits: Tensor, labels: Tensor, teacher: Tensor, strength: float) -> Tensor:
    values = []
    for row, target, said in zip(logits.double(), labels, teacher.double(), strict=True):
        for t in range(TIME - 1):
            if target[t + 1] != -100:
                lowered = said[t] - strength * torch.nn.functional.one_hot(target[t + 1], VOCAB)
                p = torch.exp(lowered) / torch.exp(lowered).sum()
                values.append(-(p * torch.log(torch.exp(row[t]) / torch.exp(row[t]).sum())).sum())
    return sum(values) / len(values)


def npo(logits: Tensor, labels: Tensor, reference: Tensor, beta: float) -> Tensor:
    rows = zip(log_likelihoods(logits, labels), reference, strict=True)
    values = [-2 / beta * sigmoid_log(-beta * (sum(row) + r)) for row, r in rows]
    return sum(values) / BATCH


def simnpo(logits: Tensor, labels: Tensor, beta: float, delta: float) -> Tensor:
    values = [-2 / beta * sigmoid_log(-beta / len(row) * sum(row) - delta) for row in log_likelihoods(logits, labels)]
    return sum(values) / BATCH


REFERENCE = torch.tensor([9.0, 14.0, 3.0], dtype=torch.float64)
TEACHER = 2 * torch.randn(BATCH + 2, TIME + 2, VOCAB, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
CASES: dict[str, tuple[Any, Any]] = {
    "ascent": (losses.ascent_loss, ascent),
    "weighted": (lambda z, y: losses.weighted_ascent_loss(z, y, beta=0.7), lambda z, y: weighted(z, y, 0.7)),
    "npo": (lambda z, y: losses.npo_loss(z, y, REFERENCE, beta=0.3), lambda z, y: npo(z, y, REFERENCE, 0.3)),
    "satimp": (lambda z, y: losses.satimp_loss(z, y, beta1=1.5, beta2=0.7), lambda z, y: satimp(z, y, 1.5, 0.7)),
    "undial": (
        lambda z, y: losses.undial_loss(z, y, TEACHER[: len(z), : z.shape[1]], strength=3.0),
        lambda z, y: undial(z, y, TEACHER[:BATCH, :TIME], 3.0),
    ),
    "simnpo": (lambda z, y: losses.simnpo_loss(z, y, beta=2.5, delta=0.4), lambda z, y: simnpo(z, y, 2.5, 0.4)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    ours, truth = CASES[name]
    logits, labels = problem(dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    got, want = ours(logits, labels), truth(exact, labels)
    assert got.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=tolerance)
    got.backward()
    want.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=100 * tolerance, atol=tolerance)


def test_grad_diff() -> None:
    (forget, y), (retain, z) = problem(1), problem(2)
    got = losses.grad_diff_loss(forget, y, retain, z, gamma=0.5, alpha=2.0)
    want = 0.5 * ascent(forget, y) - 2.0 * ascent(retain, z)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    got.backward()
    assert float(forget.grad.norm()) > 0
    assert float(retain.grad.norm()) > 0


def test_npo_tends_to_gradient_ascent_as_beta_falls() -> None:
    """Its gradient becomes that of -nll, summed over a sequence and averaged over sequences (2404.05868)."""
    logits, labels = problem()
    nll, _ = losses.sequence_nll(logits, labels)
    (ascending,) = torch.autograd.grad(-nll.mean(), logits)
    distances = []
    for beta in (1e-1, 1e-2, 1e-3):
        (gradient,) = torch.autograd.grad(losses.npo_loss(logits, labels, REFERENCE, beta=beta), logits)
        distances.append(float((gradient - ascending).norm() / ascending.norm()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.01


def test_npo_saturates_where_ascent_does_not() -> None:
    logits, labels = problem()
    nll, _ = losses.sequence_nll(logits, labels)
    far = nll.detach() - 400  # these sequences are e^400 times less likely than they were
    (saturated,) = torch.autograd.grad(losses.npo_loss(logits, labels, far, beta=0.1), logits)
    (ascending,) = torch.autograd.grad(losses.ascent_loss(logits, labels), logits)
    assert float(saturated.norm()) < 1e-12 * float(ascending.norm())


def test_weights_of_zero_power_are_plain_ascent() -> None:
    logits, labels = problem()
    a, b = losses.weighted_ascent_loss(logits, labels, beta=0.0), losses.ascent_loss(logits, labels)
    assert float(a.detach()) == float(b.detach())


def test_ascent_is_minus_the_models_own_loss() -> None:
    logits, labels = problem(dtype=torch.float32)
    own = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    assert float(losses.ascent_loss(logits, labels).detach()) == pytest.approx(-float(own.detach()), rel=1e-6)


def test_padding_changes_nothing() -> None:
    logits, labels = problem()
    longer = torch.cat((logits.detach(), torch.randn(BATCH, 2, VOCAB).double()), dim=1)
    padded = torch.cat((labels, torch.full((BATCH, 2), -100)), dim=1)
    for ours, _ in CASES.values():
        assert float(ours(longer, padded)) == pytest.approx(float(ours(logits, labels).detach()), rel=1e-12)


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_where_no_label_counts_the_loss_and_its_gradient_are_0(value: float) -> None:
    labels = torch.full((BATCH, TIME), -100)
    both = {"grad_diff": lambda z, y: losses.grad_diff_loss(z, y, z, y)}
    for ours in (both | {name: case[0] for name, case in CASES.items()}).values():
        logits = torch.full((BATCH, TIME, VOCAB), value, dtype=torch.float64, requires_grad=True)
        loss = ours(logits, labels)
        assert float(loss.detach()) == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert bool((gradient == 0).all())
    hidden, none = torch.full((2, 3, 4), value, requires_grad=True), torch.zeros(2, 3)
    loss = losses.rmu_loss(hidden, torch.ones(4), hidden, hidden.detach(), forget_mask=none, retain_mask=none)
    assert float(loss.detach()) == 0
    assert bool((torch.autograd.grad(loss, hidden)[0] == 0).all())


def test_satimp_without_its_second_factor_is_weighted_ascent() -> None:
    logits, labels = problem()
    a, b = losses.satimp_loss(logits, labels, beta1=0.7, beta2=0.0), losses.weighted_ascent_loss(logits, labels, beta=0.7)
    assert float(a.detach()) == float(b.detach())
    with torch.no_grad():
        logits[:, :, 0] = -math.inf
    labels[labels == 1] = 0
    for beta2 in (0.0, 1.0):
        loss = losses.satimp_loss(logits, labels, beta2=beta2)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert math.isfinite(float(loss.detach()))
        assert not gradient.isnan().any()


def test_undial_is_least_where_the_adjusted_teacher_is_met() -> None:
    logits, labels = problem()
    lowered = logits.detach().clone()
    for b in range(BATCH):
        for t in range(TIME - 1):
            if labels[b, t + 1] != -100:
                lowered[b, t, labels[b, t + 1]] -= 3.0
    lowered.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.undial_loss(lowered, labels, logits, strength=3.0), lowered)
    assert float(gradient.abs().max()) < 1e-15


def test_undial_takes_no_notice_of_classes_that_neither_model_has() -> None:
    logits, labels = problem()
    teacher = TEACHER[:BATCH, :TIME]
    padded, its_teacher = (torch.nn.functional.pad(z.detach(), (0, 2), value=-math.inf) for z in (logits, teacher))
    padded.requires_grad_()
    found, expected = losses.undial_loss(padded, labels, its_teacher), losses.undial_loss(logits, labels, teacher)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)
    (got,), (want,) = torch.autograd.grad(found, padded), torch.autograd.grad(expected, logits)
    assert torch.allclose(got[..., :-2], want, rtol=1e-12, atol=1e-16)
    assert not got[..., -2:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rmu(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    forget, retain, reference = (torch.randn(2, 4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    direction = losses.rmu_direction(5, 6.5, seed=2)
    assert float(direction.norm()) == pytest.approx(6.5, rel=1e-6)
    assert bool((direction >= 0).all())
    assert torch.equal(direction, losses.rmu_direction(5, 6.5, seed=2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    given = [t.to(dtype, copy=True).requires_grad_() for t in (forget, retain, reference)]
    got = losses.rmu_loss(given[0], direction, given[1], given[2], alpha=1.5, forget_mask=mask)
    tokens = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    first = sum((forget[b, t] - direction.double()).square().sum() for b, t in tokens) / 5 / 5
    second = sum((retain[b, t] - reference[b, t]).square().sum() for b in range(2) for t in range(4)) / 8 / 5
    assert float(got.detach()) == pytest.approx(float(first + 1.5 * second), rel=1e-12 if dtype == torch.float64 else 1e-6)
    got.backward()
    assert given[2].grad is None
    assert not given[0].grad[0, 2:].any()
    expected = 2 * (forget[1, 2] - direction.double()) / 25
    assert torch.allclose(given[0].grad[1, 2].double(), expected, rtol=1e-6)
    alone = losses.rmu_loss(given[0], direction, forget_mask=mask)
    assert float(alone.detach()) == pytest.approx(float(first), rel=1e-6)
    assert float(losses.rmu_loss(forget, direction, forget_mask=0 * mask)) == 0


def test_shift_is_the_callers_choice() -> None:
    logits, labels = problem()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    a, b = losses.ascent_loss(logits, labels), losses.ascent_loss(logits, shifted, shift=False)
    assert float(a.detach()) == pytest.approx(float(b.detach()), rel=1e-14)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, y: losses.npo_loss(z, y, REFERENCE[:2]), ValueError, "reference_nll has shape"),
        (lambda z, y: losses.npo_loss(z, y, REFERENCE, beta=0.0), ValueError, "beta must be finite and > 0"),
        (lambda z, y: losses.simnpo_loss(z, y, beta=-1.0), ValueError, "beta"),
        (lambda z, y: losses.weighted_ascent_loss(z, y, beta=math.nan), ValueError, "beta"),
        (lambda z, y: losses.grad_diff_loss(z, y, z, y, gamma=-1.0), ValueError, "gamma"),
        (lambda z, y: losses.satimp_loss(z, y, beta2=-1.0), ValueError, "beta2 must be finite and >= 0"),
        (lambda z, y: losses.undial_loss(z, y, z[:, 1:]), ValueError, "teacher_logits have shape"),
        (lambda z, y: losses.undial_loss(z, y, z, strength=0.0), ValueError, "strength must be finite and > 0"),
        (lambda z, y: losses.rmu_direction(5, 0.0), ValueError, "coefficient"),
        (lambda z, y: losses.rmu_direction(0), ValueError, "width must be >= 1"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(VOCAB), retain_mask=torch.ones(2, 2)), ValueError, "retain_mask is for"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(3)), ValueError, "direction has shape"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(VOCAB), z), ValueError, "come together"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(VOCAB), z, z[1:]), ValueError, "reference"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(VOCAB), forget_mask=torch.ones(2)), ValueError, "a mask has shape"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(VOCAB), z, z, alpha=-1.0), ValueError, "alpha"),
        (lambda z, y: losses.ascent_loss(z, y[:, 1:]), ValueError, "labels"),
        (lambda z, y: losses.ascent_loss(z, y + VOCAB), ValueError, "outside"),
        (lambda z, y: losses.ascent_loss(z, y.double()), TypeError, "integers"),
        (lambda z, y: losses.ascent_loss(z, y.tolist()), TypeError, "labels must be a tensor, not a list"),
        (lambda z, y: losses.npo_loss(z, y, [1.0, 2.0]), TypeError, "npo_loss: reference_nll must be a tensor, not a list"),
        (lambda z, y: losses.npo_loss(z, y, (1.0, 2)), TypeError, "npo_loss: reference_nll must be a tensor, not a float"),
        (lambda z, y: losses.npo_loss(z, y, ()), TypeError, "npo_loss: reference_nll must be a tensor, not a tuple"),
        (lambda z, y: losses.undial_loss(z, y, None), TypeError, "undial_loss: teacher_logits must be a tensor"),
        (lambda z, y: losses.rmu_loss(z, [1.0]), TypeError, "rmu_loss: direction must be a tensor, not a list"),
        (lambda z, y: losses.rmu_loss(z, torch.ones(VOCAB), z, 3), TypeError, "rmu_loss: reference must be a tensor"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*problem())


# -- what does not count, and limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_nan_where_no_label_counts_sends_back_nothing(name: str) -> None:
    ours, truth = CASES[name]
    logits, labels = problem()
    bad = logits.detach().clone()
    nowhere = torch.cat((labels[:, 1:] == -100, torch.ones(BATCH, 1, dtype=torch.bool)), -1)  # row t predicts label t + 1
    bad[nowhere] = torch.nan
    bad.requires_grad_()
    loss = ours(bad, labels)
    (expected,) = torch.autograd.grad(truth(logits, labels), logits)
    (got,) = torch.autograd.grad(loss, bad)
    torch.testing.assert_close(loss, truth(logits, labels))
    assert not got[nowhere].any()
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", CASES)
def test_sequences_without_a_label_are_not_there(name: str) -> None:
    ours = CASES[name][0]
    logits, labels = problem()
    extended = torch.cat((logits, torch.randn(1, TIME, VOCAB, dtype=torch.float64)))
    more = torch.cat((labels, torch.full((1, TIME), -100)))
    if name == "npo":
        reference = torch.cat((REFERENCE, torch.tensor([5.0], dtype=torch.float64)))
        found = losses.npo_loss(extended, more, reference, beta=0.3)
    else:
        found = ours(extended, more)
    torch.testing.assert_close(found, ours(logits, labels))
    none = ours(logits, torch.full_like(labels, -100))
    assert float(none) == 0
    assert not torch.autograd.grad(none, logits)[0].any()


def test_the_reference_is_what_sequence_nll_returns() -> None:
    logits, labels = problem()
    reference = losses.sequence_nll(logits.detach() * 0.5, labels)
    assert reference.tokens.tolist() == [4, 6, 4]
    found = losses.npo_loss(logits, labels, reference, beta=0.3)
    torch.testing.assert_close(found, npo(logits, labels, reference.nll, 0.3))
    torch.testing.assert_close(found, losses.npo_loss(logits, labels, reference.nll, beta=0.3))


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
def test_a_token_of_probability_0_gives_the_limit(beta: float) -> None:
    """p^beta log p tends to 0, and its gradient with the weight held is p^beta (p - one-hot), which tends to 0 as well."""
    logits, labels = problem()
    impossible = logits.detach().clone()
    impossible[1, 2, labels[1, 3]] = -torch.inf
    impossible.requires_grad_()
    loss = losses.weighted_ascent_loss(impossible, labels, beta=beta)
    far = logits.detach().clone()
    far[1, 2, labels[1, 3]] = -1e4 / beta
    torch.testing.assert_close(loss, losses.weighted_ascent_loss(far, labels, beta=beta))
    (gradient,) = torch.autograd.grad(loss, impossible)
    assert gradient.isfinite().all()
    assert not gradient[1, 2].any()
    assert float(losses.weighted_ascent_loss(impossible, labels, beta=0.0)) == -math.inf  # as -CE is
    broken = logits.detach().clone()
    broken[1, 2, 0] = torch.nan
    assert math.isnan(losses.weighted_ascent_loss(broken, labels, beta=beta))
