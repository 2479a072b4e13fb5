"""Rows of a teacher's and a student's logits: each divergence against its definition in extended precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpost.dispatch import select
from fastpost.ops import linear_distillation
from fastpost.ops.linear_distillation import DistillationOptions, OutputLayer, distillation_loss_of
from fastpost.row_tasks import DistillationTask

from .conftest import CPU_BACKENDS, same_bits

if CPU_BACKENDS == ("triton",):
    pytest.skip("Triton has no such kernel", allow_module_level=True)

Array = np.ndarray
DIVERGENCES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation")
ROWS = 4
COLS = (3, 300, 5003)


def truth(
    student: Tensor, teacher: Tensor, divergence: str, beta: float = 0.5, temperature: float = 1.0
) -> tuple[Array, Array, Array]:
    """Values and both streams' gradients, from p and q as they stand and the derivatives of log-softmax.

    Written as sums of x log(x / y), whose terms cancel: extended precision leaves a value V an error of about 1e-19 / V.
    """
    b, a = (t.double().numpy().astype(np.longdouble) / np.longdouble(temperature) for t in (student, teacher))

    def log_softmax(z: Array) -> Array:
        top = z.max(-1, keepdims=True)
        return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))

    with np.errstate(divide="ignore", invalid="ignore"):
        log_p, log_q = log_softmax(a), log_softmax(b)
        p, q = np.exp(log_p), np.exp(log_q)

        def kl(x: Array, log_x: Array, log_y: Array) -> Array:
            return np.where(x > 0, x * (log_x - log_y), 0)

        # dD/dp and dD/dq of each class, as if they were free; then through the softmax.
        forward = kl(p, log_p, log_q), log_p - log_q + 1, -p / q
        reverse = kl(q, log_q, log_p), -q / p, log_q - log_p + 1
        if divergence == "forward_kl":
            terms, dp, dq = forward
        elif divergence == "reverse_kl":
            terms, dp, dq = reverse
        elif divergence == "symmetric_kl":
            terms, dp, dq = (f + g for f, g in zip(forward, reverse, strict=True))
        elif divergence == "js":
            t = np.longdouble(beta)
            m = t * p + (1 - t) * q
            terms = t * kl(p, log_p, np.log(m)) + (1 - t) * kl(q, log_q, np.log(m))
            dp, dq = t * (log_p - np.log(m)), (1 - t) * (log_q - np.log(m))
        else:
            terms, dp, dq = abs(p - q) / 2, np.sign(p - q) / 2, np.sign(q - p) / 2

        def through(x: Array, d: Array) -> Array:
            weighted = np.where(x > 0, x * d, 0)
            return (weighted - x * weighted.sum(-1, keepdims=True)) / temperature

        value, to_student, to_teacher = terms.sum(-1), through(q, dq), through(p, dp)
        if divergence in ("forward_kl", "symmetric_kl"):  # -p / q times q, where q underflows
            own = -p if divergence == "forward_kl" else np.where(q > 0, q * (log_q - log_p + 1), 0) - p
            to_student = (own - q * own.sum(-1, keepdims=True)) / temperature
        if divergence in ("reverse_kl", "symmetric_kl"):
            own = -q if divergence == "reverse_kl" else np.where(p > 0, p * (log_p - log_q + 1), 0) - q
            to_teacher = (own - p * own.sum(-1, keepdims=True)) / temperature
    return tuple(x.astype(np.float64) for x in (value, to_student, to_teacher))  # type: ignore[return-value]


def streams(cols: int, apart: float, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    student = scale * torch.randn(ROWS, cols, generator=g)
    return student, student + apart * torch.randn(ROWS, cols, generator=g)


def run(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, weights: Tensor | None = None,
    dtype: torch.dtype = torch.float32, inplace: bool = False, **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Value, cross-entropy and both gradients."""
    rows = len(student)
    student, teacher = student.clone(), teacher.clone()
    weights = torch.ones(2, rows, dtype=torch.float64) if weights is None else weights
    value, ce = torch.full((2, rows), math.nan, dtype=torch.float64)
    # Rows at a distance of their own, as the head lays them out.
    grads = [torch.full((rows, student.shape[1] + 13), math.nan, dtype=dtype)[:, : student.shape[1]] for _ in range(2)]
    if inplace:
        grads = [student, teacher]
    task = DistillationTask(
        student, teacher, labels, -100, weights[0], None if labels is None else weights[1], value, ce, *grads, **options
    )
    select("distillation_rows", student.device, student.dtype)(task)
    return value, ce, *grads


def error(got: Tensor, want: Array) -> float:
    return float(np.linalg.norm(got.double().numpy() - want) / np.linalg.norm(want))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("apart", [20.0, 1.0, 0.1, 1e-2])
@pytest.mark.parametrize("cols", COLS)
def test_values_and_gradients(backend: str, divergence: str, apart: float, cols: int) -> None:
    student, teacher = streams(cols, apart)
    value, *grads = truth(student, teacher, divergence)
    got_value, _, *got = run(student, teacher, divergence=divergence)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    for g, want in zip(got, grads, strict=True):
        assert error(g, want) < 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "symmetric_kl"])
def test_streams_that_are_close_but_for_the_class_that_one_is_sure_of(backend: str, divergence: str) -> None:
    """There the mean of log p - log q is far from nearly all of them, and gradients are what they differ by."""
    for missing_in in (0, 1):
        pair = streams(5003, 1e-5)
        for z in pair:
            z[:, 17] = 20.0
        pair[missing_in][:, 17] -= 20.0
        value, *gradients = truth(*pair, divergence)
        got, _, *found = run(*pair, divergence=divergence)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        for g, want in zip(found, gradients, strict=True):
            assert error(g, want) < 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("apart", [1e-3, 1e-4, 1e-5])
def test_close_streams_keep_their_digits(backend: str, divergence: str, apart: float) -> None:
    """There each is a multiple of the symmetric KL, up to a multiple of the difference."""
    student, teacher = streams(5003, apart)
    symmetric, _, *reference = run(student, teacher, divergence="symmetric_kl")
    np.testing.assert_allclose(symmetric, truth(student, teacher, "symmetric_kl")[0], rtol=1e-6)
    share = {"forward_kl": 1 / 2, "reverse_kl": 1 / 2, "js": 1 / 8}[divergence]
    got, _, *grads = run(student, teacher, divergence=divergence)
    np.testing.assert_allclose(got, share * symmetric, rtol=1e-6 + 3 * apart)
    for g, r in zip(grads, reference, strict=True):
        assert float((g - share * r).norm() / (share * r).norm()) < 1e-6 + 3 * apart


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.7, 10.0])
def test_temperature_leaves_the_cross_entropy_alone(backend: str, divergence: str, temperature: float) -> None:
    student, teacher = streams(1201, 2.0)
    labels = torch.tensor([3, 1200, -100, 0])
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    value, to_student, to_teacher = truth(student, teacher, divergence, temperature=temperature)
    z = student.double().requires_grad_()
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    (ce * weights[1]).sum().backward()
    w = weights[0].numpy()[:, None]
    got_value, got_ce, *got = run(student, teacher, labels, weights, divergence=divergence, temperature=temperature)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    torch.testing.assert_close(got_ce, ce.detach(), rtol=1e-6, atol=1e-7)
    assert error(got[0], w * to_student + z.grad.numpy()) < 1e-6
    assert error(got[1], w * to_teacher) < 1e-6


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("apart", [20.0, 1.0, 1e-2])
def test_beta(backend: str, beta: float, apart: float) -> None:
    student, teacher = streams(1201, apart)
    value, *grads = truth(student, teacher, "js", beta)
    got, _, *got_grads = run(student, teacher, divergence="js", beta=beta)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for g, want in zip(got_grads, grads, strict=True):
        assert error(g, want) < 2e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_are_rounded_once(backend: str, divergence: str, dtype: torch.dtype) -> None:
    if backend == "cuda" and dtype == torch.float16:
        pytest.skip("float16 operands are made of float32 gradients, whose largest has to be known")
    student, teacher = streams(5003, 1.0)
    _, _, *wide = run(student, teacher, divergence=divergence)
    _, _, *narrow = run(student, teacher, divergence=divergence, dtype=dtype)
    assert all(same_bits(n, w.to(dtype)) for n, w in zip(narrow, wide, strict=True)) or backend == "reference"
    for n, w in zip(narrow, wide, strict=True):
        torch.testing.assert_close(n.float(), w, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_in_the_logits_place(backend: str, divergence: str) -> None:
    student, teacher = streams(1201, 1.0)
    labels = torch.tensor([3, 1200, -100, 0])
    options = {"divergence": divergence, "student_cap": 30.0, "teacher_cap": 20.0, "temperature": 2.0}
    beside, inside = (run(student, teacher, labels, inplace=inplace, **options) for inplace in (False, True))
    assert all(same_bits(a, b) for a, b in zip(beside, inside, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_caps(backend: str, divergence: str) -> None:
    """Gradients of what the caps were put on."""
    student, teacher = (t.clamp(-9.5, 9.5) for t in streams(300, 1.0))
    labels = torch.tensor([3, 299, -100, 0])
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    _, _, *plain = run(student, teacher, labels, weights, divergence=divergence)
    _, _, *capped = run(student, teacher, labels, weights, divergence=divergence, student_cap=12.0, teacher_cap=10.0)
    for p, c, z, cap in zip(plain, capped, (student, teacher), (12.0, 10.0), strict=True):
        want = p.double() * (1 - (z.double() / cap) ** 2)
        assert float((c - want).norm() / want.norm()) < 3e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_rows_are_exactly_nothing(backend: str, divergence: str) -> None:
    student = streams(5003, 0.0)[0].round()
    temperature = 2.0 if backend == "reference" else 1.7  # by which the reference divides first
    for shift in (0.0, 4.0):  # which a softmax does not see, and float32 holds here
        value, _, *grads = run(student, student + shift, divergence=divergence, beta=0.3, temperature=temperature)
        assert not value.any()
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_never_negative_and_bounded(backend: str, divergence: str) -> None:
    g = torch.Generator().manual_seed(4)
    most = {"js": -0.3 * math.log(0.3) - 0.7 * math.log(0.7), "total_variation": 1.0}.get(divergence, math.inf)
    for scale in (1e-6, 1e-2, 1.0, 30.0, 300.0):
        student = torch.randn(ROWS, 40, generator=g) * max(scale, 1)
        value = run(student, student + scale * torch.randn(ROWS, 40, generator=g), divergence=divergence, beta=0.3)[0]
        assert bool((value >= 0).all())
        assert bool((value <= most).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_has_no_weight_is_not_looked_at(backend: str, divergence: str) -> None:
    student, teacher = streams(300, 1.0)
    labels = torch.tensor([3, 2, 1, 0])
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    weights[:, 1] = 0
    weights[0, 3] = 0
    whole = run(student, teacher, labels, weights, divergence=divergence)
    student[1], teacher[1], teacher[3] = math.nan, math.nan, math.nan
    found = run(student, teacher, labels, weights, divergence=divergence)
    assert all(same_bits(a, b) for a, b in zip(found, whole, strict=True))
    value, ce, to_student, to_teacher = found
    assert (value[1], ce[1], value[3]) == (0, 0, 0)
    assert not to_student[1].any()
    assert not to_teacher[[1, 3]].any()
    expected = torch.softmax(student[3].double(), -1)
    expected[0] -= 1
    torch.testing.assert_close(to_student[3].double(), weights[1, 3] * expected, rtol=1e-6, atol=1e-9)


# Whether the divergence is infinite where a class is missing in the student, and in the teacher.
INFINITE = {
    "forward_kl": (True, False),
    "reverse_kl": (False, True),
    "symmetric_kl": (True, True),
    "js": (False, False),
    "total_variation": (False, False),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_that_do_not_exist(backend: str, divergence: str) -> None:
    student, teacher = streams(300, 1.0)
    student[:, 7] = teacher[:, 7] = -math.inf
    alive = torch.arange(300) != 7
    found = run(student, teacher, divergence=divergence)
    without = run(student[:, alive], teacher[:, alive], divergence=divergence)
    torch.testing.assert_close(found[0], without[0], rtol=1e-6, atol=0)
    for with_it, plain in zip(found[2:], without[2:], strict=True):
        assert not with_it[:, 7].any()
        torch.testing.assert_close(with_it[:, alive], plain, rtol=1e-5, atol=1e-9)
    for missing_in, infinite in zip(("student", "teacher"), INFINITE[divergence], strict=True):
        lacking, other = student.clone(), teacher.clone()
        (lacking if missing_in == "student" else other)[1, 5] = -math.inf
        labels = torch.tensor([3, 2, 1, 0])
        value, ce, *grads = run(lacking, other, labels, divergence=divergence)
        z = torch.nn.functional.cross_entropy(lacking.double(), labels, reduction="none")
        torch.testing.assert_close(ce, z, rtol=1e-6, atol=1e-7)
        if infinite:
            assert value[1] == math.inf
            assert all(bool(g[1].isnan().all()) for g in grads)
        else:
            want, *expected = truth(lacking[:, alive], other[:, alive], divergence)
            assert float(value[1]) == pytest.approx(want[1], rel=1e-6)
            for g, e in zip(run(lacking, other, divergence=divergence)[2:], expected, strict=True):
                assert error(g[1, alive], e[1]) < 1e-6
        assert bool(value[[0, 2, 3]].isfinite().all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_mean_nothing_stay_by_themselves(backend: str, divergence: str, bad: float) -> None:
    student, teacher = streams(300, 1.0)
    whole = run(student, teacher, divergence=divergence)
    student[1, 5], teacher[2, 6] = bad, bad
    value, _, *grads = run(student, teacher, divergence=divergence)
    assert value.isnan().tolist() == [False, True, True, False]
    for g, w in zip(grads, whole[2:], strict=True):
        assert bool(g[1:3].isnan().all())
        assert same_bits(g[[0, 3]], w[[0, 3]])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("cols", [40, 1201])
def test_nan_is_heard_of_wherever_it_lies(backend: str, divergence: str, cols: int) -> None:
    for temperature in (0.32, 2.0):
        for column in (0, cols // 2, cols - 1):
            for lacking in (0, 1):
                pair = streams(cols, 1.0)
                pair[lacking][:, column] = math.nan
                value, _, *grads = run(*pair, divergence=divergence, temperature=temperature)
                assert all(bool(found.isnan().all()) for found in (value, *grads))


# At 1 / 0.32 and 1 / 0.76 the lowest number, divided by its own scale, is rounded beyond the lowest.
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.32, 0.76, 1.0])
@pytest.mark.parametrize("cols", [300, 2000])
def test_classes_of_one_stream(backend: str, divergence: str, temperature: float, cols: int) -> None:
    """Missing in one stream, where that is finite: in passing, and the one that the other stream is sure of."""
    for missing_in, infinite in enumerate(INFINITE[divergence]):
        for sure in (None, 40.0):
            pair = streams(cols, 2.0)
            pair[missing_in][:, 5] = -math.inf
            if sure is not None:
                pair[1 - missing_in][:, 5] = sure
            value, _, *found = run(*pair, divergence=divergence, temperature=temperature)
            if infinite:
                assert bool((value == math.inf).all())
                continue
            want, *expected = truth(*pair, divergence, temperature=temperature)
            np.testing.assert_allclose(value, want, rtol=1e-6)
            # Logarithms of dozens are rounded to float32, and the gradients of streams that have hardly anything in common
            # vanish for Jensen-Shannon and total variation.
            allowed, floor = (1e-6, 0.0) if sure is None else (2e-6, 1e-7)
            for g, e in zip(found, expected, strict=True):
                assert np.linalg.norm(g.double().numpy() - e) <= allowed * np.linalg.norm(e) + floor


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "symmetric_kl"])
@pytest.mark.parametrize("lowest", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_masks_of_one_stream_that_are_finite(backend: str, divergence: str, lowest: float) -> None:
    """What is practically missing counts as little: in passing, and where the other stream is sure of it."""
    for missing_in in (k for k in (0, 1) if not INFINITE[divergence][k]):
        for part, temperature in ((slice(5, 6), 3.0), (slice(0, None, 7), 0.32)):
            for sure, shift in ((None, 0.0), (7.0, 30.0), (40.0, 30.0)):
                student, teacher = (t[:1].clone() for t in streams(5003, 1.0))
                pair = (student, teacher + shift)
                pair[missing_in][:, part] = lowest
                if sure is not None:
                    pair[1 - missing_in][:, part] = sure if missing_in else sure + shift
                want, *expected = truth(*pair, divergence, temperature=temperature)
                value, _, *found = run(*pair, divergence=divergence, temperature=temperature)
                np.testing.assert_allclose(value, want, rtol=3e-6)
                for g, e in zip(found, expected, strict=True):
                    assert np.linalg.norm(g.double().numpy() - e) <= 3e-6 * np.linalg.norm(e) + 1e-7


HEADS = (torch.float32, torch.bfloat16, torch.float16, None)  # of the operands; None: logits


@pytest.mark.parametrize("student_dtype", HEADS)
@pytest.mark.parametrize("teacher_dtype", HEADS)
def test_streams_that_both_learn_may_have_operands_of_two_dtypes(
    backend: str, monkeypatch: pytest.MonkeyPatch, student_dtype: torch.dtype | None, teacher_dtype: torch.dtype | None
) -> None:
    """As on GPUs, which multiply 16-bit operands as they are."""
    monkeypatch.setattr(linear_distillation, "operand_dtype", lambda weight, *hidden: weight.dtype)
    layers, logits = [], []
    for dtype in (student_dtype, teacher_dtype):
        x, w = (t.to(dtype or torch.float32) for t in (torch.randn(6, 8), torch.randn(1100, 8)))
        given = (x.float() @ w.float().t(),) if dtype is None else (x, w)
        layers.append(OutputLayer(*(t.requires_grad_() for t in given)))
        logits.append(x.detach().double() @ w.detach().double().t())
    options = DistillationOptions(temperature=2.0, reduction="sum", grad="both")
    distillation_loss_of("test", *layers, None, options).loss.backward()
    _, *expected = truth(*logits, "forward_kl", temperature=2.0)
    for layer, to_logits in zip(layers, expected, strict=True):
        allowed = 2e-6 if layer.hidden.dtype == torch.float32 else 1e-2
        if layer.weight is None:
            want = [to_logits]
        else:
            x, w = (t.detach().double().numpy() for t in (layer.hidden, layer.weight))
            want = [to_logits @ w, to_logits.T @ x]
        for tensor, gradient in zip(layer.tensors, want, strict=False):
            assert tensor is not None
            assert tensor.grad is not None
            assert error(tensor.grad, gradient) < allowed


def test_gradients_of_two_dtypes_are_refused_before_anything_is_written(backend: str) -> None:
    """By kernels, which write both streams' in one."""
    student, teacher = streams(300, 1.0)
    value = torch.full((ROWS,), math.nan, dtype=torch.float64)
    for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        grads = [torch.full_like(student, math.nan, dtype=dtype) for dtype in dtypes]
        task = DistillationTask(student, teacher, None, -100, torch.ones_like(value), None, value.clone(), None, *grads)
        distil = select("distillation_rows", student.device, student.dtype)
        if backend == "reference":
            distil(task)
            assert not any(bool(g.isnan().any()) for g in grads)
            continue
        with pytest.raises(ValueError, match="gradients of float32 and bfloat16: a kernel writes them in one dtype"):
            distil(task)
        assert all(bool(found.isnan().all()) for found in (task.value_out, *grads))


def test_labels_outside_have_no_cross_entropy() -> None:
    student, teacher = streams(300, 1.0)
    value, ce, *_ = run(student, teacher, torch.tensor([300, -1, 0, 1]))
    assert ce.isnan().tolist() == [True, True, False, False]
    assert bool(value.isfinite().all())
