"""Noise on a GPU: the CPU tests' bodies there, bits against the CPU, sizes, streams, graphs, no waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastpost
from fastpost.errors import BackendUnavailable
from fastpost.ops.noise import add_noise, embedding_noise

from . import test_noise as bodies
from .conftest import DTYPES, same_bits
from .gpu import BACKENDS, DEVICE, ON_GPU, Captured, borrow, every, late_stream, needs_gpu, no_sync, there
from .test_noise import (  # noqa: F401  (collected here once more, on the device)
    NOISE_TYPES,
    NORMAL_ULPS,
    test_an_index_outside_the_table_reads_nothing,
    test_bad_eps,
    test_embedding_noise_is_gather_then_noise,
    test_embedding_noise_on_strided_tables,
    test_float64_is_served_by_the_reference,
    test_gradient_of_embedding_noise,
    test_gradient_passes_unchanged,
    test_input_is_not_written,
    test_layouts_empty_tensors_scalars_and_special_values,
    test_moments_of_normal_noise,
    test_moments_of_uniform_noise,
    test_noise_as_small_as_floats_can_be,
    test_noise_belongs_to_the_token_wherever_it_lies,
    test_rows_without_noise_are_left_alone_and_not_counted,
    test_scaled_noise_is_its_equation,
    test_scaled_noise_passes_gradients_on,
    test_scales_are_one_factor_per_row,
    test_seeds,
    test_strided_and_16_bit_scales,
    test_sum_and_product_are_rounded_separately,
    test_uniform_numbers_are_the_generators_top_bits,
)

pytestmark = needs_gpu


@pytest.fixture(autouse=True)
def _borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    borrow(monkeypatch, bodies)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpost.use_backend(request.param):
        yield request.param


def on_the_cpu(function: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    """What the reference makes of the same inputs."""
    home = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    kwargs = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with fastpost.use_backend("reference"):
        return function(*home, **kwargs)


# -- the same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_noise_is_the_cpus_bits(backend: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    (x,) = there((torch.randn(37, 1031) * 0.1).to(dtype))
    (keep,) = there(torch.rand(37) < 0.7)
    index, scale = there(torch.randperm(37) * 3 - 20, torch.rand(37) * 2)
    for options in ({}, {"keep": keep}, {"scale": scale}, {"keep": keep, "token_index": index, "scale": scale}):
        got = add_noise(x, 0.037, seed=-5, out_dtype=out_dtype, **options)
        assert same_bits(got.cpu(), on_the_cpu(add_noise, x, 0.037, seed=-5, out_dtype=out_dtype, **options))
    assert float((got.double() - x.double()).abs().max()) > 0.03


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_uniform_noise_is_the_same_bits_everywhere(backend: str, dtype: torch.dtype) -> None:
    every(bodies.test_scaled_uniform_noise_is_the_same_bits_everywhere, backend=backend, dtype=dtype)


@pytest.mark.parametrize("offset", [1, 2, 7])
def test_bits_do_not_depend_on_the_address(backend: str, offset: int) -> None:
    (x,) = there(torch.randn(200_001))
    shifted = torch.empty(len(x) + offset, device=DEVICE)[offset:].copy_(x)
    for kind in NOISE_TYPES:
        assert same_bits(add_noise(shifted, 0.1, kind, seed=3), add_noise(x, 0.1, kind, seed=3))


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_normal_noise_is_within_its_bound_of_float64(backend: str, seed: int) -> None:
    n = 1 << 21 if ON_GPU or backend != "triton" else 1 << 14
    exact = on_the_cpu(add_noise, torch.zeros(n, dtype=torch.float64), 1.0, "normal", seed=seed)
    error = (bodies.numbers(n, "normal", seed).cpu().double() - exact).abs()
    assert float((error / exact.abs().clamp(min=1)).max()) <= NORMAL_ULPS * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_noise_is_the_cpus_bits(backend: str, dtype: torch.dtype) -> None:
    table, ids, keep = there(torch.randn(50, 33).to(dtype), torch.randint(0, 50, (3, 21)), torch.rand(3, 21) < 0.7)
    clean, noised = embedding_noise(table, ids, 0.1, seed=8, keep=keep)
    assert same_bits(clean, table[ids])
    home = on_the_cpu(lambda *a, **k: embedding_noise(*a, **k)[1], table, ids, 0.1, seed=8, keep=keep)
    assert same_bits(noised.cpu(), home)


# -- sizes beyond 2^31 ----------------------------------------------------------------------------------------------------


def place(row: int, width: int, seed: int) -> Tensor:
    """The noise of row number `row`, alone, from the operation's own way of placing rows; on the CPU."""
    with fastpost.use_backend("reference"):
        return torch.ops.fastpost.add_noise(
            torch.zeros(1, width), 1.0, "uniform", torch.tensor(seed), torch.tensor([row]), None, torch.float32
        )


def test_rows_are_placed_where_their_number_says() -> None:
    """The helper itself, on the CPU."""
    with fastpost.use_backend("cpu"):
        whole = add_noise(torch.zeros(40, 8), 1.0, seed=11)
    assert same_bits(whole[37:38], place(37, 8, 11))


@pytest.mark.parametrize("gigabytes", [20], indirect=True)
def test_more_elements_than_32_bits_count(backend: str, gigabytes: float) -> None:
    n = 2**31 + 8
    noised = add_noise(torch.zeros(n, dtype=torch.bfloat16, device=DEVICE), 1.0, seed=11)
    for row in (0, 2**28 - 1, 2**28):
        assert same_bits(noised[row * 8 : row * 8 + 8].cpu(), place(row, 8, 11).bfloat16()[0])
    assert not any(bool((part == 0).all()) for part in noised.split(1 << 24))


@pytest.mark.parametrize("gigabytes", [12], indirect=True)
def test_a_table_beyond_32_bits(backend: str, gigabytes: float) -> None:
    rows, width = 2**20 + 3, 2**11
    table = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    table[-1] = 5
    table[2**20] = 4
    (ids,) = there(torch.tensor([rows - 1, 0, 2**20]))
    clean, noised = embedding_noise(table, ids, 0.0, seed=1)
    assert clean[:, 0].tolist() == clean[:, -1].tolist() == [5, 0, 4]
    assert same_bits(clean, noised)


# -- streams, graphs ------------------------------------------------------------------------------------------------------


def both(x: Tensor, table: Tensor, ids: Tensor, keep: Tensor, seed: int | Tensor | None) -> tuple[Tensor, ...]:
    return (
        add_noise(x, 0.1, seed=seed),
        add_noise(x, 0.1, "normal", seed=seed, keep=keep),
        *embedding_noise(table, ids, 0.1, seed=seed, keep=keep),
    )


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    x, table, ids, keep = there(
        torch.randn(40, 300), torch.randn(50, 300), torch.randint(0, 50, (40,)), torch.rand(40) < 0.5
    )
    return x, table, ids, keep


def test_runs_on_the_current_stream(backend: str) -> None:
    source = inputs()
    expected = both(*source, seed=3)
    used = tuple(torch.zeros_like(t) for t in source)
    with late_stream():
        for new, old in zip(used, source, strict=True):
            new.copy_(old)
        got = both(*used, seed=3)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_waits_for_the_device(backend: str) -> None:
    used = inputs()
    table = used[1].clone().requires_grad_()
    both(*used, seed=None)  # compiles
    with no_sync():
        for seed in (None, 3, torch.full((), 3, dtype=torch.int64, device=DEVICE)):
            both(*used, seed=seed)
        clean, noised = embedding_noise(table, used[2], 0.1)
        (clean + noised).sum().backward()


def test_captured_and_replayed_on_other_numbers(backend: str) -> None:
    used = inputs()
    seed = torch.full((), 3, dtype=torch.int64, device=DEVICE)
    graph = Captured(lambda: both(*used, seed=seed))
    used[0].mul_(-3)
    seed.fill_(4)
    got = graph.replay()
    assert all(same_bits(a, b) for a, b in zip(got, both(*used, seed=4), strict=True))


def test_a_graph_draws_anew_at_every_replay(backend: str) -> None:
    """Without a seed one is drawn on the device, from torch's generator, which graphs advance."""
    (x,) = there(torch.zeros(1000))
    graph = Captured(lambda: add_noise(x, 1.0))
    first, second = graph.replay().clone(), graph.replay().clone()
    assert float(first.abs().max()) > 0.9
    assert not torch.equal(first, second)


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_GPU, reason="on the CPU it is an error, raised at once")
def test_a_bad_index_gives_nan_or_an_error_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    table, ids = torch.zeros(5, 3, device=DEVICE), torch.tensor([0, 5, 4], device=DEVICE)
    with no_sync():
        clean, _ = embedding_noise(table, ids)
    assert clean.isnan().all(1).tolist() == [False, True, False]
    monkeypatch.setenv("FASTPOST_CHECKS", "1")
    with pytest.raises(IndexError, match="index 5 is outside a table of 5 rows"):
        embedding_noise(table, ids)


@pytest.mark.skipif(not ON_GPU, reason="about the GPU's own errors")
def test_errors_name_devices_and_backends() -> None:
    table, ids = torch.zeros(5, 3, device=DEVICE), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="ids are on cpu, the table on cuda"):
        embedding_noise(table, ids)
    for name in BACKENDS:
        with fastpost.use_backend(name), pytest.raises(BackendUnavailable, match="float64"):
            add_noise(table.double())
    with fastpost.use_backend("cuda"), pytest.raises(BackendUnavailable, match="not cpu"):
        add_noise(table.cpu())
    with fastpost.use_backend("cpu"), pytest.raises(BackendUnavailable, match="use_backend"):
        add_noise(table)
