"""Parameter-list operations against float64 written from the equations, and against each other bit by bit."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpost
from fastpost import plan
from fastpost.backends import native, reference
from fastpost.ops import params as ops

from .conftest import CPU_BACKENDS, DTYPES, bits, same_bits

# Lengths around vector widths, blocks, chunks (65,536 elements) and nothing at all.
LENGTHS = [0, 1, 7, 31, 33, 1000, 1025, 65535, 65536, 65537, 140001]
if CPU_BACKENDS == ("triton",):  # the interpreter is slow: one tensor of two chunks
    LENGTHS = [0, 1, 7, 31, 33, 1000, 1025, 2048, 65537]


def lists(dtype: torch.dtype, scale: float = 0.02, lengths: list[int] = LENGTHS) -> tuple[list[Tensor], list[Tensor]]:
    weights = [(torch.randn(n) * scale).to(dtype) for n in lengths]
    return weights, [torch.randn(n).to(dtype) for n in lengths]


def flat64(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def perturb(weights: list[Tensor], grads: list[Tensor], rho: float, eta: float | None = None, **options: object):
    stash = [torch.empty_like(w) for w in weights]
    squared = ops.squared_norm(grads, weights if eta is not None else None, eta=eta or 0.0)
    sums = ops.sam_perturb_(weights, grads, stash, squared, rho=rho, adaptive=eta is not None, eta=eta or 0.0, **options)
    return stash, dict(zip(ops.NAMES_OF_SUMS, sums.tolist(), strict=True))


# float64 is the reference's alone.
SERVED = [(name, dtype) for name in CPU_BACKENDS for dtype in DTYPES]
SERVED += [("reference", torch.float64)] if "reference" in CPU_BACKENDS else []


@pytest.mark.parametrize(("backend", "dtype"), SERVED, indirect=["backend"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_squared_norm_is_right_to_the_last_digits(backend: str, dtype: torch.dtype, eta: float | None) -> None:
    weights, grads = lists(dtype)
    g = flat64(grads)
    truth = math.fsum(((g if eta is None else (flat64(weights).abs() + eta) * g) ** 2).tolist())
    got = ops.squared_norm(grads, None if eta is None else weights, eta=eta or 0.0)
    assert got.dtype == torch.float64
    assert abs(got.item() - truth) <= 1e-13 * truth


@pytest.mark.parametrize(("backend", "dtype"), [case for case in SERVED if case[0] != "triton"], indirect=["backend"])
def test_chunk_squares_are_what_squared_norm_adds_up(backend: str, dtype: torch.dtype) -> None:
    _, grads = lists(dtype)
    turned, gaps = torch.randn(3, 70_000).t().to(dtype), torch.randn(6, 4).to(dtype)[:, ::2]
    in_memory = [*grads, turned.t(), gaps, torch.ones(0)]  # in the order in which elements lie
    given = [*grads, turned, gaps, torch.ones(0, dtype=dtype)]
    if backend != "reference":  # which alone walks what has gaps
        del given[-2], in_memory[-2]
    for g, order, sums in zip(given, in_memory, ops.chunk_squares(given), strict=True):
        truth = [math.fsum((chunk**2).tolist()) for chunk in order.double().flatten().split(65_536) if chunk.numel()]
        assert sums.tolist() == pytest.approx(truth, rel=1e-13)
        assert same_bits(ops.chunk_squares([g])[0], sums)
    if backend == "cpu":
        one_by_one = torch.cat(ops.chunk_squares(grads)).cumsum(0)[-1]
        assert same_bits(one_by_one, ops.squared_norm(grads))


def test_squared_norm_holds_over_the_whole_range_of_float(backend: str) -> None:
    for size in (1e-42, 1e-30, 1e18, 3e38):
        g = [torch.full((1000,), size)]
        truth = 1000 * float(g[0][0]) ** 2
        assert ops.squared_norm(g).item() == pytest.approx(truth, rel=1e-13), size


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 65536, 140000])
def test_squared_norm_is_not_finite_only_when_an_element_is_not(backend: str, bad: float, at: int) -> None:
    for dtype in DTYPES:
        g = torch.full((140001,), 6e4).to(dtype)
        assert math.isfinite(ops.squared_norm([g]).item())
        g[at] = bad
        assert not math.isfinite(ops.squared_norm([g]).item())


@pytest.mark.parametrize(("backend", "dtype"), SERVED, indirect=["backend"])
def test_squared_distance_is_right_to_the_last_digits_and_writes_nothing(backend: str, dtype: torch.dtype) -> None:
    weights, other = lists(dtype)
    for step in (1e-3, 1.0):  # neighbours, whose difference a float holds, and strangers
        stash = [(w.double() + step * g.double()).to(dtype) for w, g in zip(weights, other, strict=True)]
        held = [bits(t).clone() for t in (*weights, *stash)]
        truth = math.fsum(((flat64(weights) - flat64(stash)) ** 2).tolist())
        got = ops.squared_distance(weights, stash)
        assert got.dtype == torch.float64
        assert abs(got.item() - truth) <= 1e-13 * truth
        assert all(torch.equal(a, bits(b)) for a, b in zip(held, (*weights, *stash), strict=True))
    assert ops.squared_distance(weights, [w.clone() for w in weights]).item() == 0.0


def test_squared_distance_at_the_ends_of_float(backend: str) -> None:
    for a, b in ((3e38, -3e38), (1e-42, -2e-42), (1.0, 1.0 + 2**-23)):
        w, s = torch.full((1000,), a), torch.full((1000,), b)
        truth = 1000 * (float(w[0]) - float(s[0])) ** 2
        assert ops.squared_distance([w], [s]).item() == pytest.approx(truth, rel=1e-13), (a, b)
    for a, b, check in ((math.inf, 0.0, math.isinf), (math.inf, math.inf, math.isnan), (0.0, math.nan, math.isnan)):
        w, s = torch.zeros(1000), torch.zeros(1000)
        w[999], s[999] = a, b
        assert check(ops.squared_distance([w], [s]).item()), (a, b)


@pytest.mark.parametrize(("backend", "dtype"), SERVED, indirect=["backend"])
def test_the_dot_product_is_right_to_the_last_digits_and_writes_nothing(backend: str, dtype: torch.dtype) -> None:
    a, b = lists(dtype)
    held = [bits(t).clone() for t in (*a, *b)]
    terms = (flat64(a) * flat64(b)).tolist()
    got = ops.dot(a, b)
    assert got.dtype == torch.float64
    assert abs(got.item() - math.fsum(terms)) <= 1e-13 * math.fsum(map(abs, terms))
    assert all(torch.equal(x, bits(y)) for x, y in zip(held, (*a, *b), strict=True))
    assert same_bits(ops.dot(a, a), ops.squared_norm(a))
    assert ops.dot(a, [torch.zeros_like(t) for t in a]).item() == 0.0


def test_the_dot_product_at_the_ends_of_float(backend: str) -> None:
    for x, y in ((3e38, -3e38), (1e-42, -2e-42), (1.0, 1.0 + 2**-23), (1e-30, 1e30)):
        a, b = torch.full((1000,), x), torch.full((1000,), y)
        truth = 1000 * float(a[0]) * float(b[0])
        assert ops.dot([a], [b]).item() == pytest.approx(truth, rel=1e-13), (x, y)
    for x, y, check in ((math.inf, -1.0, math.isinf), (math.inf, 0.0, math.isnan), (0.0, math.nan, math.isnan)):
        for at in (0, 999):
            a, b = torch.ones(1000), torch.ones(1000)
            a[at], b[at] = x, y
            assert check(ops.dot([a], [b]).item()), (x, y)


def test_norm_is_the_same_bits_for_any_threads_and_layout() -> None:
    weights, grads = lists(torch.float32)
    one = ops.squared_norm(grads, weights, eta=0.01)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert same_bits(one, ops.squared_norm(grads, weights, eta=0.01))
    finally:
        torch.set_num_threads(threads)
    _, moved = plan.flat_like(grads)
    for new, old in zip(moved, grads, strict=True):
        new.copy_(old)
    assert same_bits(one, ops.squared_norm(moved, weights, eta=0.01))


def everything_written() -> list[str]:
    """A digest of what the operations return and of every list after them."""
    torch.manual_seed(1234)
    found = []
    for dtype, eta in itertools.product(DTYPES, (None, 0.01)):
        weights, grads = lists(dtype)
        stash, _ = perturb(weights, grads, rho=0.5, eta=eta)
        sums = [ops.squared_norm(grads, weights, eta=eta or 0.0), ops.squared_distance(weights, stash)]
        sums.append(ops.dot(weights, grads))
        seen = [bits(w).clone() for w in weights]
        moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
        for step in (1.0, 2.0):
            steps = [torch.tensor(step) for _ in weights]
            ops.sam_restore_adamw_(weights, grads, stash, *moments, steps, lr=1e-2, weight_decay=0.1)
        sums.append(ops.negate_clip_(grads, 1.0))
        written = b"".join(bits(t).numpy().tobytes() for t in (*seen, *weights, *moments[0], *moments[1], *grads))
        found += [float(s).hex() for s in sums] + [hashlib.sha256(written).hexdigest()]
    return found


def test_the_same_bits_for_every_instruction_set() -> None:
    isas = native.core().cpu.isas().split()
    assert len(isas) > 1 or platform.machine() not in ("x86_64", "AMD64")
    expected = everything_written()
    for isa in isas:
        env = {**os.environ, "FASTPOST_CPU_ISA": isa}
        code = "from tests.test_params import *; print(native.core().cpu.isa(), *everything_written())"
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert out.stdout.split() == [isa, *expected], isa


@pytest.mark.parametrize(("backend", "dtype"), SERVED, indirect=["backend"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
@pytest.mark.parametrize("rho", [0.05, 5.0])
def test_perturb_writes_w_plus_e(backend: str, dtype: torch.dtype, eta: float | None, rho: float) -> None:
    weights, grads = lists(dtype)
    before = [w.clone() for w in weights]
    w, g = flat64(weights), flat64(grads)
    t = torch.ones_like(w) if eta is None else w.abs() + eta
    e = rho * t * t * g / math.sqrt(math.fsum(((t * g) ** 2).tolist()))
    stash, sums = perturb(weights, grads, rho, eta)
    after = flat64(weights)
    # One rounding to the dtype, and float32 arithmetic before it.
    unit = torch.finfo(dtype).eps
    allowed = (0.5 * unit + (4e-7 if dtype != torch.float64 else 1e-14)) * (w.abs() + e.abs()) + torch.finfo(
        dtype
    ).tiny * unit
    assert ((after - (w + e)).abs() <= 1.01 * allowed).all()
    assert all(same_bits(s, b) for s, b in zip(stash, before, strict=True))
    assert sums["intended_sq"] == pytest.approx((e * e).sum().item(), rel=1e-6)
    if eta is None:
        assert math.sqrt(sums["intended_sq"]) == pytest.approx(rho, rel=1e-6)
    stored = after - w
    assert sums["stored_sq"] == pytest.approx((stored**2).sum().item(), rel=1e-5)
    assert sums["stored_dot"] == pytest.approx((stored * e).sum().item(), rel=1e-5)
    assert sums["changed"] == (stored != 0).sum().item()


@pytest.mark.parametrize("seen", DTYPES)
def test_perturb_reports_what_a_cast_forward_sees(backend: str, seen: torch.dtype) -> None:
    weights, grads = lists(torch.float32)
    before = flat64([w.to(seen) for w in weights])
    w, g = flat64(weights), flat64(grads)
    e = 0.05 * g / g.norm()
    _, sums = perturb(weights, grads, 0.05, compute_dtype=seen)
    v = flat64([w.to(seen) for w in weights]) - before
    assert sums["seen_sq"] == pytest.approx((v**2).sum().item(), rel=1e-5)
    assert sums["seen_dot"] == pytest.approx((v * e).sum().item(), rel=1e-5)
    assert w.shape == e.shape


@pytest.mark.parametrize("seen", [torch.float64, torch.float8_e4m3fn, torch.int32, torch.complex64], ids=str)
def test_a_dtype_that_no_kernel_computes_in_is_refused_alike_at_every_call(backend: str, seen: torch.dtype) -> None:
    w, g, stash = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    squared, words = ops.squared_norm(g), f"must be torch.float32, torch.bfloat16 or torch.float16, .*, not {seen}; leave it"
    for _ in range(3):  # a plan is kept after two calls
        with pytest.raises(TypeError, match="sam_perturb_: compute_dtype " + words):
            ops.sam_perturb_(w, g, stash, squared, rho=0.5, compute_dtype=seen)
        assert torch.equal(w[0], torch.ones(3))
        assert torch.equal(stash[0], torch.zeros(3))
        ops.sam_perturb_(w, g, stash, squared, rho=0.5)
        ops.sam_restore_(w, stash)
        stash[0].zero_()


def test_float64_weights_are_seen_in_float64() -> None:
    w, g, stash = ([torch.ones(3, dtype=torch.float64)] for _ in range(3))
    sums = ops.sam_perturb_(w, g, stash, ops.squared_norm(g), rho=0.5, compute_dtype=torch.float64)
    assert sums[3] == sums[1]


@pytest.mark.parametrize("size", [1e-41, 1e-25, 1e25, 1e37])
def test_perturb_keeps_its_digits_for_tiny_and_huge_gradients(backend: str, size: float) -> None:
    g = [torch.linspace(0.5, 1.0, 999).mul(size)]
    w = [torch.zeros(999)]
    perturb(w, g, 0.05)
    truth = g[0].double() / g[0].double().norm() * 0.05
    assert (w[0].double() - truth).abs().max() <= 2e-7 * truth.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_moves_without_a_usable_norm(backend: str, dtype: torch.dtype) -> None:
    for spoil in (0.0, math.inf, math.nan):
        weights, grads = lists(dtype)
        for g in grads:
            g.fill_(spoil) if spoil == 0 else g[:1].fill_(spoil)
        before = [bits(w) for w in weights]
        _, sums = perturb(weights, grads, 0.05)
        assert all(torch.equal(bits(w), b) for w, b in zip(weights, before, strict=True))
        assert set(sums.values()) == {0.0}
    weights, grads = lists(dtype)
    weights[5][:2] = torch.tensor([-0.0, 0.0])
    before = [bits(w) for w in weights]
    perturb(weights, grads, 0.0)
    assert all(torch.equal(bits(w), b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_is_bitwise_over_a_thousand_rounds(backend: str, dtype: torch.dtype) -> None:
    lengths = [3, 64, 1025]
    weights, grads = lists(dtype, lengths=lengths)
    integers = weights[2].view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    special = {torch.float32: 0x7FC12345, torch.bfloat16: 0x7FC5, torch.float16: 0x7E05}[dtype]
    integers[:4] = torch.tensor(
        [special, 1, -(2 ** (8 * dtype.itemsize - 1)), 2], dtype=integers.dtype
    )  # NaN, subnormal, -0
    before = [bits(w) for w in weights]
    for _ in range(1000 if backend == "cpu" else 20):
        stash, _ = perturb(weights, grads, 0.3)
        ops.sam_restore_(weights, stash)
    assert all(torch.equal(bits(w), b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_lists_are_stashed_past_the_caches_with_the_same_result(dtype: torch.dtype) -> None:
    # 16 MB and more are written with streaming stores, whose heads and tails are peeled.
    lengths = [3, 5_000_001, 4_000_003]
    weights, grads = lists(dtype, lengths=lengths)
    odd = [torch.empty(n + 1, dtype=dtype)[1:] for n in lengths]  # misaligned by one element
    for o, w in zip(odd, weights, strict=True):
        o.copy_(w)
    before = [bits(w) for w in odd]
    stash, _ = perturb(odd, grads, 1.0)
    with fastpost.use_backend("reference"):
        perturb(weights, grads, 1.0)
    worst = (flat64(odd) - flat64(weights)).abs().max()
    assert worst <= 1e-7 if dtype == torch.float32 else worst <= torch.finfo(dtype).eps * 0.2
    ops.sam_restore_(odd, stash)
    assert all(torch.equal(bits(w), b) for w, b in zip(odd, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negate_flips_every_sign_bit_and_nothing_else(backend: str, dtype: torch.dtype) -> None:
    _, tensors = lists(dtype)
    tensors[4][:4] = torch.tensor([0.0, -0.0, math.inf, math.nan], dtype=dtype)
    before = [bits(t) for t in tensors]
    ops.negate_(tensors)
    sign = -(2 ** (8 * dtype.itemsize - 1))
    for t, b in zip(tensors, before, strict=True):
        keep = ~torch.isnan(t)  # torch's own negation is free to rewrite a NaN
        assert torch.equal(bits(t)[keep], (b ^ sign)[keep])


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_flips_agree_between_backends_and_undo_themselves(dtype: torch.dtype) -> None:
    _, tensors = lists(dtype)
    before = [bits(t) for t in tensors]
    flipped = {}
    for name in ("reference", *CPU_BACKENDS):
        with fastpost.use_backend(name):
            mine = [t.clone() for t in tensors]
            ops.flip_signs_(mine, 2**63 + 5)
            flipped[name] = [bits(t) for t in mine]
            ops.flip_signs_(mine, 2**63 + 5)
            assert all(torch.equal(bits(t), b) for t, b in zip(mine, before, strict=True))
    mine = flipped[CPU_BACKENDS[-1]]
    assert all(torch.equal(a, b) for a, b in zip(flipped["reference"], mine, strict=True))
    chosen = [a != b for a, b in zip(before, mine, strict=True)]
    assert abs(torch.cat(chosen).double().mean() - 0.5) < 0.005
    first, second = chosen[8], chosen[10][: len(chosen[8])]
    assert not torch.equal(first, second)  # each tensor of a list draws its own


def test_each_device_gets_the_seed_of_random_flips_in_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = [], reference.philox

    def philox(seed: Tensor, counter: Tensor, stream: int) -> Tensor:
        seen.append((counter.device.type, seed.device.type))
        return plain(seed, counter, stream)

    monkeypatch.setattr(reference, "philox", philox)
    with fastpost.use_backend("reference"):
        ops._flip_signs_(ops.make_buckets(grads=[torch.ones(3), torch.ones(3, device="meta")]), torch.tensor(5))
    assert sorted(seen) == [("cpu", "cpu"), ("meta", "meta")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [None, 1.0, 1e9])
def test_negate_clip(backend: str, dtype: torch.dtype, max_norm: float | None) -> None:
    _, grads = lists(dtype)
    before = flat64(grads)
    norm = ops.negate_clip_(grads, max_norm)
    assert norm.item() == pytest.approx(before.norm().item(), rel=1e-12)
    factor = -1.0 if max_norm is None else -min(1.0, max_norm / before.norm().item())
    assert (flat64(grads) - factor * before).abs().max() <= torch.finfo(dtype).eps * (factor * before).abs().max()
    if factor == -1:
        assert torch.equal(flat64(grads), -before)


def test_negate_clip_says_so_when_a_gradient_is_not_finite(backend: str) -> None:
    g = [torch.tensor([1.0, math.inf]), torch.tensor([2.0])]
    assert not math.isfinite(ops.negate_clip_(g, 1.0))
    assert g[0].tolist() == [-1.0, -math.inf]
    assert g[1].tolist() == [-2.0]


def test_negate_grads_equals_maximize(backend: str) -> None:
    w = torch.randn(1000)
    up, down = (torch.nn.Parameter(w.clone()) for _ in range(2))
    oracle = torch.optim.Adam([up], lr=1e-3, maximize=True)
    mine = torch.optim.Adam([down], lr=1e-3)
    for _ in range(5):
        for p in (up, down):
            p.grad = None
            p.square().sum().backward()
        fastpost.negate_grads_([down, torch.nn.Parameter(torch.zeros(3))])
        oracle.step()
        mine.step()
    assert same_bits(up, down)
    assert fastpost.negate_grads_([torch.nn.Parameter(torch.zeros(3))]) is None


def test_mixed_dtypes_layouts_and_empty_tensors_in_one_list(backend: str) -> None:
    if backend != "reference":
        fastpost.use_backend(None)  # float64 and gaps are what a forced backend refuses
    base = torch.randn(40, 30)
    weights = [
        torch.randn(5, 7), torch.randn(0), torch.randn(3, 4).bfloat16(), torch.randn(6).double(), torch.randn(8, 9).t(),
        base[:, ::2], torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(()),
    ]  # fmt: skip
    grads = [torch.randn_like(w) for w in weights]
    grads[4] = torch.randn(9, 8)  # same shape, other strides
    before = [w.clone() for w in weights]
    gap = base[:, 1::2].clone()
    stash, sums = perturb(weights, grads, 0.5)
    total = sum((w.double() - b.double()).square().sum() for w, b in zip(weights, before, strict=True))
    assert math.sqrt(sums["intended_sq"]) == pytest.approx(0.5, rel=1e-6)
    assert total.sqrt() == pytest.approx(0.5, rel=1e-2)
    for i in (0, 3, 4, 5, 6, 7):
        truth = grads[i].double() * (0.5 / flat64(grads).norm())
        assert (weights[i].double() - before[i].double() - truth).abs().max() < 1e-6
    ops.sam_restore_(weights, stash)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert torch.equal(base[:, 1::2], gap)  # what lies between the elements was never touched
    ops.flip_signs_(weights, 3)
    ops.flip_signs_(weights, 3)
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_spans_merge_neighbours_and_never_cross_foreign_memory() -> None:
    core = native.core()
    shapes = [(3,), (64,), (100, 7), (1,)]
    _, views = plan.flat_like([torch.empty(s) for s in shapes])
    flat = plan.Bucket(list(range(4)), grads=views)
    assert flat.native(core, core.DType.f32).spans(2) == 1
    # The same distances, but in a buffer whose gaps hold somebody else's numbers.
    mine = torch.arange(2048.0)
    gaps = [mine[a : a + n].view(s) for a, n, s in zip((0, 64, 128, 832), (3, 64, 700, 1), shapes, strict=True)]
    foreign = plan.Bucket(list(range(4)), grads=gaps)
    # (64 elements end where the next tensor starts, so those two are true neighbours.)
    assert foreign.native(core, core.DType.f32).spans(2) == 3
    ops.negate_(gaps)
    expected = torch.arange(2048.0)
    for a, n in ((0, 3), (64, 64), (128, 700), (832, 1)):
        expected[a : a + n] *= -1
    assert torch.equal(mine, expected)


def test_padding_of_a_flat_buffer_stays_zero() -> None:
    buffer, views = plan.flat_like([torch.empty(3), torch.empty(65)])
    for v in views:
        v.copy_(torch.randn_like(v))
    g = [torch.randn(3), torch.randn(65)]
    stash, _ = perturb(views, g, 0.1)
    ops.sam_restore_(views, stash)
    padding = torch.ones(buffer.numel(), dtype=torch.bool)
    padding[:3] = padding[64 : 64 + 65] = False
    assert (buffer[padding] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_any_list_perturbs_like_the_reference_and_restores(lengths: list[int], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weights, grads = lists(dtype, lengths=lengths)
    mine = [w.clone() for w in weights]
    stash, sums = perturb(mine, grads, 0.05)
    with fastpost.use_backend("reference"):
        theirs = [w.clone() for w in weights]
        _, expected = perturb(theirs, grads, 0.05)
    for a, b, w in zip(mine, theirs, weights, strict=True):
        a, b, w = a.double(), b.double(), w.double()
        # The last bit of the sum may differ, and e carries two more float32 roundings in the compiled core.
        assert (a - b).abs().le(torch.finfo(dtype).eps * (b.abs() + 2 * (b - w).abs()) + 1e-12).all()
    assert sums["intended_sq"] == pytest.approx(expected["intended_sq"], rel=1e-5, abs=1e-30)
    ops.sam_restore_(mine, stash)
    assert all(same_bits(a, w) for a, w in zip(mine, weights, strict=True))


def test_written_tensors_raise_their_version() -> None:
    w = torch.randn(5, requires_grad=True)
    y = w * w
    with torch.no_grad():
        perturb([w.detach()], [torch.randn(5)], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


A, B = torch.zeros(3), torch.zeros(3)
BAD = {
    "lengths": (lambda: ops.sam_restore_([A, B], [A]), ValueError, "2 weights but 1 stash"),
    "empty": (lambda: ops.negate_([]), ValueError, "is empty"),
    "shapes": (lambda: ops.sam_restore_([A], [torch.zeros(4)]), ValueError, r"shape \(4,\)"),
    "dtypes": (lambda: ops.sam_restore_([A], [B.half()]), ValueError, "float16"),
    "devices": (lambda: ops.sam_restore_([A], [B.to("meta")]), ValueError, "meta"),
    "integers": (lambda: ops.negate_([torch.zeros(3, dtype=torch.int32)]), TypeError, "int32"),
    "complex": (lambda: ops.negate_([torch.zeros(3, dtype=torch.complex64)]), TypeError, "complex64"),
    "no tensor": (lambda: ops.negate_([1.0]), TypeError, "float"),
    "sparse": (lambda: ops.negate_([torch.eye(3).to_sparse()]), ValueError, "sparse"),
    "expanded": (lambda: ops.negate_([torch.zeros(1).expand(3)]), ValueError, "expanded"),
    "twice": (lambda: ops.negate_([A, A]), ValueError, "same memory"),
    "max_norm": (lambda: ops.negate_clip_([A], -1.0), ValueError, "max_norm"),
    "rho": (lambda: perturb([A], [B], -0.1), ValueError, "rho"),
    "rho nan": (lambda: perturb([A], [B], math.nan), ValueError, "rho"),
    "rho inf": (lambda: perturb([A], [B], math.inf), ValueError, "rho"),
    "eta": (lambda: perturb([A], [B], 0.1, -1.0), ValueError, "eta"),
    "seed": (lambda: ops.flip_signs_([A], 2**64), ValueError, "seed"),
    "seed tensor": (lambda: ops.flip_signs_([A], torch.zeros(2)), ValueError, "seed"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error_and_writes_nothing(what: str) -> None:
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()
    assert A.eq(0).all()
    assert B.eq(0).all()
