"""Wide rows of a teacher's and a student's logits on the CUDA core, run on the CPU: every kind of row that leaves the near
way, against each divergence's definition. What all backends promise is in test_distillation_rows.py, which runs here too; on
a GPU test_gpu_rows.py runs both.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from . import emulation
from .conftest import same_bits
from .test_cuda_rows import COLS, KINDS, plain
from .test_distillation_rows import DIVERGENCES, INFINITE, ROWS, error, run, streams, truth

pytestmark = pytest.mark.skipif(not emulation.enabled(), reason="needs CUDA_EMULATION=1, as in `make test-kernels`")

# Where the definition in extended precision has no digits left: logits whose differences overflow it, or are rounded.
BEYOND = ("the lowest everywhere", "one stream at 1e32", "ten million", "a hundred thousand, scaled")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BEYOND])
def test_kinds_of_rows(kind: str) -> None:
    student, teacher = KINDS[kind]()
    furthest = float((student - teacher).nan_to_num(0).abs().max())
    for divergence in DIVERGENCES:
        want, *gradients = truth(student, teacher, divergence)
        value, _, *found = run(student, teacher, divergence=divergence)
        assert float(value) >= 0
        assert float(value) == pytest.approx(float(want[0]), rel=1e-6, abs=2e-18)
        for got, expected in zip(found, gradients, strict=True):
            # Where log p - log q is hundreds, it is itself rounded to float32.
            allowed = 1e-6 + 2.0**-23 * furthest if kind.startswith("disagreeing") else 1e-6
            # Jensen-Shannon's are of log p - log q as a float, which may be nearly the same for nearly all classes.
            floor = 2.0**-24 * max(np.linalg.norm(g) for g in gradients) if divergence == "js" else 0
            apart = np.linalg.norm(got.double().numpy() - expected)
            assert apart <= allowed * np.linalg.norm(expected) + floor + 1e-15


@pytest.mark.parametrize("kind", BEYOND)
def test_logits_beyond_units(kind: str) -> None:
    student, teacher = KINDS[kind]()
    for divergence in DIVERGENCES:
        value, _, *found = run(student, teacher, divergence=divergence)
        assert float(value) >= 0
        assert all(bool(g.isfinite().all()) for g in found)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_everything_at_once(divergence: str, temperature: float) -> None:
    """Caps, label smoothing, weights, a label in a row's single column, one that does not count; the same bits in place."""
    student, teacher = (t.clamp(-9.5, 9.5) for t in streams(5003, 2.0))
    labels = torch.tensor([3, 5002, -100, 0])
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    options = {
        "divergence": divergence,
        "temperature": temperature,
        "smoothing": 0.1,
        "student_cap": 12.0,
        "teacher_cap": 10.0,
    }
    want, to_student, to_teacher = truth(student, teacher, divergence, temperature=temperature)
    before = (12.0 * torch.atanh(student.double() / 12.0)).requires_grad_()
    z = 12.0 * torch.tanh(before / 12.0)
    ce = F.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)
    (classified,) = torch.autograd.grad((ce * weights[1]).sum(), before)
    w = weights[0].numpy()[:, None]
    slopes = [1 - (t.double().numpy() / cap) ** 2 for t, cap in ((student, 12.0), (teacher, 10.0))]
    value, got_ce, *found = run(student, teacher, labels, weights, **options)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    torch.testing.assert_close(got_ce, ce.detach(), rtol=1e-6, atol=1e-7)
    assert error(found[0], w * to_student * slopes[0] + classified.numpy()) < 1e-6
    assert error(found[1], w * to_teacher * slopes[1]) < 1e-6
    again = run(student, teacher, labels, weights, inplace=True, **options)
    assert all(same_bits(a, b) for a, b in zip((value, got_ce, *found), again, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_is_the_same_bits_alone_and_wherever_it_lies(divergence: str) -> None:
    student, teacher = streams(4100, 1.0)
    whole = run(student, teacher, divergence=divergence)
    for row in range(ROWS):
        alone = run(student[row : row + 1], teacher[row : row + 1], divergence=divergence)
        assert all(same_bits(a[0], b[row]) for a, b in zip(alone, whole, strict=True))
    room = torch.zeros(ROWS, 4100 + 6)  # a student off its 16 bytes
    room[:, 3:-3] = student
    value, _, *found = run_where_it_is(room[:, 3:-3], teacher, divergence)
    want, *gradients = truth(student, teacher, divergence)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert all(error(g, w) < 1e-6 for g, w in zip(found, gradients, strict=True))


def run_where_it_is(student: Tensor, teacher: Tensor, divergence: str) -> tuple[Tensor, ...]:
    """Without copies of the logits, and gradients in no particular place."""
    from fastpost.dispatch import select
    from fastpost.row_tasks import DistillationTask

    value = torch.full((len(student),), math.nan, dtype=torch.float64)
    grads = [torch.full_like(student, math.nan) for _ in range(2)]
    task = DistillationTask(
        student, teacher, None, -100, torch.ones_like(value), None, value, None, *grads, divergence=divergence
    )
    select("distillation_rows", student.device, student.dtype)(task)
    return value, value, *grads


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_classes_of_one_stream_in_wide_rows(divergence: str, temperature: float) -> None:
    """Missing in one stream only: light ones, heavy ones that the block sees first, and nearly all."""
    for part in (slice(5, 6), slice(0, 3000), slice(40, None)):
        for missing_in, infinite in zip((0, 1), INFINITE[divergence], strict=True):
            pair = [t.clone() for t in plain(1.0)]
            pair[1 - missing_in][0, part] += 5.0
            pair[missing_in][0, part] = -math.inf
            student, teacher = pair
            labels = torch.tensor([30])
            value, ce, *found = run(student, teacher, labels, divergence=divergence, temperature=temperature)
            known = bool(student[0, 30] > -math.inf)
            assert float(ce) == (pytest.approx(float(F.cross_entropy(student, labels)), rel=1e-6) if known else math.inf)
            if infinite:
                assert float(value) == math.inf
                assert all(bool(g.isnan().all()) for g in found)
                continue
            want, *gradients = truth(student, teacher, divergence, temperature=temperature)
            assert float(value) == pytest.approx(float(want[0]), rel=1e-6)
            for got, expected in zip(
                run(student, teacher, divergence=divergence, temperature=temperature)[2:], gradients, strict=True
            ):
                there = np.isfinite(expected)
                apart = np.linalg.norm(got.double().numpy()[there] - expected[there])
                assert apart < 1e-6 * np.linalg.norm(expected[there]) + 1e-13


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, "nothing"])
def test_wide_rows_that_mean_nothing(divergence: str, bad: float | str) -> None:
    student, teacher = streams(COLS, 1.0)
    if isinstance(bad, str):
        student[1], teacher[2] = -math.inf, -math.inf
    else:
        student[1, 5], teacher[2, 8000] = bad, bad
    labels = torch.tensor([3, 2, 1, 0])
    value, ce, *found = run(student, teacher, labels, divergence=divergence)
    assert value.isnan().tolist() == [False, True, True, False]
    assert ce.isnan().tolist() == [False, True, False, False]
    for g in found:
        assert g.isnan().all(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_wide_rows_without_a_weight_are_not_looked_at(divergence: str) -> None:
    student, teacher = streams(2050, 1.0)
    labels = torch.tensor([3, 2, 1, 0])
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    weights[:, 1], weights[0, 3] = 0, 0
    student[1], teacher[1], teacher[3] = math.nan, math.nan, math.nan
    value, ce, to_student, to_teacher = run(student, teacher, labels, weights, divergence=divergence)
    assert (value[1], ce[1], value[3]) == (0, 0, 0)
    assert not to_student[1].any()
    assert not to_teacher[[1, 3]].any()
    expected = torch.softmax(student[3].double(), -1)
    expected[0] -= 1
    torch.testing.assert_close(to_student[3].double(), weights[1, 3] * expected, rtol=1e-6, atol=1e-9)
