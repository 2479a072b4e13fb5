"""Jensen-Shannon divergence against its definition in extended precision."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import fastpost

from .conftest import DTYPES, same_bits

Array = np.ndarray


def truth(a: Tensor, b: Tensor) -> tuple[Array, Array, Array]:
    """Values and gradients of KL(p|m)/2 + KL(q|m)/2, from p and q as they stand.

    In extended precision, which leaves a value an error of 1e-20; in 40 digits for few classes, whose value may be 1e-15.
    """
    x, y = (t.detach().double().numpy() for t in (a, b))
    if x.shape[-1] < 12:
        exp, log = (np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.log))
        x, y = (np.frompyfunc(mpmath.mpf, 1, 1)(z) for z in (x, y))
    else:
        exp, log = np.exp, np.log
        x, y = (z.astype(np.longdouble) for z in (x, y))

    def softmax(z: Array) -> Array:
        e = exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    with mpmath.workdps(40), np.errstate(divide="ignore", invalid="ignore"):
        p, q = softmax(x), softmax(y)
        m = (p + q) / 2
        first, second = (np.where(z > 0, z * log(z / m), 0) for z in (p, q))
        value = (first.sum(-1) + second.sum(-1)) / 2
        grads = [(f - z * f.sum(-1, keepdims=True)) / 2 for f, z in ((first, p), (second, q))]
    return value.astype(np.float64), grads[0].astype(np.float64), grads[1].astype(np.float64)


def pair(apart: float, shape: tuple[int, ...] = (6, 501), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    a = 3 * torch.randn(shape, generator=g)
    b = a + apart * torch.randn(shape, generator=g)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


@pytest.fixture
def served(backend: str) -> str:
    """Every backend that has the operation: CUDA tensors go to Triton's."""
    if backend == "cuda":
        pytest.skip("the CUDA core has no Jensen-Shannon divergence")
    return backend


def test_oracle_is_right() -> None:
    """Against 60 digits, where it is weakest."""
    a, b = pair(1e-6, (1, 12))
    with mpmath.workdps(60):
        p, q = ([mpmath.exp(mpmath.mpf(float(v))) for v in t.detach()[0]] for t in (a, b))
        p, q = ([v / mpmath.fsum(z) for v in z] for z in (p, q))
        logs = [[mpmath.log(2 * w / (u + v)) for u, v, w in zip(p, q, z, strict=True)] for z in (p, q)]
        kls = [mpmath.fsum(w * y for w, y in zip(z, log, strict=True)) for z, log in zip((p, q), logs, strict=True)]
        grad = [w * (y - kls[0]) / 2 for w, y in zip(p, logs[0], strict=True)]
        value = (kls[0] + kls[1]) / 2
    found, found_grad, _ = truth(a, b)
    assert found[0] == pytest.approx(float(value), rel=3e-7)  # 1e-19 / apart^2
    np.testing.assert_allclose(found_grad[0], [float(g) for g in grad], rtol=1e-8, atol=1e-18)


@pytest.mark.usefixtures("served", "poisoned")
@pytest.mark.parametrize("apart", [20.0, 1.0, 0.1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("shape", [(6, 501), (3, 2), (5, 1), (2, 1023), (2, 1024), (1, 70_001)])
def test_values_and_gradients(apart: float, shape: tuple[int, ...]) -> None:
    a, b = pair(apart, shape)
    value, grad_a, grad_b = truth(a, b)
    ours = fastpost.js_divergence(a, b, reduction="none")
    # At 1e-3 and below it is the definition that loses digits, even in extended precision: 1e-19 / apart^2 of them are left.
    np.testing.assert_allclose(ours.detach(), value, rtol=1e-6)
    ours.sum().backward()
    for t, expected in ((a, grad_a), (b, grad_b)):
        assert np.linalg.norm(t.grad.double().numpy() - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("apart", [20.0, 1.0, 0.5, 0.3, 0.1])
def test_float64_keeps_its_digits(apart: float) -> None:
    a, b = pair(apart, (40, 5), torch.float64)
    values = fastpost.js_divergence(a, b, reduction="none").detach().numpy()
    np.testing.assert_allclose(values, truth(a, b)[0], rtol=1e-11)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("shift", [0.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_on_strided_rows(dtype: torch.dtype, shift: float) -> None:
    a, b = (t.detach() for t in pair(0.5, (7, 2050), dtype))
    wide = torch.full((7, 2080), torch.nan, dtype=dtype)
    wide[:, 3:2053] = a
    a, b = wide[:, 3:2053].detach().requires_grad_(), (b + shift).requires_grad_()
    value, *grads = truth(a, b)
    ours = fastpost.js_divergence(a, b, reduction="none")
    np.testing.assert_allclose(ours.detach(), value, rtol=1e-6)
    ours.sum().backward()
    half = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    for t, expected in zip((a, b), grads, strict=True):
        # Rounding to the dtype; float16 has no more than 2^-24 in steps.
        step = 2**-25 * math.sqrt(expected.size) if dtype == torch.float16 else 0
        assert np.linalg.norm(t.grad.double().numpy() - expected) <= (half + 1e-6) * np.linalg.norm(expected) + step


@pytest.mark.usefixtures("served")
def test_rows_that_mean_nothing_stay_by_themselves() -> None:
    a, b = (t.detach().clone() for t in pair(1.0, (6, 40)))
    whole = fastpost.js_divergence(a, b, reduction="none")
    a[1, 3], b[2, 4], a[3] = torch.nan, torch.inf, -torch.inf
    a.requires_grad_()
    value = fastpost.js_divergence(a, b, reduction="none")
    assert value.isnan().tolist() == [False, True, True, True, False, False]
    assert same_bits(value.detach()[[0, 4, 5]], whole[[0, 4, 5]])
    mask = torch.tensor([True, False, False, False, True, True])
    fastpost.js_divergence(a, b, mask=mask, reduction="mean").backward()
    assert not a.grad[~mask].any()
    assert bool(a.grad.isfinite().all())
    assert fastpost.js_divergence(torch.zeros(0, 5), torch.zeros(0, 5)) == 0


@pytest.mark.parametrize("apart", [1e-4, 1e-5, 1e-6])
def test_close_streams_keep_their_digits(apart: float) -> None:
    """There it is an eighth of the symmetric KL, up to the square of the difference."""
    a, b = (t.detach().double().requires_grad_() for t in pair(apart))
    ours, kl = fastpost.js_divergence(a, b, reduction="none"), fastpost.symmetric_kl(a, b, reduction="none")
    torch.testing.assert_close(ours, kl / 8, rtol=1e-6, atol=0)
    for function, factor in ((fastpost.js_divergence, 1.0), (fastpost.symmetric_kl, 1 / 8)):
        a.grad = None
        (factor * function(a, b, reduction="sum")).backward()
        if factor == 1:
            first = a.grad
    assert float((first - a.grad).norm() / a.grad.norm()) < 1e-6 + apart


@pytest.mark.usefixtures("served")
def test_invariants() -> None:
    a, b = (t.detach() for t in pair(1.0))
    assert same_bits(fastpost.js_divergence(a, a.clone(), reduction="none"), torch.zeros(6))
    both = [fastpost.js_divergence(x, y, reduction="none") for x, y in ((a, b), (b, a), (a + 7, b - 3))]
    torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(both[0], both[2], rtol=1e-5, atol=0)
    disjoint = [torch.full((3, 40), -torch.inf) for _ in range(2)]
    disjoint[0][:, :20], disjoint[1][:, 20:] = torch.randn(3, 20), torch.randn(3, 20)
    assert bool((fastpost.js_divergence(*disjoint, reduction="none").double() <= math.log(2) * (1 + 2**-24)).all())
    far = fastpost.js_divergence(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
    assert float(far) == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.usefixtures("served")
def test_classes_that_do_not_exist() -> None:
    a, b = (t.detach().clone() for t in pair(1.0, (4, 30)))
    a[:, 3] = b[:, 3] = -torch.inf
    alive = torch.arange(30) != 3
    torch.testing.assert_close(
        fastpost.js_divergence(a, b), fastpost.js_divergence(a[:, alive], b[:, alive]), rtol=1e-6, atol=0
    )
    a[:, 5] = -torch.inf  # in one stream only: finite, at most ln 2
    a, b = a.requires_grad_(), b.requires_grad_()
    value = fastpost.js_divergence(a, b, reduction="none")
    np.testing.assert_allclose(value.detach(), truth(a, b)[0], rtol=1e-6)
    value.sum().backward()
    for t, expected in zip((a, b), truth(a, b)[1:], strict=True):
        np.testing.assert_allclose(t.grad, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions(reduction: str, masked: bool) -> None:
    a, b = pair(1.0, (4, 5, 33))
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    rows = torch.from_numpy(truth(a, b)[0]) * (1 if mask is None else mask)
    count = 20 if mask is None else int(mask.sum())
    expected = rows if reduction == "none" else rows.sum() / {"sum": 1, "mean": count, "batchmean": 4}[reduction]
    found = fastpost.js_divergence(a, b, mask=mask, reduction=reduction)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)
    found.sum().backward()
    if mask is not None:
        assert not a.grad[~mask].any()
    assert a.grad[mask if mask is not None else slice(None)].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    a, b = pair(1.0, dtype=dtype)
    value = fastpost.js_divergence(a, b, reduction="none")
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(value.detach(), truth(a, b)[0], rtol=1e-6)
    value.sum().backward()
    assert a.grad.dtype == dtype


def test_gradcheck_and_a_second_backward_pass() -> None:
    a, b = pair(0.5, (2, 7), torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: fastpost.js_divergence(x, y, reduction="none"), (a, b))
    loss = fastpost.js_divergence(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (a, b), retain_graph=True) for _ in range(2)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), ValueError),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double()), ValueError),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 3).long()), TypeError),
    ],
)
def test_bad_input(arguments: tuple[Tensor, Tensor], error: type[Exception]) -> None:
    with pytest.raises(error, match="js_divergence"):
        fastpost.js_divergence(*arguments)
