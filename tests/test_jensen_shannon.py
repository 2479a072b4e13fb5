"""Jensen-Shannon divergence against its definition in extended precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpost

from .conftest import same_bits

Array = np.ndarray


def truth(a: Tensor, b: Tensor) -> tuple[Array, Array, Array]:
    """Values and gradients of KL(p|m)/2 + KL(q|m)/2, from p and q as they stand, in extended precision."""
    x, y = (t.detach().double().numpy().astype(np.longdouble) for t in (a, b))

    def softmax(z: Array) -> Array:
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = softmax(x), softmax(y)
    m = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (np.where(z > 0, z * np.log(z / m), 0) for z in (p, q))
    value = (first.sum(-1) + second.sum(-1)) / 2
    grads = [(f - z * f.sum(-1, keepdims=True)) / 2 for f, z in ((first, p), (second, q))]
    return value.astype(np.float64), grads[0].astype(np.float64), grads[1].astype(np.float64)


def pair(apart: float, shape: tuple[int, ...] = (6, 501), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    a = 3 * torch.randn(shape, generator=g)
    b = a + apart * torch.randn(shape, generator=g)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()


@pytest.mark.parametrize("apart", [20.0, 1.0, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("shape", [(6, 501), (3, 2), (1, 70_001)])
def test_values_and_gradients(apart: float, shape: tuple[int, ...]) -> None:
    a, b = pair(apart, shape)
    value, grad_a, grad_b = truth(a, b)
    ours = fastpost.js_divergence(a, b, reduction="none")
    # At 1e-3 and below it is the definition that loses digits, even in extended precision: 1e-19 / apart^2 of them are left.
    np.testing.assert_allclose(ours.detach(), value, rtol=1e-6)
    ours.sum().backward()
    for t, expected in ((a, grad_a), (b, grad_b)):
        assert np.linalg.norm(t.grad.double().numpy() - expected) <= 1e-6 * np.linalg.norm(expected)


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


def test_invariants() -> None:
    a, b = (t.detach() for t in pair(1.0))
    assert same_bits(fastpost.js_divergence(a, a.clone(), reduction="none"), torch.zeros(6))
    both = [fastpost.js_divergence(x, y, reduction="none") for x, y in ((a, b), (b, a), (a + 7, b - 3))]
    torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(both[0], both[2], rtol=1e-5, atol=0)
    far = fastpost.js_divergence(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))
    assert float(far) == pytest.approx(math.log(2), rel=1e-6)


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
