"""Symmetric KL and R3F's loss: the equations, and what holds whatever the numbers; long, as GPU tests collect it whole."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpost
from fastpost.backends import native
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from tests import oracles
from tests.conftest import DTYPES, same_bits

ROOT = Path(__file__).parent.parent
ROWS = {2: 300, 33: 200, 1024: 20, 4096: 20, 50257: 2, 128256: 1}
DIFFERENCES = (3.0, 0.3, 0.1, 1e-3, 1e-5, 1e-6)


def streams(rows: int, cols: int, difference: float, sigma: float = 3.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    a = sigma * torch.randn(rows, cols)
    return a, a + shift + difference * torch.randn(rows, cols)


def gradients(f: Callable[..., Tensor], *inputs: Tensor, **options: object) -> tuple[Tensor, list[Tensor | None]]:
    """The value, and gradients with respect to the first two inputs."""
    a, b = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs[:2])
    value = f(a, b, *inputs[2:], **options)
    return value.detach(), list(torch.autograd.grad(value, (a, b)))


def relative_l2(got: Tensor, expected: np.ndarray) -> float:
    """The worst row's distance over its length."""
    g = got.double().numpy()
    length = np.sqrt((expected**2).sum(-1))
    distance = np.sqrt(((g - expected) ** 2).sum(-1))
    return float(np.max(np.where(length > 0, distance / np.where(length > 0, length, 1), distance)))


# -- accuracy -------------------------------------------------------------------------------------------------------------


def test_oracle_is_right() -> None:
    """The extended-precision oracle against 60 digits, where it is weakest."""
    a, b = streams(1, 12, 1e-6)
    with mpmath.workdps(60):
        x, y = ([mpmath.mpf(float(v)) for v in t[0]] for t in (a, b))

        def softmax(z: list[mpmath.mpf]) -> list[mpmath.mpf]:
            e = [mpmath.exp(v) for v in z]
            return [v / mpmath.fsum(e) for v in e]

        p, q = softmax(x), softmax(y)
        r = [mpmath.log(u / v) for u, v in zip(p, q, strict=True)]
        kl = mpmath.fsum(u * w for u, w in zip(p, r, strict=True))
        j = kl - mpmath.fsum(v * w for v, w in zip(q, r, strict=True))
        grad = [u * (w - kl) + u - v for u, v, w in zip(p, q, r, strict=True)]
    value, grad_a, _ = oracles.divergence(a, b)
    assert value[0] == pytest.approx(float(j), rel=1e-9)
    np.testing.assert_allclose(grad_a[0], [float(g) for g in grad], rtol=1e-8, atol=1e-18)


def worst_errors(
    shift: float = 0.0, sigma: float = 3.0, sizes: Sequence[int] = ()
) -> dict[tuple[int, float], tuple[float, float, float]]:
    """Of every size and difference of the table: relative error of the value and of both gradients, worst row."""
    torch.manual_seed(0)
    found = {}
    for cols in sizes or ROWS:
        for difference in DIFFERENCES:
            a, b = streams(ROWS[cols], cols, difference, sigma, shift)
            _, (grad_a, grad_b) = gradients(symmetric_kl, a, b, reduction="sum")
            value = symmetric_kl(a, b, reduction="none")
            expected, expected_a, expected_b = oracles.divergence(a, b)
            assert bool((value >= 0).all())
            error = float(np.max(np.abs(value.double().numpy() - expected) / np.where(expected > 0, expected, 1)))
            found[cols, difference] = (error, relative_l2(grad_a, expected_a), relative_l2(grad_b, expected_b))
    return found


ISAS = native.core().cpu.isas().split() if native.failure() is None else []


@pytest.mark.parametrize("isa", ISAS)
def test_accuracy(isa: str) -> None:
    """Values and gradients to 1e-6, as the contract's table says, for every instruction set; confident rows as well."""
    script = (
        "from tests.test_divergence import worst_errors\n"
        "for asked in ((), (100.0,), (0.0, 8.0, (1024, 4096))):\n"
        "    for where, errors in worst_errors(*asked).items():\n"
        "        if not all(error <= 1e-6 for error in errors): print(asked, where, errors)\n"
        "from fastpost.backends import native; print('used', native.core().cpu.isa())\n"
    )
    environment = {**os.environ, "FASTPOST_CPU_ISA": isa, "FASTPOST_BACKEND": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"used {isa}", done.stdout


@pytest.mark.parametrize("cols", [2, 33, 1500])
@pytest.mark.parametrize("difference", [3.0, 1e-3, 1e-6])
def test_value_and_gradients(backend: str, cols: int, difference: float) -> None:
    a, b = streams(7, cols, difference)
    expected, expected_a, expected_b = oracles.divergence(a, b)
    np.testing.assert_allclose(symmetric_kl(a, b, reduction="none").double().numpy(), expected, rtol=1e-6)
    _, (grad_a, grad_b) = gradients(symmetric_kl, a, b, reduction="sum")
    assert grad_a is not None
    assert grad_b is not None
    assert relative_l2(grad_a, expected_a) <= 1e-6
    assert relative_l2(grad_b, expected_b) <= 1e-6


def outlier(a: Tensor) -> Tensor:
    """Streams that are all but equal, apart from one class."""
    b = a + 1e-4 * torch.randn_like(a)
    b[:, 7] = a[:, 7] + 5
    return b


def off_centre(a: Tensor) -> Tensor:
    """All classes but the largest, which weighs little, have moved by nearly the same."""
    a.mul_(0.01)
    b = a + 0.9 + 1e-4 * torch.randn_like(a)
    top = a.argmax(-1, keepdim=True)
    a.scatter_(-1, top, 1.0)
    return b.scatter(-1, top, a.gather(-1, top))


def all_but_one(a: Tensor) -> Tensor:
    """As above, and the largest class of one stream is not that of the other."""
    a.mul_(0.01)
    b = a + 0.26
    top = a.argmax(-1, keepdim=True)
    return b.scatter(-1, top, a.gather(-1, top))


def two_camps(a: Tensor) -> Tensor:
    """The largest class has not moved, the rest by 0.9 to one side or, a few, to the other: |delta| <= 1, |r| up to 1.8."""
    b = a - 0.9
    b[:, ::50] += 1.8
    top = a.argmax(-1, keepdim=True)
    return b.scatter(-1, top, a.gather(-1, top))


@pytest.mark.parametrize("move", [outlier, off_centre, all_but_one, two_camps])
@pytest.mark.parametrize("r3f_lambda", [1.0, 1e-40, 1e8])
def test_rows_that_ask_for_care(backend: str, move: Callable[[Tensor], Tensor], r3f_lambda: float) -> None:
    """Rows whose sums tell little of J, and weights whose quotient would take digits from the gradients."""
    a = torch.randn(6, 4099)
    b, labels = move(a), torch.randint(0, 4099, (6,))
    expected, grad_a, grad_b = oracles.divergence(a, b)
    np.testing.assert_allclose(symmetric_kl(a, b, reduction="none").double().numpy(), expected, rtol=1e-6)
    p = a.double().softmax(-1).numpy()
    classified = p - np.eye(4099)[labels.numpy()]
    _, found = gradients(lambda x, y: r3f_loss(x, y, labels, r3f_lambda=r3f_lambda, reduction="sum").loss, a, b)
    for got, want in zip(found, (classified + r3f_lambda * grad_a, r3f_lambda * grad_b), strict=True):
        assert got is not None
        if np.abs(want).max() > torch.finfo(torch.float32).tiny:
            # Triton's rows keep their centre, and differences about it are rounded by 3e-8.
            assert relative_l2(got, want) <= (2e-6 if backend == "triton" else 1e-6)


def test_float64_is_exact() -> None:
    a, b = (t.double() for t in streams(5, 40, 0.5))
    value, (grad_a, _) = gradients(symmetric_kl, a, b, reduction="sum")
    expected, expected_a, _ = oracles.divergence(a, b)
    assert value.dtype == torch.float64
    assert float(value) == pytest.approx(expected.sum(), rel=1e-13)
    assert grad_a is not None
    assert relative_l2(grad_a, expected_a) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("cols", [33, 1500])
def test_half_precision_rounds_once(backend: str, dtype: torch.dtype, cols: int) -> None:
    """Values as exact as the stored logits allow; each gradient element is the exact one, rounded to the dtype."""
    a, b = (t.to(dtype) for t in streams(6, cols, 0.3))
    expected, expected_a, expected_b = oracles.divergence(a, b)
    values = symmetric_kl(a, b, reduction="none")
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.double().numpy(), expected, rtol=1e-6)
    _, grads = gradients(symmetric_kl, a, b, reduction="sum")
    half_ulp = torch.finfo(dtype).eps / 2
    for got, want in zip(grads, (expected_a, expected_b), strict=True):
        assert got is not None
        assert got.dtype == dtype
        # p (r - KL) + (p - q) may nearly cancel in one element; then float32's rounding of the parts shows.
        allowed = half_ulp * 1.01 * np.abs(want) + 1e-6 * np.abs(want).max() + torch.finfo(dtype).smallest_normal * half_ulp
        assert np.all(np.abs(got.double().numpy() - want) <= allowed)


@pytest.mark.parametrize("cols", [5, 3000])
def test_identical_rows_are_exactly_zero(backend: str, cols: int) -> None:
    a, _ = streams(4, cols, 0)
    value, grads = gradients(symmetric_kl, a, a, reduction="sum")
    assert value.item() == 0
    for g in grads:
        assert g is not None
        assert not g.any()


@pytest.mark.parametrize("cols", [5, 3000])
def test_a_constant_between_the_streams_changes_nothing(backend: str, cols: int) -> None:
    """Logits on a grid, so that adding the constant is exact; then the value must be the same to its last digits."""
    a, b = ((t * 1024).round() / 1024 for t in streams(6, cols, 0.01))
    plain, grads = gradients(symmetric_kl, a, b, reduction="sum")
    for constant in (0.5, -37.0, 1000.0):
        shifted, shifted_grads = gradients(symmetric_kl, a, b + constant, reduction="sum")
        assert float(shifted) == pytest.approx(float(plain), rel=1e-6)
        for g, s in zip(grads, shifted_grads, strict=True):
            assert g is not None
            assert s is not None
            assert float((g - s).norm() / g.norm()) < 1e-6
    assert float(symmetric_kl(a, a + 1000.0)) < 1e-25  # on this grid the sum is exact: nothing but the constant differs


@pytest.mark.parametrize("cols", [40, 2000])
def test_huge_logits_stay_finite(backend: str, cols: int) -> None:
    a, b = streams(4, cols, 30.0, sigma=300)
    expected, *expected_grads = oracles.divergence(a, b)
    value, grads = gradients(symmetric_kl, a, b, reduction="sum")
    assert float(value) == pytest.approx(expected.sum(), rel=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got is not None
        # A logit of 1,000 is itself known to 3e-5 only; probabilities below float32's range are 0.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max() + 1e-30)


@pytest.mark.parametrize("level", [-2.2e6, -3.5e6, -1e9, 3.5e6])
def test_streams_on_levels_far_apart(backend: str, level: float) -> None:
    """One of them so far below or above the other that no centre of their differences serves."""
    clean, noised = streams(4, 2000, 0.1)
    clean += level
    expected, *expected_grads = oracles.divergence(clean, noised)
    value, grads = gradients(symmetric_kl, clean, noised, reduction="sum")
    assert float(value) == pytest.approx(expected.sum(), rel=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        assert got is not None
        assert relative_l2(got, want) < 1e-5


@pytest.mark.parametrize("cols", [6, 2000])
def test_minus_infinity(backend: str, cols: int) -> None:
    a, b = streams(3, cols, 0.3)
    a[:, 1::5] = b[:, 1::5] = -math.inf
    expected, expected_a, expected_b = oracles.divergence(a, b)
    np.testing.assert_allclose(symmetric_kl(a, b, reduction="none").double().numpy(), expected, rtol=1e-6)
    _, grads = gradients(symmetric_kl, a, b, reduction="sum")
    for got, want in zip(grads, (expected_a, expected_b), strict=True):
        assert got is not None
        assert relative_l2(got, want) < 1e-6
        assert not got[:, 1::5].any()

    b[1, 3] = -math.inf  # in one stream only: that row alone is infinite
    values = symmetric_kl(a, b, reduction="none")
    assert values.isinf().tolist() == [False, True, False]
    _, grads = gradients(symmetric_kl, a, b, reduction="sum")
    for got in grads:
        assert got is not None
        assert bool(got[1].isnan().all())
        assert bool(got[[0, 2]].isfinite().all())
    mask = torch.tensor([True, False, True])  # a row that does not count may hold anything
    value, grads = gradients(symmetric_kl, a, b, mask=mask, reduction="sum")
    assert bool(value.isfinite())
    assert all(g is not None and bool(g.isfinite().all()) and not g[1].any() for g in grads)


@pytest.mark.parametrize("cols", [6, 2000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_nan_and_infinity_propagate(backend: str, cols: int, bad: float, both: bool) -> None:
    a, b = streams(3, cols, 0.3)
    a[1, 4] = bad
    if both:
        b[1, 4] = bad
    values = symmetric_kl(a, b, reduction="none")
    assert values.isnan().tolist() == [False, True, False]
    _, grads = gradients(symmetric_kl, a, b, reduction="sum")
    for g in grads:
        assert g is not None
        assert bool(g[1].isnan().all())
        assert not bool(g[[0, 2]].isnan().any())


# -- properties -----------------------------------------------------------------------------------------------------------

logits = st.integers(1, 40).flatmap(
    lambda cols: st.tuples(
        *(st.lists(st.floats(-30, 30, width=32), min_size=cols, max_size=cols) for _ in range(2)),
    )
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=logits, wide=st.booleans(), scale=st.sampled_from([1.0, 1e-3, 1e-6]))
def test_never_negative_and_symmetric(rows: tuple[list[float], list[float]], wide: bool, scale: float) -> None:
    a = torch.tensor([rows[0]])
    b = a + scale * torch.tensor([rows[1]])
    if wide:  # the same numbers in a row wide enough for float32 sums
        a, b = (torch.cat([t, torch.full((1, 1500), -60.0)], dim=-1) for t in (a, b))
    value, (grad_a, grad_b) = gradients(symmetric_kl, a, b)
    swapped, (swapped_b, swapped_a) = gradients(symmetric_kl, b, a)
    expected, _, _ = oracles.divergence(a, b)
    # An exponent far below the maximum is rounded to float32 like anything else, and exp makes that a relative error.
    exponent = 2.0**-24 * max(float(t.max() - t.min()) for t in (a, b))
    allowed = 2e-6 + exponent
    assert float(value) >= 0
    assert float(value) == pytest.approx(float(expected[0]), rel=allowed, abs=1e-30)
    assert float(value) == pytest.approx(float(swapped), rel=allowed, abs=1e-30)
    for g, s in ((grad_a, swapped_a), (grad_b, swapped_b)):
        assert g is not None
        assert s is not None
        assert float((g - s).norm()) <= 2 * allowed * float(g.norm()) + 1e-30


@pytest.mark.parametrize("cols", [50, 5000])
def test_scales_as_the_square_of_the_noise(cols: int) -> None:
    """J(a, a + eps z) / eps^2 tends to a constant (papers.md 2f); all sums exact on a grid."""
    a = (torch.randn(4, cols) * 3 * 32).round() / 32
    z = (torch.randn(4, cols) * 8).round() / 8
    scaled = [float(symmetric_kl(a, a + 2.0**-k * z)) * 4.0**k for k in (6, 10, 14)]
    assert scaled[0] == pytest.approx(scaled[1], rel=0.05)
    assert scaled[1] == pytest.approx(scaled[2], rel=1e-3)


@pytest.mark.parametrize("cols", [40, 3000])
def test_same_bits_for_any_number_of_threads(cols: int) -> None:
    a, b = streams(37, cols, 0.1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value, grads = gradients(symmetric_kl, a, b)
            found.append((value, *grads))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(same_bits(x, y) for x, y in zip(found[0], other, strict=True))


# -- reductions, masks, layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions(backend: str, reduction: str, masked: bool) -> None:
    a, b = (t.reshape(3, 4, 20) for t in streams(12, 20, 0.5))
    mask = torch.rand(3, 4) < 0.6 if masked else None
    expected, expected_a, expected_b = (
        x.reshape(3, 4, -1) for x in oracles.divergence(a.reshape(12, 20), b.reshape(12, 20))
    )
    expected = expected.squeeze(-1)
    counted = mask.numpy() if mask is not None else np.ones((3, 4), dtype=bool)
    upstream = torch.randn(3, 4) if reduction == "none" else torch.tensor(2.5)
    scale = {"none": 1.0, "sum": 1.0, "mean": 1.0 / counted.sum(), "batchmean": 1.0 / 3}[reduction]

    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = symmetric_kl(x, y, mask=mask, reduction=reduction)
    rows = np.where(counted, expected, 0)
    np.testing.assert_allclose(value.detach().numpy(), rows if reduction == "none" else rows.sum() * scale, rtol=1e-6)
    value.backward(upstream)
    weight = (counted * scale * upstream.numpy())[..., None]
    np.testing.assert_allclose(x.grad, expected_a * weight, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(y.grad, expected_b * weight, rtol=1e-5, atol=1e-8)


def test_nothing_counts(backend: str) -> None:
    a, b = streams(4, 9, 0.5)
    for reduction in ("sum", "mean", "batchmean"):
        value, grads = gradients(symmetric_kl, a, b, mask=torch.zeros(4, dtype=torch.bool), reduction=reduction)
        assert value.item() == 0
        assert all(g is not None and not g.any() for g in grads)
    for reduction in ("none", "sum", "mean", "batchmean"):
        value = symmetric_kl(a[:0], b[:0], reduction=reduction)
        assert value.shape == ((0,) if reduction == "none" else ())
        assert float(value.sum()) == 0
    assert symmetric_kl(a[0], b[0], reduction="none").shape == ()  # one row needs no leading dimension


@pytest.mark.parametrize("cols", [17, 1300])
def test_layouts(backend: str, cols: int, poisoned: None) -> None:
    """Row-strided views, transposes and expanded rows give what contiguous copies give.

    The same bits, but for wide rows on CUDA: there a thread's columns begin at a 16-byte boundary, so the order of additions
    follows from where in memory a row starts.
    """
    wide = torch.randn(2, 6, cols + 5)
    across = torch.randn(cols, 6)
    cases = [
        (wide[0, :, 2 : cols + 2], wide[1, :, 2 : cols + 2]),
        (wide[0, ::2, :cols], wide[1, 1::2, :cols]),
        (across.t(), torch.randn(6, cols)),
        (torch.randn(1, cols).expand(6, cols), torch.randn(6, cols)),
    ]
    for a, b in cases:
        expected = gradients(symmetric_kl, a.contiguous(), b.contiguous())
        x, y = a.detach().requires_grad_(), b.detach().requires_grad_()
        value = symmetric_kl(x, y)
        got = torch.autograd.grad(value, (x, y))
        for mine, wanted in zip((value, *got), (expected[0], *expected[1]), strict=True):
            assert wanted is not None
            if backend == "cuda" and cols > 1024:
                assert float((mine - wanted).detach().double().norm()) <= 3e-7 * float(wanted.detach().double().norm())
            else:
                assert same_bits(mine, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("cols", "stride", "offset"),
    [(2, 2, 0), (2, 5, 1), (7, 7, 0), (7, 11, 3), (50257, 50257, 0), (50257, 50264, 0), (50257, 50259, 1)],
)
def test_awkward_rows(backend: str, dtype: torch.dtype, cols: int, stride: int, offset: int) -> None:
    """Rows that start anywhere, with classes that are -inf in both streams; between the rows nothing is written."""
    rows = 3 if cols > 1000 else 5
    place = ((rows, cols), (stride, 1), offset)
    made = torch.randn(2, offset + rows * stride)
    made[1] = made[0] + 0.2 * made[1]
    buffers = [row.to(dtype).clone() for row in made]
    sources = [buffer.as_strided(*place) for buffer in buffers]
    if cols > 2:
        for source in sources:
            source[1, 1::3] = -math.inf
    expected, *expected_grads = oracles.divergence(*sources)
    np.testing.assert_allclose(symmetric_kl(*sources, reduction="none").double().numpy(), expected, rtol=1e-6)

    leaves = [buffer.clone().requires_grad_() for buffer in buffers]
    owned = [t * 1 for t in leaves]
    value = symmetric_kl(*(t.as_strided(*place) for t in owned), reduction="sum", inplace=True)
    torch.autograd.grad(value, leaves)
    half_ulp = torch.finfo(dtype).eps / 2
    for got, before, want in zip(owned, buffers, expected_grads, strict=True):
        written = got.detach().as_strided(*place)
        if dtype == torch.float32:
            assert relative_l2(written, want) <= 1e-6
        else:  # each the exact one, rounded once
            top = np.abs(want).max(-1, keepdims=True)
            allowed = half_ulp * 1.01 * np.abs(want) + 1e-6 * top + torch.finfo(dtype).smallest_normal * half_ulp
            assert np.all(np.abs(written.double().numpy() - want) <= allowed)
        between = torch.ones(before.shape, dtype=torch.bool)
        between.as_strided(*place)[:] = False
        assert same_bits(got.detach()[between], before[between])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [2, 7, 50257])
def test_no_rows(backend: str, dtype: torch.dtype, cols: int) -> None:
    a, b = torch.empty(0, cols, dtype=dtype), torch.empty(0, cols, dtype=dtype)
    for reduction in ("sum", "mean", "batchmean"):
        value, grads = gradients(symmetric_kl, a, b, reduction=reduction)
        assert value.item() == 0
        assert [g.shape for g in grads if g is not None] == [(0, cols)] * 2
    assert symmetric_kl(a, b, reduction="none").shape == (0,)
    out = r3f_loss(a, b, torch.empty(0, dtype=torch.long))
    assert [float(v) for v in out] == [0, 0, 0]


def test_fresh_gradients_are_written_everywhere(backend: str, poisoned: None) -> None:
    a, b = streams(5, 1201, 0.5)
    mask = torch.tensor([True, False, True, True, False])
    for options in ({}, {"mask": mask}):
        _, grads = gradients(symmetric_kl, a, b, **options)
        assert all(g is not None and not bool(g.isnan().any()) for g in grads)


# -- autograd -------------------------------------------------------------------------------------------------------------


def test_backward_twice(backend: str) -> None:
    a, b = streams(4, 30, 0.5)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    value = symmetric_kl(x, y) * 3
    first = torch.autograd.grad(value, (x, y), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value * 2, (x, y))
    for g, k, s in zip(first, kept, second, strict=True):
        assert same_bits(g, k)
        torch.testing.assert_close(s, 2 * g)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_stream_wants_a_gradient(backend: str, which: int, inplace: bool) -> None:
    a, b = streams(4, 1100, 0.5)
    _, expected = gradients(symmetric_kl, a, b)
    pair = [a.clone(), b.clone()]
    source = pair[which].clone().requires_grad_()
    pair[which] = source * 1
    (got,) = torch.autograd.grad(symmetric_kl(*pair, inplace=inplace), source)
    assert same_bits(got, expected[which])
    assert same_bits(pair[1 - which], (a, b)[1 - which])


def test_no_grad_writes_nothing(backend: str) -> None:
    a, b = streams(4, 30, 0.5)
    x, y = a.clone(), b.clone()
    plain = symmetric_kl(x, y, inplace=True)  # nobody wants a gradient
    with torch.no_grad():
        w = x.clone().requires_grad_()
        quiet = symmetric_kl(w * 1, y, inplace=True)
    assert same_bits(x, a)
    assert same_bits(y, b)
    assert same_bits(plain, quiet)
    assert not quiet.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [33, 1500])
def test_inplace(backend: str, dtype: torch.dtype, cols: int) -> None:
    """The same bits as out of place, in the logits' own memory; every later misuse is an error."""
    a, b = (t.to(dtype) for t in streams(6, cols, 0.5))
    value, expected = gradients(lambda a, b: symmetric_kl(a, b) * 2, a, b)
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    x, y = (t * 1 for t in leaves)
    got_value = symmetric_kl(x, y, inplace=True) * 2
    got = torch.autograd.grad(got_value, (x, y), retain_graph=True)
    assert same_bits(got_value, value)
    for g, e, t in zip(got, expected, (x, y), strict=True):
        assert e is not None
        assert same_bits(g, e)
        assert g.data_ptr() == t.data_ptr()
    with pytest.raises(RuntimeError, match="inplace=False"):
        torch.autograd.grad(got_value, (x, y))


def test_inplace_through_views_of_one_batch(backend: str) -> None:
    """Both streams as halves of one batch, as a doubled forward pass makes them."""
    a, b = streams(5, 1100, 0.5)
    both = torch.cat([a, b]).requires_grad_()
    expected = torch.autograd.grad(symmetric_kl(*both.chunk(2)), both)[0]
    for split in ((slice(0, 5), slice(5, 10)), (slice(0, None, 2), slice(1, None, 2))):
        source = torch.empty(10, 1100)
        source[split[0]], source[split[1]] = a, b
        source.requires_grad_()
        used = source * 1
        (got,) = torch.autograd.grad(symmetric_kl(used[split[0]], used[split[1]], inplace=True), source)
        assert same_bits(got[split[0]], expected[:5])
        assert same_bits(got[split[1]], expected[5:])


def test_inplace_is_seen_by_other_users(backend: str) -> None:
    """Whoever saved the logits for its own backward gets autograd's error, not wrong gradients."""
    a, b = (t.requires_grad_() for t in streams(4, 30, 0.5))
    x, y = a * 1, b * 1
    other = x.square().sum()
    total = other + symmetric_kl(x, y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_inplace_refusals(backend: str) -> None:
    a, b = streams(4, 30, 0.5)
    leaf = a.clone().requires_grad_()
    with pytest.raises(ValueError, match="overwrite logits, a leaf"):
        symmetric_kl(leaf, b, inplace=True)
    with pytest.raises(ValueError, match="overwrite noised_logits, a leaf"):
        symmetric_kl(a, leaf.view(4, 30), inplace=True)
    x = leaf * 1
    with pytest.raises(ValueError, match="share memory"):
        symmetric_kl(x, x, inplace=True)
    with pytest.raises(ValueError, match="share memory"):
        symmetric_kl(x[:3], x[1:], inplace=True)
    with pytest.raises(ValueError, match="share memory"):
        symmetric_kl(x[:, :20], x[:, 10:], inplace=True)
    with pytest.raises(ValueError, match="contiguous"):
        symmetric_kl(x.t(), b.t(), inplace=True)
    assert same_bits(x, a)


def test_inplace_allocates_nothing_of_the_logits_size() -> None:
    sources = [t.requires_grad_() for t in streams(64, 4000, 1.0)]
    x, y = (t * 1 for t in sources)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(symmetric_kl(x, y, inplace=True), (x, y))
    assert max(event.cpu_memory_usage for event in profile.function_events) < x.nbytes / 16


# -- R3F's loss -----------------------------------------------------------------------------------------------------------


def expected_r3f(
    a: Tensor, b: Tensor, labels: Tensor, r3f_lambda: float, reduction: str, num_items: int | None = None
) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    """Loss, its two terms and both gradients from the row oracles; a is (batch, ..., classes)."""
    flat, batch = labels.reshape(-1), a.shape[0]
    a, b = a.reshape(len(flat), -1), b.reshape(len(flat), -1)
    counts = (flat != -100).numpy()
    kl, kl_a, kl_b = oracles.divergence(a, b)
    ce, ce_a = oracles.cross_entropy(a, flat.clamp(min=0))
    total = num_items or max(counts.sum(), 1)
    ce_weight = counts * (1.0 if reduction == "sum" else 1.0 / total)
    kl_weight = np.full(len(flat), 1.0 / batch) if reduction == "fairseq" else ce_weight
    task, symm = (ce * ce_weight).sum(), (kl * kl_weight).sum()
    grad_a = r3f_lambda * kl_weight[:, None] * kl_a + ce_weight[:, None] * ce_a
    return task + r3f_lambda * symm, task, symm, grad_a, r3f_lambda * kl_weight[:, None] * kl_b


@pytest.mark.parametrize("reduction", ["token", "num_items", "sentence", "fairseq", "sum"])
@pytest.mark.parametrize("cols", [11, 1200])
@pytest.mark.parametrize("difference", [1.0, 1e-3])
def test_r3f_loss(backend: str, reduction: str, cols: int, difference: float) -> None:
    a, b = streams(12, cols, difference)
    labels = torch.randint(cols, (12,))
    num_items = 30 if reduction == "num_items" else None
    name = "token" if num_items else reduction
    if name != "sentence":
        a, b, labels = a.reshape(3, 4, cols), b.reshape(3, 4, cols), labels.reshape(3, 4)
        labels[0, 1:] = labels[2, 0] = -100
    loss, task, symm, grad_a, grad_b = expected_r3f(a, b, labels, 0.7, name, num_items)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = r3f_loss(x, y, labels, r3f_lambda=0.7, reduction=name, num_items=num_items)
    assert out.loss.requires_grad
    assert not out.task_loss.requires_grad
    assert not out.symm_kl.requires_grad
    for got, want in zip(out, (loss, task, symm), strict=True):
        assert float(got.detach()) == pytest.approx(want, rel=1e-6)
    (out.loss * 3).backward()
    assert x.grad is not None
    assert y.grad is not None
    np.testing.assert_allclose(x.grad.reshape(12, -1), 3 * grad_a, rtol=1e-5, atol=1e-7 * np.abs(grad_a).max())
    np.testing.assert_allclose(y.grad.reshape(12, -1), 3 * grad_b, rtol=1e-5, atol=2e-6 * np.abs(grad_b).max())


def test_a_confident_label_keeps_its_digits(backend: str) -> None:
    """p - 1 at the label, where p rounds to 1 in float32."""
    for cols in (5, 1500):
        a = torch.full((1, cols), -12.0)
        a[0, 2] = 8.0
        x, y = a.clone().requires_grad_(), a.clone()
        r3f_loss(x, y, torch.tensor([2])).loss.backward()
        _, expected = oracles.cross_entropy(a, torch.tensor([2]))
        assert x.grad is not None
        # Narrow rows are summed in float64; in wide ones the sum itself is a float32 near 1.
        close = {"rel": 1e-6} if cols == 5 else {"abs": 6e-7}
        assert float(x.grad[0, 2]) == pytest.approx(expected[0, 2], **close)


def test_lambda_zero_is_cross_entropy(backend: str) -> None:
    a, b = streams(6, 40, 1.0)
    b[2, 3] = math.nan  # not looked at
    labels = torch.tensor([1, 2, -100, 4, 5, 6])
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    out = r3f_loss(x, y, labels, r3f_lambda=0.0)
    out.loss.backward()
    z = a.clone().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(z, labels)
    expected.backward()
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(x.grad, z.grad.float(), rtol=1e-5, atol=1e-8)  # type: ignore[union-attr]
    assert y.grad is not None
    assert not y.grad.any()


def test_all_labels_ignored(backend: str) -> None:
    a, b = streams(6, 40, 1.0)
    for reduction in ("token", "sentence", "sum"):
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = r3f_loss(x, y, torch.full((6,), -100), reduction=reduction)
        out.loss.backward()
        assert [float(v.detach()) for v in out] == [0, 0, 0]
        assert x.grad is not None
        assert y.grad is not None
        assert not x.grad.any()
        assert not y.grad.any()


@pytest.mark.parametrize("reduction", ["token", "sum"])
def test_padding_changes_nothing(reduction: str) -> None:
    """Further padding, whatever its logits hold: the same bits (papers.md 2f)."""
    a, b = (t.reshape(3, 4, 50) for t in streams(12, 50, 0.5))
    labels = torch.randint(50, (3, 4))
    padded = [torch.cat([t, torch.full((3, 2, 50), math.nan)], dim=1) for t in (a, b)]
    more = torch.cat([labels, torch.full((3, 2), -100)], dim=1)
    value, grads = gradients(lambda *inputs: r3f_loss(*inputs, reduction=reduction).loss, a, b, labels)
    wider, wider_grads = gradients(lambda *inputs: r3f_loss(*inputs, reduction=reduction).loss, *padded, more)
    assert same_bits(value, wider)
    for g, w in zip(grads, wider_grads, strict=True):
        assert g is not None
        assert w is not None
        assert same_bits(g, w[:, :4])
        assert not w[:, 4:].any()


@pytest.mark.parametrize("r3f_lambda", [1.0, 0.3])
def test_fairseq_criteria(backend: str, r3f_lambda: float) -> None:
    """Both released criteria, written from their equations in float64, with gradients by torch."""
    a, b = streams(6, 5, 0.8)
    labels = torch.randint(5, (6,))
    exact = [t.double().requires_grad_() for t in (a, b)]
    expected = oracles.sentence_prediction_r3f(*exact, labels, r3f_lambda)
    expected_grads = torch.autograd.grad(expected, exact)
    got, grads = gradients(lambda a, b: r3f_loss(a, b, labels, r3f_lambda=r3f_lambda, reduction="sentence").loss, a, b)
    assert float(got) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(grads, [g.float() for g in expected_grads], rtol=1e-5, atol=1e-8)

    a, b = (t.reshape(2, 7, 30) for t in streams(14, 30, 0.8))
    tokens = torch.randint(30, (2, 7))
    tokens[1, 4:] = -1
    exact = [t.double().requires_grad_() for t in (a, b)]
    expected = oracles.label_smoothed_cross_entropy_r3f(*exact, tokens, r3f_lambda, padding=-1)
    expected_grads = torch.autograd.grad(expected, exact)
    got, grads = gradients(
        lambda a, b: r3f_loss(a, b, tokens, r3f_lambda=r3f_lambda, reduction="fairseq", ignore_index=-1).loss, a, b
    )
    assert float(got) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(grads, [g.float() for g in expected_grads], rtol=1e-5, atol=1e-8)


def test_r3f_inplace(backend: str) -> None:
    a, b = streams(6, 1200, 0.5)
    labels = torch.randint(1200, (6,))
    expected = gradients(lambda a, b: r3f_loss(a, b, labels).loss, a, b)
    x, y = (t.clone().requires_grad_() * 1 for t in (a, b))
    out = r3f_loss(x, y, labels, inplace=True)
    got = torch.autograd.grad(out.loss, (x, y))
    assert same_bits(out.loss, expected[0])
    assert all(e is not None and same_bits(g, e) for g, e in zip(got, expected[1], strict=True))


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FC00001, 0x7FC001FF, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_nan_of_any_payload_stays_one(backend: str, payload: int) -> None:
    """Arithmetic makes one kind of NaN; memory may hold any."""
    a, b = streams(3, 1500, 0.5)
    a.view(torch.int32)[1, 7] = payload - (1 << 32 if payload >> 31 else 0)
    labels = torch.tensor([1, 2, 3])
    for weight in (0.0, 1.0):
        (value, grads) = gradients(lambda a, b, w=weight: r3f_loss(a, b, labels, r3f_lambda=w).loss, a, b)
        assert value.isnan()
        assert grads[0][1].isnan().all()
    assert symmetric_kl(a, b, reduction="none").isnan().tolist() == [False, True, False]


# -- float16 under a loss scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.1])  # None: the divergence alone
def test_float16_gradients_are_made_under_the_loss_scale(backend: str, smoothing: float | None, inplace: bool) -> None:
    """Most are below 6e-8, where float16 ends, until a GradScaler's factor is on them."""
    rows = 8 if backend == "triton" else 64  # whose interpreter is slow
    a, b = (t.half() for t in streams(rows, 6000, 0.02 * rows / 64))
    labels = torch.randint(6000, (rows,))

    def loss(a: Tensor, b: Tensor, **options: bool) -> Tensor:
        if smoothing is None:
            return symmetric_kl(a, b, reduction="mean", **options)
        return r3f_loss(a, b, labels, label_smoothing=smoothing, **options).loss

    exact = [t.double().requires_grad_() for t in (a, b)]
    p, q = (t.log_softmax(-1) for t in exact)
    kl = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
    ce = 0 if smoothing is None else torch.nn.functional.cross_entropy(exact[0], labels, label_smoothing=smoothing)
    expected = torch.autograd.grad(kl + ce, exact)

    leaves = [t.requires_grad_() for t in (a, b)]
    x, y = (t * 1 for t in leaves)
    scaled = loss(x, y, inplace=inplace) * 2**16
    got = torch.autograd.grad(scaled, (x, y), retain_graph=True)
    for g, e, t in zip(got, expected, (x, y), strict=True):
        assert (g.double() / 2**16 - e).norm() <= 1e-3 * e.norm()
        assert (g.data_ptr() == t.data_ptr()) == inplace
    if inplace:
        with pytest.raises(RuntimeError, match="inplace=False"):
            torch.autograd.grad(scaled, (x, y))
    else:
        assert all(map(same_bits, torch.autograd.grad(scaled, (x, y)), got))


def test_smoothing_keeps_its_digits_whatever_is_added_to_all_logits(backend: str) -> None:
    a, b = streams(6, 70, 0.1)
    labels = torch.randint(70, (6,))
    for level in (0.0, 1e4, 1e5):
        clean, noised = (t.double().add(level).float() for t in (a, b))
        expected = torch.nn.functional.cross_entropy(clean.double(), labels, label_smoothing=0.1)
        got = r3f_loss(clean, noised, labels, label_smoothing=0.1).task_loss
        assert float(got) == pytest.approx(float(expected), rel=1e-6)


# -- bad input: one clear error, nothing written --------------------------------------------------------------------------


LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: symmetric_kl(a, b[:3]), ValueError, r"\(4, 9\).*\(3, 9\)"),
        (lambda a, b: symmetric_kl(a, b[:, :1]), ValueError, r"\(4, 9\).*\(4, 1\)"),
        (lambda a, b: symmetric_kl(a, b.bfloat16()), ValueError, "float32.*bfloat16"),
        (lambda a, b: symmetric_kl(a, b.to("meta")), ValueError, "cpu.*meta"),
        (lambda a, b: symmetric_kl(a.long(), b.long()), TypeError, "int64"),
        (lambda a, b: symmetric_kl(a.cfloat(), b.cfloat()), TypeError, "complex64"),
        (lambda a, b: symmetric_kl(a, [1.0]), TypeError, "list"),
        (lambda a, b: symmetric_kl(a[:, :0], b[:, :0]), ValueError, "no classes"),
        (lambda a, b: symmetric_kl(a, b, reduction="bachmean"), ValueError, "'batchmean'"),
        (lambda a, b: symmetric_kl(a, b, mask=torch.ones(4)), TypeError, "bool"),
        (lambda a, b: symmetric_kl(a, b, mask=[True] * 4), TypeError, "mask is a list"),
        (lambda a, b: symmetric_kl(a, b, mask=torch.ones(4, 9, dtype=torch.bool)), ValueError, r"\(4, 9\), expected \(4,\)"),
        (lambda a, b: r3f_loss(a, b, torch.zeros(3, dtype=torch.long)), ValueError, r"\(3,\), expected \(4,\)"),
        (lambda a, b: r3f_loss(a, b, torch.zeros(4)), TypeError, "integers"),
        (lambda a, b: r3f_loss(a, b, [0, 1, 2, 3]), TypeError, "list"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, 1, 9, 2])), ValueError, "label 9 in row 2"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, -1, 8, 2])), ValueError, "label -1 in row 1"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, 1, 2, 3]), reduction="tokens"), ValueError, "'token'"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, 1, 2, 3]), r3f_lambda=-1.0), ValueError, "r3f_lambda"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, 1, 2, 3]), r3f_lambda=math.nan), ValueError, "r3f_lambda"),
        (lambda a, b: r3f_loss(a, b, LABELS, r3f_lambda=None), TypeError, "r3f_lambda must be a number"),
        (lambda a, b: r3f_loss(a, b, LABELS, r3f_lambda=torch.tensor(1.0, requires_grad=True)), TypeError, "gets none"),
        (lambda a, b: r3f_loss(a, b, LABELS, label_smoothing="0.1"), TypeError, "label_smoothing must be a number"),
        (lambda a, b: r3f_loss(a, b, LABELS, label_smoothing=1.0), ValueError, "label_smoothing"),
        (lambda a, b: r3f_loss(a, b, LABELS, ignore_index=None), TypeError, "ignore_index must be a whole number"),
        (lambda a, b: r3f_loss(a, b, LABELS, num_items="4"), TypeError, "num_items must be a number"),
        (lambda a, b: r3f_loss(a, b, LABELS, num_items=torch.tensor(4.0, requires_grad=True)), TypeError, "gets none"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, 1, 2, 3]), num_items=-1), ValueError, "num_items"),
        (lambda a, b: r3f_loss(a, b, torch.tensor([0, 1, 2, 3]), num_items=4, reduction="sum"), ValueError, "num_items"),
        (
            lambda a, b: r3f_loss(a[None], b[None], torch.tensor([[0, 1, 2, 3]]), reduction="sentence"),
            ValueError,
            "sentence",
        ),
    ],
)
def test_bad_input(call: Callable[[Tensor, Tensor], object], error: type[Exception], message: str) -> None:
    a, b = streams(4, 9, 0.5)
    x, y = a.clone(), b.clone()
    with pytest.raises(error, match=message):
        call(x, y)
    assert same_bits(x, a)
    assert same_bits(y, b)


def test_a_forced_backend_that_cannot_serve_says_so() -> None:
    a, b = (t.double() for t in streams(2, 5, 0.1))
    with fastpost.use_backend("cpu"), pytest.raises(fastpost.dispatch.BackendUnavailable, match="float64"):
        symmetric_kl(a, b)


# -- a step without a label that counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "items", [0, 0.0, torch.tensor(0), torch.tensor([0]), torch.tensor(0.0), torch.tensor(0, dtype=torch.int32)]
)
def test_no_items_give_zero(backend: str, items: float | Tensor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (t.to(dtype).requires_grad_() for t in streams(4, 8, 0.5))
        a.data[1] = torch.nan
        out = r3f_loss(a, b, torch.full((4,), -100), num_items=items, r3f_lambda=0.5, label_smoothing=0.1)
        assert (float(out.loss), float(out.task_loss), float(out.symm_kl)) == (0.0, 0.0, 0.0)
        for g in torch.autograd.grad(out.loss, (a, b)):
            assert not g.any()


def test_num_items_cost_no_digits() -> None:
    a, b = (t.double().requires_grad_() for t in streams(4, 8, 0.5))
    labels, n = torch.tensor([0, 3, -100, 7]), 16_777_217  # no float32
    total = r3f_loss(a, b, labels, reduction="sum").loss
    for items in (n, float(n), torch.tensor(n), torch.tensor(n, dtype=torch.float64)):
        loss = r3f_loss(a, b, labels, num_items=items).loss
        assert float(loss) == pytest.approx(float(total) / n, rel=1e-15)
        for g, whole in zip(*(torch.autograd.grad(t, (a, b), retain_graph=True) for t in (loss, total)), strict=True):
            torch.testing.assert_close(g, whole / n, rtol=1e-14, atol=0)


@pytest.mark.parametrize("items", [-1, math.nan, math.inf, torch.tensor(-3), torch.tensor(math.nan), torch.tensor([1, 2])])
def test_num_items_that_are_none(items: float | Tensor) -> None:
    a, b = streams(4, 8, 0.5)
    with pytest.raises(ValueError, match=r"r3f_loss: num_items must be (finite and >= 0|one number)"):
        r3f_loss(a, b, torch.zeros(4, dtype=torch.int64), num_items=items)
