"""Perturbations that meet 16 bits: stochastic rounding, and weights that are casts of float32 masters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastpost
from fastpost.backends.reference import philox
from fastpost.ops import params as ops

from .conftest import same_bits

HALVES = (torch.bfloat16, torch.float16)


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `dtype` next to float32 x, towards zero and away from it, as float64; the same twice where x is one."""
    nearest = x.to(dtype)
    at, exact = nearest.double(), x.double()
    inf = torch.full_like(x, math.inf)
    outer = torch.nextafter(nearest, (inf * x.sign()).to(dtype)).double()
    inner = torch.nextafter(nearest, torch.zeros_like(nearest)).double()
    low = torch.where(at.abs() <= exact.abs(), at, inner)
    high = torch.where(at.abs() >= exact.abs(), at, outer)
    return low, high


def halves_of(n: int, seed: int, stream: int) -> Tensor:
    """16 bits per element, as the documentation of sam_perturb_ says."""
    words = philox(torch.tensor(seed), torch.arange(-(-n // 8)), stream)
    return torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(-1)[:n]


def stored(weights: list[Tensor], grads: list[Tensor], rho: float, seed: int | None) -> tuple[list[Tensor], Tensor]:
    w = [t.clone() for t in weights]
    stash = [torch.full_like(t, math.nan) for t in w]
    sums = ops.sam_perturb_(w, grads, stash, ops.squared_norm(grads), rho=rho, seed=seed)
    assert all(same_bits(a, b) for a, b in zip(stash, weights, strict=True))
    return w, sums


@pytest.mark.parametrize("dtype", HALVES)
def test_every_element_goes_to_the_neighbour_that_its_bits_choose(backend: str, dtype: torch.dtype) -> None:
    """Exactly: w = 0, so that w + e is e, a power of two times g, whatever a backend fuses."""
    scales = torch.tensor([1.0, 1e-3, 2.0**-14, 2.0**-16, 2.0**-24, 2.0**-26] if dtype == torch.float16 else [1.0, 1e-30])
    g = (torch.randn(70_001, dtype=torch.float64) * scales[torch.arange(70_001) % len(scales)]).float()
    weights, grads = (
        [torch.zeros(70_001, dtype=dtype), torch.zeros(5, dtype=dtype)],
        [g.to(dtype), torch.zeros(5, dtype=dtype)],
    )
    squared = torch.tensor(2.0**26, dtype=torch.float64)  # rho / |g| = 3 * 2^-13: a third bit, so that e needs rounding
    w, stash = [t.clone() for t in weights], [t.clone() for t in weights]
    ops.sam_perturb_(w, grads, stash, squared, rho=3.0, seed=77)
    e = grads[0].float() * torch.tensor(3 * 2.0**-13)
    low, high = neighbours(e, dtype)
    share = torch.where(high != low, (e.double() - low) / (high - low), torch.zeros_like(low))
    bits = halves_of(e.numel(), 77, 0).double() / 65536
    expected = torch.where(share + bits >= 1, high, low)
    assert bool((low != high).any())
    torch.testing.assert_close(w[0].double(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_is_kept_where_rounding_to_nearest_loses_the_step(backend: str, dtype: torch.dtype) -> None:
    n = 40_000
    weights, grads = [torch.full((n,), 1.0, dtype=dtype)], [torch.ones(n, dtype=dtype)]
    rho = math.sqrt(n) * torch.finfo(dtype).eps / 20  # every element by a twentieth of the last place
    nearest, sums = stored(weights, grads, rho, None)
    assert same_bits(nearest[0], weights[0])
    assert float(sums[5]) == 0
    random, sums = stored(weights, grads, rho, 5)
    step = (random[0].double() - 1).mean() / torch.finfo(dtype).eps
    assert abs(float(step) - 1 / 20) < 4 * math.sqrt(1 / 20 / n)
    assert float(sums[5]) == int((random[0] != 1).sum())
    torch.testing.assert_close(float(sums[1]), float((random[0].double() - 1).square().sum()), rtol=1e-6, atol=0)


def test_seed_tensor_and_place_choose_the_bits(backend: str) -> None:
    weights = [torch.ones(300, dtype=torch.bfloat16) for _ in range(2)]
    grads = [torch.ones(300, dtype=torch.bfloat16) for _ in range(2)]
    first, _ = stored(weights, grads, 0.05, 1)
    again, _ = stored(weights, grads, 0.05, 1)
    other, _ = stored(weights, grads, 0.05, 2)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
    assert not same_bits(first[0], first[1])
    assert not same_bits(first[0], other[0])


@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_nans_and_numbers_at_the_edge(backend: str, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    values = torch.tensor([math.inf, -math.inf, math.nan, top, -top, 0.0, -0.0, 1.5], dtype=dtype)
    g = torch.zeros_like(values)
    g[-1] = 2.0**-20
    w, stash = values.clone(), values.clone()
    ops.sam_perturb_([w], [g], [stash], torch.tensor(1.0, dtype=torch.float64), rho=1.0, seed=3)
    assert w[0] == math.inf
    assert w[1] == -math.inf
    assert bool(w[2].isnan())
    assert w[3:7].tolist() == [top, -top, 0.0, 0.0]


def test_wider_weights_ignore_the_seed(backend: str) -> None:
    weights, grads = [torch.randn(1000)], [torch.randn(1000)]
    assert same_bits(stored(weights, grads, 0.3, 9)[0][0], stored(weights, grads, 0.3, None)[0][0])


# -- float32 masters ------------------------------------------------------------------------------------------------------


def bucket_of(masters: list[Tensor], grads: list[Tensor], dtype: torch.dtype) -> object:
    weights = [m.to(dtype) for m in masters]
    (bucket,) = ops.make_buckets(weights=weights, grads=grads)
    bucket.stash = masters
    return bucket


@pytest.mark.parametrize("eta", [None, 0.01])
@pytest.mark.parametrize("dtype", HALVES)
def test_weights_become_the_casts_of_perturbed_masters(backend: str, dtype: torch.dtype, eta: float | None) -> None:
    shapes = ((70_001,), (3,), (0,), (33, 65))
    masters, grads = [torch.randn(s) for s in shapes], [torch.randn(s).to(dtype) for s in shapes]
    kept = [m.clone() for m in masters]
    bucket = bucket_of(masters, grads, dtype)
    squared = ops.squared_norm(grads, [m.to(dtype) for m in masters] if eta is not None else None, eta=eta or 0.0)
    sums = ops.run("sam_perturb_masters_", bucket, squared, 40.0, eta, torch.bfloat16)
    wanted = torch.zeros(6, dtype=torch.float64)
    for w, m, g in zip(bucket.weights, kept, grads, strict=True):
        t = 1.0 if eta is None else (m.double().abs() + eta).square()
        e = 40.0 / squared.sqrt() * g.double() * t
        near = neighbours((m.double() + e).float(), dtype)
        exact = m.double() + e
        unit = (near[1] - near[0]).abs() + 1e-6 * exact.abs() + torch.finfo(dtype).smallest_normal
        assert bool(((w.double() - exact).abs() <= unit / 2 + 3e-7 * (m.abs() + e.abs())).all())
        s = w.double() - m.to(dtype).double()
        v = w.bfloat16().double() - m.to(dtype).bfloat16().double()
        wanted += torch.stack([(e * e).sum(), (s * s).sum(), (e * s).sum(), (v * v).sum(), (e * v).sum(), (s != 0).sum()])
    torch.testing.assert_close(sums, wanted, rtol=2e-6, atol=0)
    assert all(same_bits(m, k) for m, k in zip(masters, kept, strict=True))
    ops.run("sam_cast_", bucket)
    assert all(same_bits(w, k.to(dtype)) for w, k in zip(bucket.weights, kept, strict=True))


@pytest.mark.parametrize("squared", [0.0, math.inf, math.nan])
def test_where_nothing_may_move_the_weights_are_the_masters_casts(backend: str, squared: float) -> None:
    masters, grads = [torch.randn(1000)], [torch.full((1000,), math.inf, dtype=torch.bfloat16)]
    bucket = bucket_of(masters, grads, torch.bfloat16)
    bucket.weights[0].fill_(7.0)
    sums = ops.run("sam_perturb_masters_", bucket, torch.tensor(squared, dtype=torch.float64), 0.1, None, torch.bfloat16)
    assert same_bits(bucket.weights[0], masters[0].bfloat16())
    assert sums.tolist() == [0.0] * 6


def test_bits_agree_between_backends() -> None:
    """The random bits do, and so does the rounding; e itself may differ in float32's last place."""
    if not {"reference", "cpu"} <= {n for n, s in fastpost.backends().items() if s.available}:
        pytest.skip("needs two backends on the CPU")
    weights, grads = [torch.zeros(5000, dtype=torch.bfloat16)], [torch.randn(5000).bfloat16()]
    results = []
    for backend in ("reference", "cpu"):
        with fastpost.use_backend(backend):
            results.append(stored(weights, grads, 0.7, 123)[0][0])
    assert float((results[0] != results[1]).float().mean()) < 1e-3
