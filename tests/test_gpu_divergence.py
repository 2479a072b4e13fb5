"""Rows of logits on a GPU: the CPU tests' bodies there, accuracy, sizes, memory, streams, graphs, no waiting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpost
from fastpost.errors import BackendUnavailable
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from fastpost.ops.jensen_shannon import js_divergence
from fastpost.ops.reductions import KL_REDUCTIONS

from . import oracles
from . import test_divergence as bodies
from .conftest import DTYPES, same_bits
from .gpu import (
    BACKENDS,
    DEVICE,
    ON_GPU,
    Captured,
    borrow,
    every,
    late_stream,
    needs_gpu,
    no_sync,
    peak_bytes,
    there,
)
from .test_divergence import (  # noqa: F401  (collected here once more, on the device)
    test_a_confident_label_keeps_its_digits,
    test_a_constant_between_the_streams_changes_nothing,
    test_a_nan_of_any_payload_stays_one,
    test_all_labels_ignored,
    test_backward_twice,
    test_fairseq_criteria,
    test_float16_gradients_are_made_under_the_loss_scale,
    test_float64_is_exact,
    test_fresh_gradients_are_written_everywhere,
    test_half_precision_rounds_once,
    test_huge_logits_stay_finite,
    test_identical_rows_are_exactly_zero,
    test_inplace,
    test_inplace_is_seen_by_other_users,
    test_inplace_refusals,
    test_inplace_through_views_of_one_batch,
    test_lambda_zero_is_cross_entropy,
    test_layouts,
    test_minus_infinity,
    test_nan_and_infinity_propagate,
    test_never_negative_and_symmetric,
    test_no_grad_writes_nothing,
    test_nothing_counts,
    test_one_stream_wants_a_gradient,
    test_padding_changes_nothing,
    test_r3f_inplace,
    test_r3f_loss,
    test_reductions,
    test_scales_as_the_square_of_the_noise,
    test_smoothing_keeps_its_digits_whatever_is_added_to_all_logits,
    test_value_and_gradients,
)

pytestmark = needs_gpu
ROWS = bodies.ROWS if ON_GPU else {2: 20, 33: 10, 1500: 2}


@pytest.fixture(autouse=True)
def _borrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    borrow(monkeypatch, bodies)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastpost.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_accuracy(backend: str, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the contract: values and gradients to 1e-6; also a constant 100 apart."""
    if backend == "reference":
        pytest.skip("the specification itself is not held to this table")
    monkeypatch.setattr(bodies, "ROWS", ROWS)
    wrong = {where: errors for where, errors in bodies.worst_errors(shift).items() if not all(e <= 1e-6 for e in errors)}
    assert wrong == {}


@pytest.mark.parametrize("move", [bodies.outlier, bodies.off_centre, bodies.all_but_one, bodies.two_camps])
def test_rows_that_ask_for_care(backend: str, move: Callable[[Tensor], Tensor]) -> None:
    every(bodies.test_rows_that_ask_for_care, backend=backend, move=move)


@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_rows(backend: str, dtype: torch.dtype) -> None:
    every(bodies.test_awkward_rows, backend=backend, dtype=dtype)
    every(bodies.test_no_rows, backend=backend, dtype=dtype)


@pytest.mark.parametrize("cols", [33, 1300, 50256, 50257])
def test_rows_are_the_same_bits_alone_and_in_any_batch(backend: str, cols: int) -> None:
    """A grid of one block and of many, again and again; wide rows where they start on 16 bytes."""
    a, b = there(*bodies.streams(300 if ON_GPU else 6, cols, 0.1))
    values = symmetric_kl(a, b, reduction="none")
    _, grads = bodies.gradients(symmetric_kl, a, b, reduction="sum")
    for rows in (slice(None), slice(0, 1), slice(3, 4), slice(len(a) - 1, None)):
        assert same_bits(symmetric_kl(a[rows], b[rows], reduction="none"), values[rows])
        _, again = bodies.gradients(symmetric_kl, a[rows], b[rows], reduction="sum")  # on copies, aligned anew
        if cols != 50257 or rows.start in (None, 0):
            assert all(same_bits(x, y[rows]) for x, y in zip(again, grads, strict=True))


# -- sizes beyond 2^31 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gigabytes", [40], indirect=True)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_that_cross_32_bits(backend: str, inplace: bool, gigabytes: float) -> None:
    """16,750 tokens of a vocabulary of 128,256: the rows on both sides of element 2^31 against the equations."""
    rows, cols = 16_750, 128_256
    crossing = 2**31 // cols
    at = [0, 1, crossing - 1, crossing, crossing + 1, rows - 1]
    torch.manual_seed(3)
    leaf = torch.randn(2, rows, cols, dtype=torch.bfloat16, device=DEVICE)
    kept = leaf[:, at].cpu()
    expected, *expected_grads = oracles.divergence(kept[0], kept[1])
    a, b = (leaf[i].detach().requires_grad_() if not inplace else leaf[i].requires_grad_() * 1 for i in (0, 1))
    value = symmetric_kl(a, b, reduction="none", inplace=inplace)
    np.testing.assert_allclose(value[at].detach().cpu().double().numpy(), expected, rtol=1e-6)
    grads = torch.autograd.grad(value.sum(), (a, b))
    for got, want in zip(grads, expected_grads, strict=True):
        error = np.abs(got[at].cpu().double().numpy() - want)
        assert np.all(error <= 2.0**-8 * 1.01 * np.abs(want) + 1e-6 * np.abs(want).max())
        assert all(bool(part.isfinite().all()) for part in got.split(2048))


# -- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_allocates_nothing_of_the_logits_size(
    backend: str, dtype: torch.dtype, record_property: pytest.RecordProperty
) -> None:
    if backend == "reference":
        pytest.skip("the specification allocates as it likes")
    rows, cols = (512, 50257) if ON_GPU else (64, 5000)
    sources = [t.to(dtype).requires_grad_() for t in there(*bodies.streams(rows, cols, 1.0))]

    def step(inplace: bool) -> int:
        x, y = (t * 1 for t in sources)
        return peak_bytes(lambda: torch.autograd.grad(symmetric_kl(x, y, inplace=inplace), (x, y)))

    step(True)  # compiles
    inplace, fresh = step(True), step(False)
    record_property("bytes per logit in place", inplace / rows / cols)
    record_property("bytes per logit with fresh gradients", fresh / rows / cols)
    assert inplace <= rows * cols * dtype.itemsize / 16
    assert fresh <= rows * cols * dtype.itemsize * (2 + 1 / 16)
    with torch.no_grad():
        assert peak_bytes(lambda: symmetric_kl(*sources)) <= rows * cols * dtype.itemsize / 16


# -- streams, graphs, the compiler ----------------------------------------------------------------------------------------


def training(a: Tensor, b: Tensor, labels: Tensor, inplace: bool = False) -> tuple[Tensor, ...]:
    """Both losses with their gradients."""
    x, y = (t.detach().clone().requires_grad_() for t in (a, b))
    out = r3f_loss(x * 1, y * 1, labels, r3f_lambda=0.7, inplace=inplace)
    kl = symmetric_kl(x * 1, y * 1, inplace=inplace)
    return (*out, kl, *torch.autograd.grad(out.loss * 3, (x, y)), *torch.autograd.grad(kl, (x, y)))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    a, b = bodies.streams(40, 1201, 0.1)
    labels = torch.randint(1201, (40,))
    labels[::7] = -100
    x, y, z = there(a, b, labels)
    return x, y, z


@pytest.mark.parametrize("inplace", [False, True])
def test_runs_on_the_current_stream(backend: str, inplace: bool) -> None:
    source = inputs()
    expected = training(*source, inplace=inplace)
    used = tuple(torch.zeros_like(t) for t in source)
    with late_stream():
        for new, old in zip(used, source, strict=True):
            new.copy_(old)
        got = training(*used, inplace=inplace)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def serves_jensen_shannon(backend: str) -> bool:
    return backend != "cuda"  # there Triton or the reference does


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_waits_for_the_device(backend: str, inplace: bool) -> None:
    a, b, labels = inputs()
    mask, items_there = labels != -100, torch.full((), 30, device=DEVICE)
    training(a, b, labels, inplace)  # compiles
    with no_sync():
        training(a, b, labels, inplace)
        for reduction in KL_REDUCTIONS:
            for m in (None, mask):
                symmetric_kl(a, b, mask=m, reduction=reduction)
                if serves_jensen_shannon(backend):
                    js_divergence(a, b, mask=m, reduction=reduction)
        for reduction in ("token", "sentence", "fairseq", "sum"):
            r3f_loss(a, b, labels, reduction=reduction)
            r3f_loss(a, b, labels, reduction=reduction, label_smoothing=0.1)
        for items in (30, items_there):
            r3f_loss(a, b, labels, num_items=items)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_no_backward_pass_waits_for_the_device(backend: str, scale: float, inplace: bool) -> None:
    a, b, labels = inputs()
    mask, items, factor = labels != -100, torch.full((), 30, device=DEVICE), torch.full((), scale, device=DEVICE)
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: r3f_loss(x, y, labels, num_items=items, inplace=inplace).loss,
        lambda x, y: r3f_loss(x, y, labels, num_items=30, inplace=inplace).loss,
        lambda x, y: r3f_loss(x, y, labels, label_smoothing=0.1, inplace=inplace).loss,
    ]
    losses += [
        functools.partial(symmetric_kl, mask=m, reduction=reduction, inplace=inplace)
        for m in (None, mask)
        for reduction in ("sum", "mean", "batchmean")
    ]
    if serves_jensen_shannon(backend):
        losses.append(lambda x, y: js_divergence(x, y, mask=mask, reduction="mean"))
    losses += [
        lambda x, y, how=reduction: r3f_loss(x, y, labels, reduction=how, inplace=inplace).loss  # type: ignore[misc]
        for reduction in ("token", "sentence", "fairseq", "sum")
    ]

    def run(loss: Callable[[Tensor, Tensor], Tensor], wants: tuple[bool, bool]) -> None:
        leaves = [t.detach().clone().requires_grad_(want) for t, want in zip((a, b), wants, strict=True)]
        value = loss(*(t * 1 for t in leaves))
        torch.autograd.grad(value, [t for t in leaves if t.requires_grad], factor)

    for loss in losses:
        for wants in ((True, True), (True, False), (False, True)):
            run(loss, wants)  # compiles
            with no_sync():
                run(loss, wants)


@pytest.mark.parametrize("inplace", [False, True])
def test_captured_and_replayed_on_other_numbers(backend: str, inplace: bool) -> None:
    used = inputs()
    graph = Captured(lambda: training(*used, inplace=inplace))
    used[0].mul_(-0.5)
    used[1].add_(used[0].flip(0))
    used[2].copy_(used[2].roll(1))
    got = graph.replay()
    assert all(same_bits(a, b) for a, b in zip(got, training(*used, inplace=inplace), strict=True))


def test_compiles_without_a_graph_break(backend: str) -> None:
    a, b, labels = inputs()

    def loss(a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
        return r3f_loss(a * 2, b * 2, labels, r3f_lambda=0.7).loss * 3 + symmetric_kl(a, b)

    expected = bodies.gradients(loss, a, b, labels)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    torch.testing.assert_close(bodies.gradients(compiled, a, b, labels), expected)


# -- errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ON_GPU, reason="on the CPU it is an error, raised at once")
def test_a_bad_label_gives_nan_or_an_error_where_asked(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, labels = inputs()
    labels[3] = 1201
    out = r3f_loss(a.requires_grad_(), b, labels)
    out.loss.backward()
    with monkeypatch.context() as strict:
        strict.setenv("FASTPOST_CHECKS", "1")
        with pytest.raises(ValueError, match="label 1201 in row 3"):
            r3f_loss(a, b, labels)
    assert math.isnan(out.task_loss.item())
    assert bool(a.grad.isfinite().all())


@pytest.mark.skipif(not ON_GPU, reason="about the GPU's own errors")
def test_errors_name_devices_and_backends() -> None:
    a, b, _ = inputs()
    with pytest.raises(ValueError, match=r"logits are on cuda:0, noised_logits on cpu"):
        symmetric_kl(a, b.cpu())
    for name in BACKENDS:
        with fastpost.use_backend(name), pytest.raises(BackendUnavailable, match="float64"):
            symmetric_kl(a.double(), b.double())
    with fastpost.use_backend("cuda"), pytest.raises(BackendUnavailable, match="not cpu"):
        symmetric_kl(a.cpu(), b.cpu())
    with fastpost.use_backend("cpu"), pytest.raises(BackendUnavailable, match="use_backend"):
        symmetric_kl(a, b)
