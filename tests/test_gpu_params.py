"""Parameter lists on a GPU: the CPU tests' bodies there, bits against the CPU, sizes, streams, graphs, no waiting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastpost
from fastpost import plan
from fastpost.backends import reference
from fastpost.errors import BackendUnavailable
from fastpost.ops import params as ops

from . import test_params as bodies
from . import test_restore_adamw, test_torch_library
from .conftest import DTYPES, bits, same_bits
from .gpu import BACKENDS, DEVICE, ON_GPU, Captured, at_home, borrow, late_stream, needs_gpu, no_sync, there
from .test_params import (  # noqa: F401  (collected here once more, on the device)
    test_any_list_perturbs_like_the_reference_and_restores,
    test_large_lists_are_stashed_past_the_caches_with_the_same_result,
    test_mixed_dtypes_layouts_and_empty_tensors_in_one_list,
    test_negate_clip,
    test_negate_clip_says_so_when_a_gradient_is_not_finite,
    test_negate_flips_every_sign_bit_and_nothing_else,
    test_negate_grads_equals_maximize,
    test_nothing_moves_without_a_usable_norm,
    test_padding_of_a_flat_buffer_stays_zero,
    test_perturb_keeps_its_digits_for_tiny_and_huge_gradients,
    test_perturb_reports_what_a_cast_forward_sees,
    test_restore_is_bitwise_over_a_thousand_rounds,
    test_squared_distance_at_the_ends_of_float,
    test_squared_norm_holds_over_the_whole_range_of_float,
    test_squared_norm_is_not_finite_only_when_an_element_is_not,
    test_the_dot_product_at_the_ends_of_float,
    test_written_tensors_raise_their_version,
)
from .test_restore_adamw import (  # noqa: F401
    test_equals_the_algorithm_in_float64,
    test_equals_the_algorithm_in_float64_over_steps,
    test_found_inf_restores_bit_for_bit_and_leaves_the_moments,
    test_gradients_are_divided_by_the_scale,
)

pytestmark = needs_gpu
SEED = 2**63 + 5
MANY = 5000 if ON_GPU else 60


@pytest.fixture(autouse=True)
def _borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    borrow(monkeypatch, bodies)
    borrow(monkeypatch, test_restore_adamw)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpost.use_backend(request.param):
        yield request.param


def lists_there(dtype: torch.dtype, lengths: list[int] = bodies.LENGTHS) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, gradients and room for a stash, the same numbers every time."""
    torch.manual_seed(7)
    weights = [(torch.randn(n) * 0.02).to(dtype).to(DEVICE) for n in lengths]
    return weights, [torch.randn(n).to(dtype).to(DEVICE) for n in lengths], [torch.empty_like(w) for w in weights]


# -- against float64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_distance_is_right_to_the_last_digits(backend: str, dtype: torch.dtype) -> None:
    bodies.test_squared_distance_is_right_to_the_last_digits_and_writes_nothing(backend, dtype)
    bodies.test_the_dot_product_is_right_to_the_last_digits_and_writes_nothing(backend, dtype)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunk_squares_are_what_squared_norm_adds_up(backend: str, dtype: torch.dtype) -> None:
    bodies.test_chunk_squares_are_what_squared_norm_adds_up(backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
def test_squared_norm_is_right_to_the_last_digits(backend: str, dtype: torch.dtype, eta: float | None) -> None:
    bodies.test_squared_norm_is_right_to_the_last_digits(backend, dtype, eta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
@pytest.mark.parametrize("rho", [0.05, 5.0])
def test_perturb_writes_w_plus_e(backend: str, dtype: torch.dtype, eta: float | None, rho: float) -> None:
    bodies.test_perturb_writes_w_plus_e(backend, dtype, eta, rho)


@pytest.mark.parametrize("dtype", DTYPES)
def test_thousands_of_tensors(backend: str, dtype: torch.dtype) -> None:
    """More than one table of addresses holds; every fifth tensor is empty."""
    lengths = [0 if i % 5 == 4 else 1 + (i * 37) % 300 for i in range(MANY)]
    weights, grads, stash = lists_there(dtype, lengths)
    before = [bits(w) for w in weights]
    g, w = (bodies.flat64(at_home(*t)) for t in (grads, weights))
    squared = ops.squared_norm(grads)
    assert squared.item() == pytest.approx(math.fsum((g * g).tolist()), rel=1e-13)
    ops.sam_perturb_(weights, grads, stash, squared, rho=3.0)
    after = bodies.flat64(at_home(*weights))
    e = 3.0 * g / g.norm()
    unit = torch.finfo(dtype).eps
    # Half a step of the dtype, and where its numbers are subnormal half the smallest of them (float16: 2^-25).
    smallest = torch.finfo(dtype).smallest_normal * unit
    assert ((after - (w + e)).abs() <= (0.51 * unit + 4e-7) * (w.abs() + e.abs()) + 0.51 * smallest).all()
    ops.sam_restore_(weights, stash)
    assert all(torch.equal(bits(a), b) for a, b in zip(weights, before, strict=True))


# -- the same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_sign_flips_are_the_cpus_bits(backend: str, dtype: torch.dtype, offset: int) -> None:
    """Random flips and negation, at addresses that are not a multiple of 16 bytes too."""
    home = [torch.randn(n).to(dtype) for n in bodies.LENGTHS]
    home[4][:4] = torch.tensor([0.0, -0.0, math.inf, math.nan], dtype=dtype)
    mine = [torch.zeros(t.numel() + offset, dtype=dtype, device=DEVICE)[offset:] for t in home]
    for m, t in zip(mine, home, strict=True):
        m.copy_(t)
    for operation in (lambda t: ops.flip_signs_(t, SEED), ops.negate_):
        operation(mine)
        with fastpost.use_backend("cpu"):
            operation(home)
        assert all(torch.equal(bits(m.cpu()), bits(t)) for m, t in zip(mine, home, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_sums_are_the_same_bits_wherever_the_tensors_lie(backend: str, dtype: torch.dtype) -> None:
    """Again, out of step with 16 bytes, and in one flat buffer.

    A last bit of one tensor's norm mostly vanishes in that of the list, so each is looked at by itself as well.
    """
    names = ("squared norm", *ops.NAMES_OF_SUMS, *(f"squared norm of {n} elements" for n in bodies.LENGTHS))

    def outcome(w: list[Tensor], g: list[Tensor], s: list[Tensor]) -> tuple[dict[str, str], Tensor]:
        """Every number that is summed, in hexadecimal, and w + e."""
        squared = ops.squared_norm(g, w, eta=0.01)
        sums = ops.sam_perturb_(w, g, s, squared, rho=0.3, adaptive=True, eta=0.01)
        written = torch.cat(w)
        ops.sam_restore_(w, s)
        each = (ops.squared_norm([b], [a], eta=0.01).item() for a, b in zip(w, g, strict=True))
        return {n: x.hex() for n, x in zip(names, (squared.item(), *sums.tolist(), *each), strict=True)}, written

    columns = lists_there(dtype)
    expected, perturbed = outcome(*columns)
    shifted = [[torch.empty(t.numel() + k, dtype=dtype, device=DEVICE)[k:].copy_(t) for t in column]
               for k, column in enumerate(columns, start=1)]  # fmt: skip
    flat = [plan.flat_like(column)[1] for column in columns]
    for new, old in zip(flat[0] + flat[1], columns[0] + columns[1], strict=True):
        new.copy_(old)
    for where, elsewhere in (("again", columns), ("1, 2 and 3 elements off", shifted), ("flat", flat)):
        got, written = outcome(*elsewhere)
        other = {name: f"{got[name]}, not {expected[name]}" for name in names if got[name] != expected[name]}
        assert not other, f"{where}: {other}"
        assert same_bits(written, perturbed), f"{where}: w + e, {int((bits(written) != bits(perturbed)).sum())} elements"


def test_restore_keeps_nan_payloads_signed_zeros_and_subnormals(backend: str) -> None:
    for dtype, patterns in ((torch.float32, [0x7FC12345, 1, -(2**31), 2]), (torch.bfloat16, [0x7FC5, 1, -(2**15), 2])):
        width = torch.int32 if dtype == torch.float32 else torch.int16
        w = torch.tensor(patterns * 300, dtype=width).to(DEVICE).view(dtype)
        before, stash = bits(w), [torch.empty_like(w)]
        ops.sam_perturb_([w], [torch.ones_like(w)], stash, torch.ones((), dtype=torch.float64, device=DEVICE), rho=0.1)
        ops.sam_restore_([w], stash)
        assert torch.equal(bits(w), before)


# -- sizes beyond 2^31 ----------------------------------------------------------------------------------------------------


def flipped(seed: int, stream: int, elements: Tensor) -> Tensor:
    """Whether elements of a tensor flip: bit e of the generator's output for (seed, stream)."""
    key = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    words = reference.philox(key, elements // 128, stream)
    word = words.gather(1, (elements % 128 // 32).unsqueeze(1)).squeeze(1)
    return (word >> (elements % 32)) & 1 == 1


def test_flips_follow_the_generator() -> None:
    """The helper itself, on the CPU."""
    x = torch.ones(1000)
    with fastpost.use_backend("cpu"):
        ops.flip_signs_([torch.ones(3), x], SEED)
    assert torch.equal(x < 0, flipped(SEED, 1, torch.arange(1000)))


@pytest.mark.parametrize("gigabytes", [20], indirect=True)
def test_more_elements_than_32_bits_count(backend: str, gigabytes: float) -> None:
    n = 2**31 + 5
    g = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    g[-1] = 3
    squared = ops.squared_norm([g])
    assert squared.item() == n + 8
    at = torch.tensor([0, 1, 2**31 - 1, 2**31, n - 1])
    ops.flip_signs_([g], SEED)
    assert torch.equal(g[at.to(DEVICE)].cpu() < 0, flipped(SEED, 0, at))
    negative = sum(int((part < 0).sum()) for part in g.split(1 << 28))
    assert abs(negative / n - 0.5) < 1e-4
    ops.flip_signs_([g], SEED)
    ops.negate_([g])
    assert all(bool((part == -1).all()) for part in g[:-1].split(1 << 28))
    assert g[-1].item() == -3

    w, stash = torch.zeros_like(g), [torch.empty_like(g)]
    rho = 16 * math.sqrt(n + 8)
    sums = ops.sam_perturb_([w], [g], stash, squared, rho=rho)
    assert all(bool((part == -16).all()) for part in w[:-1].split(1 << 28))
    assert w[-1].item() == -48
    named = dict(zip(ops.NAMES_OF_SUMS, sums.tolist(), strict=True))
    assert named["changed"] == n
    assert named["stored_sq"] == pytest.approx(rho * rho, rel=1e-5)
    ops.sam_restore_([w], stash)
    assert not any(bool(part.any()) for part in w.split(1 << 28))


# -- streams, devices, graphs ---------------------------------------------------------------------------------------------


def every_operation(seed: Tensor | int = 3) -> dict[str, Callable[[list[Tensor], list[Tensor], list[Tensor]], object]]:
    def perturb(w: list[Tensor], g: list[Tensor], s: list[Tensor]) -> Tensor:
        return ops.sam_perturb_(w, g, s, ops.squared_norm(g), rho=0.3)

    def there_and_back(w: list[Tensor], g: list[Tensor], s: list[Tensor]) -> None:
        perturb(w, g, s)
        ops.sam_restore_(w, s)

    def adamw(w: list[Tensor], g: list[Tensor], s: list[Tensor]) -> None:
        moments = [[torch.ones_like(t) for t in w] for _ in range(2)]
        steps = [torch.ones((), device=t.device) for t in w]
        torch._foreach_copy_(s, w)
        ops.sam_restore_adamw_(w, g, s, *moments, steps, lr=0.1, found_inf=torch.zeros((), device=DEVICE))

    return {
        "sam_restore_adamw_": adamw,
        "squared_norm": lambda w, g, s: ops.squared_norm(g, w, eta=0.01),
        "squared_distance": lambda w, g, s: ops.squared_distance(w, g),
        "dot": lambda w, g, s: ops.dot(w, g),
        "sam_perturb_": perturb,
        "sam_restore_": there_and_back,
        "negate_": lambda w, g, s: ops.negate_(g),
        "flip_signs_": lambda w, g, s: ops.flip_signs_(g, seed),
        "negate_clip_": lambda w, g, s: ops.negate_clip_(g),
        "negate_clip_ to a norm": lambda w, g, s: ops.negate_clip_(g, 1.0),
    }


def fill(columns: tuple[list[Tensor], ...], source: tuple[list[Tensor], ...]) -> None:
    for column, old in zip(columns, source, strict=True):
        torch._foreach_copy_(column, old)


def results(name: str, columns: tuple[list[Tensor], ...]) -> list[Tensor]:
    """What an operation returns and what it leaves in the lists."""
    value = every_operation()[name](*columns)
    return [*([value] if isinstance(value, Tensor) else []), *columns[0], *columns[1]]


@pytest.mark.parametrize("name", every_operation())
def test_runs_on_the_current_stream(backend: str, name: str) -> None:
    expected = results(name, lists_there(torch.float32))
    source = lists_there(torch.float32)
    columns = tuple([torch.zeros_like(t) for t in column] for column in source)
    with late_stream():
        fill(columns, source)
        got = results(name, columns)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", every_operation())
def test_nothing_waits_for_the_device(backend: str, name: str) -> None:
    columns = lists_there(torch.bfloat16)
    results(name, columns)  # compiles
    with no_sync():
        results(name, columns)


@pytest.mark.parametrize("name", every_operation())
def test_captured_and_replayed_on_other_numbers(name: str) -> None:
    """A graph holds addresses, not numbers. Through the compiled core: Triton's lists copy a table from the host."""
    with fastpost.use_backend("cuda" if ON_GPU else "cpu"):
        columns = lists_there(torch.float32)
        graph = Captured(lambda: every_operation(torch.full((), 3, device=DEVICE))[name](*columns))
        other = lists_there(torch.float32)
        for t in other[1]:
            t.mul_(-3)
        fill(columns, other)
        value = graph.replay()
        got = [*([value] if isinstance(value, Tensor) else []), *columns[0], *columns[1]]
        assert all(same_bits(a, b) for a, b in zip(got, results(name, other), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU, or none")
def test_a_list_over_two_devices(backend: str) -> None:
    home = [torch.randn(1000), torch.randn(70_000)]
    grads = [t.to(f"cuda:{i}") for i, t in enumerate(home)]
    assert torch.cuda.current_device() == 0
    assert ops.squared_norm(grads).item() == pytest.approx(sum((t.double() ** 2).sum().item() for t in home), rel=1e-13)
    weights, stash = [torch.zeros_like(g) for g in grads], [torch.empty_like(g) for g in grads]
    ops.sam_perturb_(weights, grads, stash, ops.squared_norm(grads), rho=1.0)
    assert sum((w.double() ** 2).sum().item() for w in weights) == pytest.approx(1.0, rel=1e-5)
    ops.sam_restore_(weights, stash)
    assert not any(bool(w.any()) for w in weights)
    assert torch.cuda.current_device() == 0


def test_a_list_over_the_gpu_and_the_cpu() -> None:
    """Mixed devices are sorted into calls; no backend is forced."""
    g = torch.randn(3000)
    mixed = [g.clone(), g.to(DEVICE) if ON_GPU else g.clone()]
    assert ops.squared_norm(mixed).item() == pytest.approx(2 * (g.double() ** 2).sum().item(), rel=1e-13)
    ops.flip_signs_(mixed, 1)
    ops.flip_signs_(mixed, 1)
    assert all(same_bits(m.cpu(), g) for m in mixed)


# -- the compiler and its checks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", test_torch_library.SAMPLES)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    borrow(monkeypatch, test_torch_library)
    for sample in test_torch_library.SAMPLES[name]():
        torch.library.opcheck(getattr(torch.ops.fastpost, name).default, sample)


def test_compiles_without_a_graph_break() -> None:
    (x,) = there(torch.randn(4097))

    def norm(x: Tensor) -> Tensor:
        return ops.squared_norm([x * 2]).sqrt()

    compiled = torch.compile(norm, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    assert compiled(x).item() == pytest.approx(norm(x).item(), rel=1e-12)


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_GPU, reason="about the GPU's own errors")
def test_errors_name_devices_and_backends() -> None:
    mine, home = torch.ones(3, device=DEVICE), torch.ones(3)
    with pytest.raises(ValueError, match=r"on cpu, but weights\[0\] is on cuda"):
        ops.sam_restore_([mine], [home])
    with fastpost.use_backend("cuda"), pytest.raises(BackendUnavailable, match="serves CUDA tensors, not cpu"):
        ops.negate_([home])
    with fastpost.use_backend("cpu"), pytest.raises(BackendUnavailable, match="use_backend"):
        ops.negate_([mine])
    for name in BACKENDS:
        with fastpost.use_backend(name), pytest.raises(BackendUnavailable, match="float64"):
            ops.negate_([mine.double()])
    assert mine.tolist() == home.tolist() == [1, 1, 1]
    ops.negate_([mine.double()])  # unforced, the reference serves it
