"""How Triton kernels are launched: numbers as a device gets them, grids of any size, tables that are kept, no fusing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed here")

import triton.language as tl  # noqa: E402

import fastpost  # noqa: E402
from fastpost import dispatch, plan  # noqa: E402
from fastpost.backends import triton as triton_backend  # noqa: E402
from fastpost.ops import params as ops  # noqa: E402
from fastpost.triton_kernels import launch  # noqa: E402
from fastpost.triton_kernels.launch import in_two_floats, launches  # noqa: E402

from . import interpreter  # noqa: E402
from .conftest import bits, same_bits  # noqa: E402

interpreted = pytest.mark.skipif(not interpreter.enabled(), reason="runs with TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with fastpost.use_backend("triton" if interpreter.enabled() else None):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]:
    """Name, grid, arguments and options of every launch."""
    from triton.runtime.interpreter import GridExecutor

    seen: list[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
    plain = GridExecutor.__call__

    def watched(self: Any, *arguments: Any, **named: Any) -> Any:
        seen.append((self.fn.__name__, self.grid, arguments, named))
        return plain(self, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", watched)
    return seen


# -- numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [0.01, 0.1, 1.0 / 3.0, 1e-7, 0.0, 1.0, 123456.789, -0.3])
def test_two_floats_hold_what_one_cannot(x: float) -> None:
    high, low = in_two_floats(x)
    assert all(torch.tensor(part, dtype=torch.float32).item() == part for part in (high, low))
    assert abs(high + low - x) <= 2.0**-48 * abs(x)
    assert high == torch.tensor(x, dtype=torch.float32).item()


@triton.jit
def _add(out, x):
    tl.store(out, tl.load(out) + x)


@interpreted
def test_the_interpreter_hands_over_numbers_as_a_device_does() -> None:
    """A number goes to a kernel in float32, and is widened there."""
    out = torch.zeros(1, dtype=torch.float64)
    _add[(1,)](out, 0.1)
    assert out.item() == torch.tensor(0.1, dtype=torch.float32).item() != 0.1
    out.zero_()
    for part in in_two_floats(0.1):
        _add[(1,)](out, part)
    assert out.item() == pytest.approx(0.1, rel=2.0**-48, abs=0)


@interpreted
@pytest.mark.parametrize("eta", [0.01, 0.3, 1e-3])
def test_etas_rounding_does_not_show_in_the_norm(eta: float, launched: list[Any]) -> None:
    """Weights of 0, where eta is all that scales a gradient: one float of it would be off by up to 6e-8, not by 1e-13."""
    g, w = torch.randn(3000), torch.zeros(3000)
    truth = math.fsum(((eta * g.double()) ** 2).tolist())
    assert abs(ops.squared_norm([g], [w], eta=eta).item() - truth) <= 1e-13 * truth
    handed = [a for _, _, arguments, _ in launched for a in arguments if isinstance(a, float)]
    assert sum(handed) == pytest.approx(eta, rel=2.0**-48, abs=0)


# -- grids ----------------------------------------------------------------------------------------------------------------


def test_launches_cover_every_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MOST_PROGRAMS", 5)
    for programs in (0, 1, 4, 5, 6, 10, 23):
        parts = list(launches(programs))
        assert [i for before, count in parts for i in range(before, before + count)] == list(range(programs))
        assert all(0 < count <= 5 for _, count in parts)


def noised(x: Tensor, **options: Any) -> Tensor:
    return fastpost.add_noise(x, 0.1, seed=3, **options)


@interpreted
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_noise_of_any_size_has_a_flat_grid(kind: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and stretches of rows along the dimension that may be long, over several launches with the same bits."""
    flat, rows = torch.randn(5000), torch.randn(3, 2050)
    keep = torch.tensor([True, False, True])
    whole = [noised(flat, noise_type=kind), noised(rows, noise_type=kind, keep=keep)]
    monkeypatch.setattr(launch, "_MOST_PROGRAMS", 2)
    parts = [noised(flat, noise_type=kind), noised(rows, noise_type=kind, keep=keep)]
    assert all(same_bits(a, b) for a, b in zip(parts, whole, strict=True))
    assert [grid for _, grid, *_ in launched] == [(5,), (9,), (2,), (2,), (1,), (2,), (2,), (2,), (2,), (1,)]


@interpreted
@pytest.mark.parametrize("cols", [7, 1030])
def test_rows_of_logits_over_several_launches(cols: int, launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, labels = torch.randn(5, cols), torch.randn(5, cols), torch.randint(0, cols, (5,))

    def results() -> list[Tensor]:
        found: list[Tensor] = []
        for divergence in (
            lambda x, y: fastpost.symmetric_kl(x, y, reduction="none"),
            lambda x, y: fastpost.js_divergence(x, y, reduction="none"),
            lambda x, y: fastpost.r3f_loss(x, y, labels).loss.reshape(1),
        ):
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            value = divergence(x, y)
            found += [value.detach(), *torch.autograd.grad((value * torch.arange(1.0, len(value) + 1)).sum(), (x, y))]
        return found

    whole = results()
    before = len(launched)
    monkeypatch.setattr(launch, "_MOST_PROGRAMS", 2)
    assert all(same_bits(x, y) for x, y in zip(results(), whole, strict=True))
    assert {grid for _, grid, *_ in launched[:before]} == {(5,)}
    assert {grid for _, grid, *_ in launched[before:]} == {(2,), (1,)}


# -- fusing ---------------------------------------------------------------------------------------------------------------


@interpreted
def test_no_compiler_fuses_rows_of_logits_and_noise(launched: list[Any]) -> None:
    """Else bits depend on what else a kernel does: on whether one gradient is wanted or both, on the backend."""
    a, b = (torch.randn(3, 40, requires_grad=True) for _ in range(2))
    fastpost.symmetric_kl(a, b).backward()
    fastpost.js_divergence(a, b).backward()
    noised(torch.randn(40))
    options = {name: named for name, _, _, named in launched if "scale_rows" not in name}
    assert len(options) == 3
    assert all(named["enable_fp_fusion"] is False for named in options.values()), options


# -- tables ---------------------------------------------------------------------------------------------------------------


LENGTHS = [70_000, 0, 5, 65_536]


def bucket() -> plan.Bucket:
    weights = [torch.randn(n) for n in LENGTHS]
    grads, stash = ([torch.randn(n) for n in LENGTHS] for _ in range(2))
    return plan.Bucket([3, 1, 0, 2], weights=weights, grads=grads, stash=stash)


@interpreted
def test_a_table_is_sent_again_only_where_a_tensor_has_moved(launched: list[Any]) -> None:
    kept = bucket()

    def norm() -> tuple[Tensor, Tensor]:
        """The norm, and the table that its launch was given."""
        value = ops.run("squared_norm", kept, None)
        return value, launched[-1][2][0]

    def truth() -> float:
        return math.fsum(x for g in kept.grads for x in (g.double() ** 2).tolist())

    first, table = norm()
    assert first.item() == pytest.approx(truth(), rel=1e-13)
    again, same = norm()
    assert same is table
    assert same_bits(first, again)
    kept.grads[0].mul_(2)  # other numbers in the same place
    doubled, same = norm()
    assert same is table
    assert doubled.item() == pytest.approx(truth(), rel=1e-13)
    for move in (lambda: kept.grads.__setitem__(2, torch.randn(5)), lambda: kept.grads[2].set_(torch.randn(9)[4:])):
        move()  # another tensor, and the same one elsewhere, out of step with 16 bytes
        moved, other = norm()
        assert other is not table
        assert moved.item() == pytest.approx(truth(), rel=1e-13)
        table = other


@interpreted
def test_each_operation_finds_its_own_columns_and_streams() -> None:
    """One bucket through all of them: tables of different columns must not be taken for each other."""
    kept = bucket()
    before = [bits(w) for w in kept.weights]
    squared = ops.run("squared_norm", kept, 0.01)
    truth = math.fsum(
        x for g, w in zip(kept.grads, kept.weights, strict=True) for x in (((w.double().abs() + 0.01) * g) ** 2).tolist()
    )
    assert squared.item() == pytest.approx(truth, rel=1e-12)
    expected = [w.double() + 0.5 * g.double() / squared.sqrt() for w, g in zip(kept.weights, kept.grads, strict=True)]
    ops.run("sam_perturb_", kept, squared, 0.5, None, torch.float32)
    for w, e in zip(kept.weights, expected, strict=True):
        torch.testing.assert_close(w.double(), e, rtol=3e-7, atol=1e-9)
    distance = math.fsum(
        x for w, s in zip(kept.weights, kept.stash, strict=True) for x in ((w.double() - s.double()) ** 2).tolist()
    )
    assert ops.run("squared_distance", kept).item() == pytest.approx(distance, rel=1e-12)
    ops.run("sam_restore_", kept)
    assert all(torch.equal(bits(w), b) for w, b in zip(kept.weights, before, strict=True))
    flipped = [g.clone() for g in kept.grads]
    seed = torch.tensor(5)
    ops.run("flip_signs_", kept, seed)
    with fastpost.use_backend("reference"):
        ops.run("flip_signs_", plan.Bucket(kept.streams, grads=flipped), seed)
    assert all(same_bits(a, b) for a, b in zip(kept.grads, flipped, strict=True))


def test_a_table_says_whether_all_of_its_addresses_are_aligned() -> None:
    """An empty tensor's address is nobody's concern."""
    from fastpost.triton_kernels.params import Table

    whole = [torch.zeros(8), torch.zeros(0), torch.zeros(4)]
    table = Table([8, 0, 4], [0, 1, 2])
    cases: list[tuple[Callable[[], list[Tensor]], bool]] = [
        (lambda: whole, True),
        (lambda: [whole[0], torch.zeros(3)[1:1], whole[2]], True),
        (lambda: [whole[0], whole[1], torch.zeros(5)[1:]], False),
    ]
    for column, aligned in cases:
        assert table.point([whole, column()]).aligned is aligned
    assert table.chunks == 2
    assert table.memory.tolist()[-2:] == [0, 2]


# -- devices --------------------------------------------------------------------------------------------------------------


def test_an_operation_is_launched_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for the current device, which with several GPUs in a process may be another."""
    current = [0]

    @contextlib.contextmanager
    def device_index(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    status = {**dispatch.backends(), "triton": dispatch.BackendStatus(True, "planted")}
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    monkeypatch.setattr(triton_backend, "negate_", lambda *_, **__: current[0])
    second = torch.device("cuda", 1)
    dispatch._select.cache_clear()
    try:
        with fastpost.use_backend("triton"):
            assert dispatch.select("negate_", second, torch.float32)("a bucket") == 1
            assert current == [0]
    finally:
        dispatch._select.cache_clear()
    assert triton_backend.on_device(triton_backend.dot, torch.device("cpu")) is triton_backend.dot
