"""Noise: the generator against its published vectors, the same bits everywhere, moments, masks, gradients."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import fastpost
from fastpost import dispatch
from fastpost.backends import native, reference
from fastpost.ops.noise import add_noise, embedding_noise
from fastpost.row_tasks import NoiseTask
from tests.conftest import CPU_BACKENDS, DTYPES, same_bits

NOISE_TYPES = ("uniform", "normal")
# Error of a compiled normal number, in units of 2^-23 * max(1, abs(z)): 2.0 measured over 2^24 numbers.
NORMAL_ULPS = 4


def words(values: str) -> list[int]:
    return [int(word, 16) for word in values.split()]


def numbers(n: int, noise_type: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first n numbers themselves: noise of scale one on zeros."""
    return add_noise(torch.zeros(n, dtype=dtype), 1.0, noise_type, seed=seed)


# -- the generator ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123's philox4x32_10
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    c = tuple(torch.tensor(word) for word in words(counter))
    k = tuple(torch.tensor(word) for word in words(key))
    assert reference.philox_rounds(c, k).tolist() == words(expected)  # type: ignore[arg-type]


def test_philox_places_seed_counter_and_stream() -> None:
    seed, counter, stream = 0x0123456789ABCDEF, 0x76543210FEDCBA98, 0xCAFEF00D
    found = reference.philox(torch.tensor(seed), torch.tensor([counter]), stream)[0]
    c = tuple(torch.tensor(word) for word in (counter & 0xFFFFFFFF, counter >> 32, stream, 0))
    k = tuple(torch.tensor(word) for word in (seed & 0xFFFFFFFF, seed >> 32))
    assert torch.equal(found, reference.philox_rounds(c, k))  # type: ignore[arg-type]


def test_uniform_numbers_are_the_generators_top_bits(backend: str) -> None:
    expected = [((word >> 8) * 2 + 1 - 2**24) * 2.0**-24 for word in words("6627e8d5 e169c58d bc57ac4c 9b00dbd8")]
    assert numbers(4, "uniform", seed=0).tolist() == expected


# -- the same bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_noise_is_the_same_bits_in_reference_and_cpu(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x = (torch.randn(37, 1031) * 0.1).to(dtype)  # rows that no vector width divides, more than one task
    results = []
    for name in ("reference", "cpu"):
        with fastpost.use_backend(name):
            results.append(add_noise(x, 0.037, seed=-5, out_dtype=out_dtype))
    assert same_bits(*results)
    assert float((results[0].double() - x.double()).abs().max()) > 0.03


def test_sum_and_product_are_rounded_separately(backend: str) -> None:
    x, eps = torch.randn(100_000), 0.1
    z = numbers(len(x), "uniform", seed=9)
    assert same_bits(add_noise(x, eps, seed=9), x + z * torch.tensor(eps))
    fused = (x.double() + z.double() * torch.tensor(eps).double()).float()  # what contraction to FMA would give
    assert not same_bits(add_noise(x, eps, seed=9), fused)


@pytest.mark.parametrize("eps", [3e-30, 2e-38, 1e-41])
def test_noise_as_small_as_floats_can_be(backend: str, eps: float) -> None:
    """Where eps times a power of two is no longer exact."""
    x = torch.randn(20_000) * eps
    noised = add_noise(x, eps, seed=8)
    with fastpost.use_backend("reference"):
        assert same_bits(noised, add_noise(x, eps, seed=8))
    assert float((noised.double() - x.double()).abs().max()) > 0.9 * eps


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_bits_do_not_depend_on_threads_or_address(noise_type: str) -> None:
    x = torch.randn(200_001)
    shifted = torch.empty(200_002)[1:].copy_(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = add_noise(x, 0.1, noise_type, seed=3)
        torch.set_num_threads(4)
        assert same_bits(add_noise(shifted, 0.1, noise_type, seed=3), alone)
    finally:
        torch.set_num_threads(before)


_DIGEST = """
import hashlib, torch
from fastpost.ops.noise import add_noise
from fastpost.backends import native
x = (torch.arange(100_003) % 977 - 488) / 512
total = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for noise_type in ("uniform", "normal"):
        noised = add_noise(x.to(dtype), 0.1, noise_type, seed=2**63 + 11)
        total.update(noised.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy().tobytes())
print(native.core().cpu.isa(), total.hexdigest())
"""


@pytest.mark.skipif(native.failure() is not None, reason="no compiled core")
def test_every_instruction_set_gives_the_same_bits() -> None:
    """Uniform by contract; normal because all of them run the same operations, none contracted."""
    seen = {}
    for isa in native.core().cpu.isas().split():
        environment = {**os.environ, "FASTPOST_CPU_ISA": isa, "FASTPOST_BACKEND": "cpu"}
        run = subprocess.run([sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        used, seen[isa] = run.stdout.split()
        assert used == isa
    assert len(set(seen.values())) == 1, seen
    assert hashlib.sha256().hexdigest() not in seen.values()


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_normal_noise_is_within_its_bound_of_float64(seed: int) -> None:
    n = 1 << 21
    with fastpost.use_backend("reference"):
        exact = numbers(n, "normal", seed, torch.float64)
    with fastpost.use_backend("cpu"):
        error = (numbers(n, "normal", seed).double() - exact).abs()
    assert float((error / exact.abs().clamp(min=1)).max()) <= NORMAL_ULPS * 2.0**-23


# -- what the numbers are ---------------------------------------------------------------------------------------------------


def test_moments_of_uniform_noise(backend: str) -> None:
    n, eps = 1 << (17 if backend == "triton" else 20), 0.5  # the interpreter is slow
    z = add_noise(torch.zeros(n), eps, seed=1).double()
    assert float(z.abs().max()) < eps
    assert float(z.abs().min()) > 0
    assert abs(float(z.mean())) < 5 * eps / math.sqrt(3 * n)
    assert abs(float(z.square().mean()) / (eps**2 / 3) - 1) < 5 * math.sqrt(0.8 / n)
    quarters = torch.histc(z, 16, -eps, eps) / n
    assert float((quarters - 1 / 16).abs().max()) < 5 * math.sqrt(1 / 16 / n)
    for lag in (1, 2, 3, 4, 64, 1024):
        assert abs(float((z[lag:] * z[:-lag]).mean()) / (eps**2 / 3)) < 5 / math.sqrt(n), lag


def test_moments_of_normal_noise(backend: str) -> None:
    n, eps = 1 << (17 if backend == "triton" else 20), 0.5  # the interpreter is slow
    z = add_noise(torch.zeros(n), eps, "normal", seed=1).double() / eps
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(z.pow(power).mean()) - expected) < 5 * math.sqrt(variance / n), power
    inside = float((z.abs() < 1).double().mean())
    assert abs(inside - math.erf(math.sqrt(0.5))) < 5 * math.sqrt(0.25 / n)
    for lag in (1, 2, 3, 4, 64):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(n), lag


def test_seeds(backend: str) -> None:
    x = torch.zeros(1000)
    torch.manual_seed(5)
    first, second = add_noise(x, 1.0), add_noise(x, 1.0)
    torch.manual_seed(5)
    assert same_bits(add_noise(x, 1.0), first)
    assert not torch.equal(first, second)
    assert same_bits(add_noise(x, 1.0, seed=2**64 - 1), add_noise(x, 1.0, seed=-1))
    assert same_bits(add_noise(x, 1.0, seed=7), add_noise(x, 1.0, seed=torch.tensor(7)))
    other = add_noise(x, 1.0, seed=7 + 2**32)  # the key's upper word counts too
    assert abs(float((other * add_noise(x, 1.0, seed=7)).mean())) < 5 / 3 / math.sqrt(1000)


# -- masks, shapes, gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 16, 300])
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.usefixtures("poisoned")
def test_rows_without_noise_are_left_alone_and_not_counted(backend: str, noise_type: str, width: int) -> None:
    rows = 7 if backend == "triton" else 31  # the interpreter takes them one by one
    x = torch.randn(5, rows, width)
    keep = torch.rand(5, rows) < 0.6
    noised = add_noise(x, 0.1, noise_type, seed=4, keep=keep)
    assert same_bits(noised[~keep], x[~keep])
    assert same_bits(noised[keep], add_noise(x[keep], 0.1, noise_type, seed=4))
    assert bool((noised[keep] != x[keep]).any())
    wider = torch.zeros(5, rows + 9, width)
    wider[:, 9:] = x
    longer = torch.zeros(5, rows + 9, dtype=torch.bool)
    longer[:, 9:] = keep
    assert same_bits(add_noise(wider, 0.1, noise_type, seed=4, keep=longer)[:, 9:], noised)


@pytest.mark.usefixtures("poisoned")
def test_layouts_empty_tensors_scalars_and_special_values(backend: str) -> None:
    x = torch.randn(6, 10)
    assert same_bits(add_noise(x.t(), 0.1, seed=1), add_noise(x.t().contiguous(), 0.1, seed=1))
    assert same_bits(add_noise(x[:, ::2], 0.1, seed=1), add_noise(x[:, ::2].contiguous(), 0.1, seed=1))
    assert add_noise(x[:0], 0.1).shape == (0, 10)
    assert add_noise(torch.zeros(4, 0), 0.1, keep=torch.ones(4, dtype=torch.bool)).shape == (4, 0)
    assert add_noise(torch.tensor(1.0), 0.1, seed=1).shape == ()
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    noised = add_noise(special, 0.1, seed=1)
    assert noised[:2].tolist() == [math.inf, -math.inf]
    assert bool(noised[2].isnan())
    assert same_bits(add_noise(x, 0.0, seed=1), x)


def test_float64_is_served_by_the_reference() -> None:
    x = torch.randn(100, dtype=torch.float64)
    noised = add_noise(x, 1e-12, seed=1)
    assert noised.dtype == torch.float64
    assert 0 < float((noised - x).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_unchanged(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    noised = add_noise(x, 0.1, out_dtype=torch.float32, keep=torch.tensor([True, False, True, True]))
    up = torch.randn(4, 8).to(dtype).float()  # exact in both dtypes
    (grad,) = torch.autograd.grad(noised, x, up)
    assert same_bits(grad, up.to(dtype))
    assert not add_noise(x.detach(), 0.1).requires_grad


def test_input_is_not_written(backend: str) -> None:
    x = torch.randn(64)
    before = x.clone()
    add_noise(x, 1.0)
    assert same_bits(x, before)


# -- the embedding ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("noise_type", NOISE_TYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_noise_is_gather_then_noise(
    backend: str, dtype: torch.dtype, out_dtype: torch.dtype | None, noise_type: str
) -> None:
    table = torch.randn(50, 33).to(dtype)
    tokens = 5 if backend == "triton" else 21  # the interpreter is slow
    for ids in (torch.randint(0, 50, (3, tokens)), torch.randint(0, 50, (7,), dtype=torch.int32), torch.zeros(0, 4).long()):
        keep = torch.rand(ids.shape) < 0.7
        for mask in (None, keep):
            clean, noised = embedding_noise(table, ids, 0.1, noise_type, seed=8, keep=mask, out_dtype=out_dtype)
            assert same_bits(clean, table[ids])
            assert same_bits(noised, add_noise(table[ids], 0.1, noise_type, seed=8, keep=mask, out_dtype=out_dtype))


def test_embedding_noise_on_strided_tables(backend: str) -> None:
    table = torch.randn(50, 40)
    ids = torch.randint(0, 50, (9,))
    for view in (table[:, 3:30], table[::2].expand(25, 40), torch.randn(33, 50).t()):
        inside = ids % view.shape[0]
        clean, noised = embedding_noise(view, inside, 0.1, seed=8)
        assert same_bits(clean, view[inside])
        assert same_bits(noised, add_noise(view[inside], 0.1, seed=8))


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
@pytest.mark.parametrize("detach", [False, True])
def test_gradient_of_embedding_noise(backend: str, padding_idx: int | None, detach: bool) -> None:
    module = nn.Embedding(10, 6, padding_idx=padding_idx)
    ids = torch.tensor([[0, 3, 3], [9, 1, 0]])
    up, up_noised = torch.randn(2, 2, 3, 6).unbind()
    clean, noised = embedding_noise(module.weight, ids, 0.1, padding_idx=padding_idx, detach_noised=detach)
    assert noised.requires_grad is not detach
    ((clean * up).sum() + (noised * up_noised).sum()).backward() if not detach else (clean * up).sum().backward()
    (expected,) = torch.autograd.grad((module(ids) * (up if detach else up + up_noised)).sum(), module.weight)
    assert torch.equal(module.weight.grad, expected)
    if not detach:  # the noised half alone
        _, noised = embedding_noise(module.weight, ids, 0.1, padding_idx=padding_idx)
        (grad,) = torch.autograd.grad((noised * up).sum(), module.weight)
        assert torch.equal(grad, torch.autograd.grad((module(ids) * up).sum(), module.weight)[0])


# -- bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf])
def test_bad_eps(backend: str, eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        add_noise(torch.zeros(2), eps)
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        embedding_noise(torch.zeros(2, 2), torch.tensor([0]), eps)


def test_bad_input_is_named(backend: str) -> None:
    x, table, ids = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
    with pytest.raises(ValueError, match=r"unknown noise_type 'uniforms'\. Did you mean 'uniform'\? Valid: uniform, normal"):
        add_noise(x, noise_type="uniforms")
    with pytest.raises(TypeError, match=r"x must be floating point, not torch\.int64"):
        add_noise(x.long())
    with pytest.raises(TypeError, match="out_dtype must be floating point"):
        add_noise(x, out_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"keep has shape \(3,\), expected \(2,\)"):
        add_noise(x, keep=torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"keep must be bool .* not torch\.float32"):
        add_noise(x, keep=torch.ones(2))
    with pytest.raises(ValueError, match="not a scalar"):
        add_noise(torch.tensor(1.0), keep=torch.tensor(True))
    with pytest.raises(ValueError, match="seed must lie in"):
        add_noise(x, seed=2**64)
    with pytest.raises(ValueError, match="seed must be one int64"):
        add_noise(x, seed=torch.tensor([1, 2]))
    for seed in (1.9, True, "1"):
        with pytest.raises(TypeError, match="seed must be a whole number or an int64 tensor with one, not"):
            add_noise(x, seed=seed)  # type: ignore[arg-type]
    for scale in (torch.tensor([1.0, -0.5]), torch.tensor([-0.5, 1.0])):
        with pytest.raises(ValueError, match=r"scale must be >= 0, and its least value is -0\.5"):
            add_noise(x, scale=scale)
        with pytest.raises(ValueError, match="embedding_noise: scale must be >= 0"):
            embedding_noise(table, ids, scale=scale)
    for padding_idx in (5, 99, -6):
        with pytest.raises(ValueError, match=f"padding_idx={padding_idx} is outside a table of 5 rows"):
            embedding_noise(table, ids, padding_idx=padding_idx)
    with pytest.raises(IndexError, match="index 5 is outside a table of 5 rows"):
        embedding_noise(table, torch.tensor([0, 5]))
    with pytest.raises(IndexError, match="index -1 is outside"):
        embedding_noise(table, torch.tensor([-1, 0]))
    with pytest.raises(TypeError, match="ids must be int64 or int32"):
        embedding_noise(table, ids.double())
    with pytest.raises(TypeError, match="table must be a floating-point matrix"):
        embedding_noise(table[0], ids)
    with pytest.raises(ValueError, match="keep has shape"):
        embedding_noise(table, ids, keep=torch.ones(3, dtype=torch.bool))


def test_an_index_outside_the_table_reads_nothing(backend: str) -> None:
    """Where looking at indices would wait for the device nobody does: such a row is NaN, its neighbours are not."""
    if backend not in ("cuda", "triton"):
        pytest.skip("the CPU checks indices before anything is gathered")
    table, ids = torch.randn(5, 12), torch.tensor([0, 5, -1, 4, 2**40])
    kernel = dispatch.select("embedding_noise", table.device, table.dtype)
    clean, noised = kernel(table, ids, NoiseTask(1e-3, "uniform", torch.tensor(3), None, None, torch.float32))
    assert clean.isnan().all(1).tolist() == noised.isnan().all(1).tolist() == [False, True, True, False, True]
    assert same_bits(clean[3], table[4])


# -- numbers of the whole step, scales per row ----------------------------------------------------------------------------


@pytest.mark.parametrize("noise_type", ["uniform", "normal"])
def test_noise_belongs_to_the_token_wherever_it_lies(backend: str, noise_type: str) -> None:
    x = torch.randn(12, 37)
    whole = add_noise(x, 0.1, noise_type, seed=4)
    index = torch.arange(12)
    for rows in (slice(0, 5), slice(5, 12), torch.tensor([11, 3, 4, 0])):  # cut, spread, shuffled
        assert same_bits(add_noise(x[rows], 0.1, noise_type, seed=4, token_index=index[rows]), whole[rows])
    padded = torch.randn(2, 9, 37)
    padded[0, 4:], padded[1, 2:] = x[:5], x[5:]  # two sequences, padded on the left
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, :4] = keep[1, :2] = False
    at = torch.zeros(2, 9, dtype=torch.int64)
    at[keep] = index
    for options in ({"keep": keep, "token_index": at}, {"token_index": torch.where(keep, at, -1)}, {"keep": keep}):
        noised = add_noise(padded, 0.1, noise_type, seed=4, **options)
        assert same_bits(noised[keep], whole)
        assert same_bits(noised[~keep], padded[~keep])
    far = add_noise(x[:1], 0.1, noise_type, seed=4, token_index=torch.tensor([2**33]))
    assert not torch.equal(far - x[:1], whole[:1] - x[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("noise_type", ["uniform", "normal"])
def test_scales_are_one_factor_per_row(noise_type: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 37).to(dtype)
    scale = torch.rand(4, 3) * 3
    scale[1, 1] = 0
    work = torch.float64 if dtype == torch.float64 else torch.float32
    z = add_noise(torch.zeros(4, 3, 37, dtype=work), 1.0, noise_type, seed=9)
    e = torch.tensor(0.1, dtype=work) * scale.to(work)
    noised = add_noise(x, 0.1, noise_type, seed=9, scale=scale)
    assert noised.dtype == dtype
    assert same_bits(noised, (x.to(work) + e[..., None] * z).to(dtype))
    assert same_bits(noised[1, 1], x[1, 1])
    table, ids = torch.randn(11, 37).to(dtype), torch.randint(0, 11, (4, 3))
    clean, looked_up = embedding_noise(table, ids, 0.1, noise_type, seed=9, scale=scale)
    assert same_bits(clean, table[ids])
    assert same_bits(looked_up, add_noise(table[ids], 0.1, noise_type, seed=9, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
# Within four numbers; rows that start inside them; whole and single rounds of a warp and a rest; several tasks, which
# Triton, whose interpreter is slow, knows nothing of.
@pytest.mark.parametrize("width", [1, 6, 785, 1400, 5000 if CPU_BACKENDS == ("triton",) else 40_000])
def test_scaled_uniform_noise_is_the_same_bits_everywhere(backend: str, width: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(width)
    x, scale = torch.randn(5, width, generator=g).to(dtype), torch.rand(5, generator=g) * 3
    scale[4] = 0
    at = torch.tensor([3, -1, 7, 2**34, 1])
    ids = torch.tensor([[4, 0], [2, 2]])
    for options in ({}, {"token_index": at}, {"keep": at != 7, "token_index": at}):
        options |= {"seed": 2, "scale": scale, "out_dtype": torch.bfloat16}
        here = add_noise(x, 0.1, **options)
        clean, looked_up = embedding_noise(x, ids, 0.1, seed=2, scale=scale[ids], token_index=at[ids])
        with fastpost.use_backend("reference"):
            assert same_bits(here, add_noise(x, 0.1, **options))
            assert same_bits(looked_up, embedding_noise(x, ids, 0.1, seed=2, scale=scale[ids], token_index=at[ids])[1])
        assert same_bits(clean, x[ids])
        assert same_bits(here[4], x[4].to(torch.bfloat16))


@pytest.mark.parametrize("noise_type", NOISE_TYPES)
def test_scaled_noise_is_its_equation(backend: str, noise_type: str) -> None:
    x, scale, at = torch.randn(6, 1031), torch.rand(6) * 3, torch.tensor([5, 0, -1, 9, 2, 1])
    z = torch.zeros(6, 1031, dtype=torch.float64)
    with fastpost.use_backend("reference"):
        z[at >= 0] = numbers(10 * 1031, noise_type, 7, torch.float64).reshape(10, 1031)[at[at >= 0]]
    exact = x.double() + 0.1 * scale.double()[:, None] * z
    found = add_noise(x, 0.1, noise_type, seed=7, scale=scale, token_index=at)
    # Rounded: 0.1, its product with the scale, z itself, the product with it, the sum.
    within = (NORMAL_ULPS + 3) * 2**-23 * 0.1 * scale.double()[:, None] * z.abs().clamp(min=1) + 2**-24 * exact.abs()
    assert bool(((found.double() - exact).abs() <= within).all())
    assert same_bits(found[2], x[2])


def test_strided_and_16_bit_scales(backend: str) -> None:
    x, scale = torch.randn(4, 33), torch.rand(4, 2)[:, 1]
    assert same_bits(add_noise(x, 0.1, seed=1, scale=scale), add_noise(x, 0.1, seed=1, scale=scale.contiguous()))
    half = scale.bfloat16()
    assert same_bits(add_noise(x, 0.1, seed=1, scale=half), add_noise(x, 0.1, seed=1, scale=half.float()))
    assert add_noise(torch.zeros(4, 0), 0.1, seed=1, scale=scale).shape == (4, 0)


def test_scaled_noise_passes_gradients_on() -> None:
    x, scale = torch.randn(5, 8, requires_grad=True), torch.rand(5, requires_grad=True)
    upstream = torch.randn(5, 8)
    add_noise(x, 0.1, seed=1, scale=scale).backward(upstream)
    assert same_bits(x.grad, upstream)
    assert scale.grad is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"token_index": torch.zeros(4, dtype=torch.int64)}, ValueError, r"token_index has shape \(4,\), expected \(3,\)"),
        ({"token_index": torch.zeros(3)}, TypeError, "token_index must be int64"),
        ({"keep": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "keep is on meta, expected cpu"),
        ({"token_index": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "token_index is on meta"),
        ({"scale": torch.zeros(3, device="meta")}, ValueError, "scale is on meta, expected cpu"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale has shape \(4,\), expected \(3,\)"),
        ({"scale": torch.zeros(3, dtype=torch.int64)}, TypeError, "scale must be floating point"),
    ],
)
def test_indices_and_scales_that_do_not_fit(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_noise(torch.zeros(3, 8), **options)
    with pytest.raises(error, match=message):
        embedding_noise(torch.zeros(5, 8), torch.zeros(3, dtype=torch.int64), **options)
