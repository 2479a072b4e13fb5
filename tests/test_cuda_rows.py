"""Wide rows of logits on the CUDA core, run on the CPU: every kind of row that leaves the near way, against the equations.
On a GPU test_gpu_rows.py runs the same.

The emulation's 2^x is off by up to 2^-22 wherever it is asked, which is all that the hardware promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpost.backends import cuda
from fastpost.ops.divergence import r3f_loss, symmetric_kl
from fastpost.row_tasks import DivergenceTask

from . import emulation, oracles
from .test_divergence import gradients, relative_l2

pytestmark = pytest.mark.skipif(not emulation.enabled(), reason="needs CUDA_EMULATION=1, as in `make test-kernels`")

COLS = 9001  # rounds that are whole, one that is not, and a single column
LOWEST = torch.finfo(torch.float32).min


def noise(scale: float) -> Tensor:
    return scale * torch.randn(1, COLS)


def plain(apart: float, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    a = noise(3)
    return a, a + shift + noise(apart)


def confident(apart: float, top: float, at: int) -> tuple[Tensor, Tensor]:
    a = noise(3)
    a[0, at] = top
    return a, a + noise(apart)


def two_tops(apart: float) -> tuple[Tensor, Tensor]:
    """Hardly anything but two classes of about equal weight, far from each other."""
    a = noise(0.1)
    a[0, 100], a[0, -100] = 12.0, 11.5
    return a, a + noise(apart)


def disagreeing(top: float) -> tuple[Tensor, Tensor]:
    """Each stream confident of a class of its own."""
    a = noise(3)
    b = a + noise(0.01)
    a[0, 4321] = b[0, 17] = top
    return a, b


def outlier(difference: float, where: str, apart: float = 1e-5) -> tuple[Tensor, Tensor]:
    a, b = plain(apart)
    at = {"top": a.argmax(), "first top": a[0, :2048].argmax(), "low": a.argmin(), "middle": torch.tensor(4444)}[where]
    b[0, at] += difference
    return a, b


def partly(value: float, part: slice, apart: float) -> tuple[Tensor, Tensor]:
    a, b = plain(apart)
    a[0, part] = b[0, part] = value
    return a, b


def raised(by: float, part: slice, apart: float) -> tuple[Tensor, Tensor]:
    """A part that weighs more, or less, than what the block sees first."""
    a, b = plain(apart)
    a[0, part] += by
    b[0, part] += by
    return a, b


def ramp(height: float, apart: float) -> tuple[Tensor, Tensor]:
    """A new largest logit in every round."""
    a = torch.linspace(-height, height, COLS)[None]
    return a, a + noise(apart)


KINDS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    **{f"{e:g} apart": lambda e=e: plain(e) for e in (1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0)},
    **{f"{e:g} apart and {s:g}": lambda e=e, s=s: plain(e, s) for s in (0.5, 30.0, 1000.0) for e in (1e-6, 1e-2, 1.0)},
    **{
        f"confident, {t:g} at {at}, {e:g} apart": lambda e=e, t=t, at=at: confident(e, t, at)
        for t in (14.0, 25.0)
        for at in (3, 5000, COLS - 1)
        for e in (1e-4, 0.2)
    },
    **{f"two tops, {e:g} apart": lambda e=e: two_tops(e) for e in (1e-5, 0.1, 2.0)},
    **{
        f"outlier {d:g}, {w}": lambda d=d, w=w: outlier(d, w)
        for d in (0.7, 5.0, -20.0)
        for w in ("top", "first top", "low", "middle")
    },
    **{
        f"{v:g} in {name}, {e:g} apart": lambda v=v, part=part, e=e: partly(v, part, e)
        for v in (-math.inf, LOWEST)
        for name, part in (("a third", slice(1, None, 3)), ("the first", slice(0, -60)), ("the rest", slice(60, None)))
        for e in (1e-4, 2.0)
    },
    **{
        f"{by:g} in {name}, {e:g} apart": lambda by=by, part=part, e=e: raised(by, part, e)
        for by in (40.0, -60.0)
        for name, part in (("the first half", slice(0, COLS // 2)), ("the second half", slice(COLS // 2, None)))
        for e in (1e-4, 2.0)
    },
    **{f"ramp to {h:g}, {e:g} apart": lambda h=h, e=e: ramp(h, e) for h in (40.0, 300.0) for e in (1e-4, 0.5)},
    "flat": lambda: (torch.zeros(1, COLS), noise(0.1)),
    "nearly flat": lambda: (7 + noise(1e-3), 7 + noise(1e-3)),
    "unrelated": lambda: (noise(3), noise(3)),
    "a hundred thousand, scaled": lambda: ((a := noise(1e5)), a * 1.0001),
    "ten million": lambda: (noise(1e7), noise(1e7)),
    "one stream at 1e32": lambda: (torch.full((1, COLS), 1e32), noise(3)),
    "the lowest everywhere": lambda: (torch.full((1, COLS), LOWEST), torch.full((1, COLS), LOWEST)),
    **{f"disagreeing at {t:g}": lambda t=t: disagreeing(t) for t in (15.0, 60.0, 300.0)},
}  # fmt: skip


def sums_and_gradients(a: Tensor, b: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
    value, (clean, noised) = gradients(symmetric_kl, a, b, reduction="sum")
    assert clean is not None
    assert noised is not None
    return float(value), (clean, noised)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    a, b = KINDS[kind]()
    truth, *expected = oracles.divergence(a, b)
    value, found = sums_and_gradients(a, b)
    if not np.isfinite(truth[0]):  # the oracle's own differences overflow: all classes alike
        assert kind == "the lowest everywhere"
        assert value == 0
        assert not any(g.any() for g in found)
        return
    assert value >= 0
    assert value == pytest.approx(truth[0], rel=1e-6, abs=1e-36)
    # Where log p - log q is hundreds, it is itself rounded to float32.
    furthest = float((a - b).nan_to_num(0).abs().max()) if kind.startswith("disagreeing") else 0.0
    for got, want in zip(found, expected, strict=True):
        assert relative_l2(got, want) <= 1e-6 + 2.0**-23 * furthest


BEYOND_FLOAT16 = ("a hundred thousand, scaled", "ten million", "one stream at 1e32")


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(d, k) for d in (torch.bfloat16, torch.float16) for k in KINDS if d == torch.bfloat16 or k not in BEYOND_FLOAT16],
)
def test_16_bits(kind: str, dtype: torch.dtype) -> None:
    a, b = (t.to(dtype) for t in KINDS[kind]())
    truth, *expected = oracles.divergence(a, b)
    value, found = sums_and_gradients(a, b)
    if not np.isfinite(truth[0]):
        assert kind == "the lowest everywhere"  # rounded to 16 bits, no class is left
        return
    assert value == pytest.approx(truth[0], rel=1e-6, abs=1e-36)
    half_ulp = torch.finfo(dtype).eps / 2
    for got, want in zip(found, expected, strict=True):
        furthest = float((a - b).float().nan_to_num(0).abs().max())
        # The oracle's log p - log q has 19 digits, of which logits of 40 take two.
        allowed = half_ulp * 1.01 * np.abs(want) + (1e-6 + 2.0**-23 * furthest) * np.abs(want).max() + 1e-17
        assert np.all(np.abs(got.double().numpy() - want) <= allowed + torch.finfo(dtype).smallest_normal * half_ulp)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_centre_that_turns_out_to_be_none(dtype: torch.dtype) -> None:
    """What the block sees first is nearly all one class, which in the whole row counts little and differs like no other."""
    a = torch.randn(1, 60_000)
    a[0, 100] = 10.0
    b = a.clone()
    b[0, 100] += 0.5
    b[0, 2::7] += 0.01 * torch.randn_like(b[0, 2::7])
    a, b = a.to(dtype), b.to(dtype)
    truth, *expected = oracles.divergence(a, b)
    value, found = sums_and_gradients(a, b)
    assert value == pytest.approx(truth[0], rel=1e-6)
    for got, want in zip(found, expected, strict=True):
        assert relative_l2(got, want) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("cols", [1024, 1027, 2048, 4095, 4096, 4104, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_around_whole_rounds(cols: int, dtype: torch.dtype) -> None:
    for apart in (1e-2, 3.0):
        a = 3 * torch.randn(2, cols)
        a, b = a.to(dtype), (a + apart * torch.randn(2, cols)).to(dtype)
        truth, *expected = oracles.divergence(a, b)
        np.testing.assert_allclose(symmetric_kl(a, b, reduction="none").double().numpy(), truth, rtol=1e-6)
        _, found = sums_and_gradients(a, b)
        for got, want in zip(found, expected, strict=True):
            assert relative_l2(got, want) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("offsets", [(0, 1), (3, 0), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_that_start_off_each_others_boundary(offsets: tuple[int, int], dtype: torch.dtype) -> None:
    """Then no tile of both streams can be read in 16-byte pieces."""
    cols = 5000
    made = [torch.zeros(cols + offset).to(dtype)[offset:].view(1, cols) for offset in offsets]
    made[0].copy_(3 * torch.randn(1, cols))
    made[1].copy_(made[0] + 0.1 * torch.randn(1, cols))
    truth, *expected = oracles.divergence(*made)
    leaves = [t.requires_grad_() for t in made]
    value = symmetric_kl(*leaves, reduction="sum")
    assert float(value.detach()) == pytest.approx(truth[0], rel=1e-6)
    for got, want in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        assert relative_l2(got, want) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    "kind", ["0.01 apart", "3 apart", "confident, 25 at 5000, 0.2 apart", "disagreeing at 15", "ten million"]
)
@pytest.mark.parametrize("r3f_lambda", [1.0, 1e-3, 1e-9, 1e-30])
def test_cross_entropy_in_the_same_pass(kind: str, r3f_lambda: float) -> None:
    """Also where the divergence counts next to nothing beside it: the noised stream's gradient stays right."""
    a, b = KINDS[kind]()
    label = a.argmax(-1) if kind == "ten million" else torch.tensor([4321])
    truth, clean, noised = oracles.divergence(a, b)
    ce, ce_gradient = oracles.cross_entropy(a, label)
    leaves = [t.requires_grad_() for t in (a, b)]
    out = r3f_loss(*leaves, label, r3f_lambda=r3f_lambda)
    assert float(out.task_loss) == pytest.approx(ce[0], rel=1e-6, abs=5e-7)
    assert float(out.symm_kl) == pytest.approx(truth[0], rel=1e-6, abs=1e-30)
    found = torch.autograd.grad(out.loss, leaves)
    furthest = float((a - b).detach().abs().max()) if kind in ("disagreeing at 15", "ten million") else 0.0
    # The label's p - 1 is right to 6e-7 where p is next to 1.
    want = r3f_lambda * clean + ce_gradient
    assert np.linalg.norm(found[0].double().numpy() - want) <= (1e-6 + 2.0**-23 * furthest) * np.linalg.norm(want) + 6e-7
    if r3f_lambda > 1e-20:  # below, probabilities times lambda leave float32's range
        assert relative_l2(found[1], r3f_lambda * noised) <= 1e-6 + 2.0**-23 * furthest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", [0, 4321])
def test_cross_entropy_in_16_bits(dtype: torch.dtype, label: int) -> None:
    a, b = (t.to(dtype) for t in plain(0.1))
    truth, clean, noised = oracles.divergence(a, b)
    ce, ce_gradient = oracles.cross_entropy(a, torch.tensor([label]))
    leaves = [t.requires_grad_() for t in (a, b)]
    out = r3f_loss(*leaves, torch.tensor([label]), r3f_lambda=0.7)
    assert float(out.task_loss) == pytest.approx(ce[0], rel=1e-6)
    assert float(out.symm_kl) == pytest.approx(truth[0], rel=1e-6)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for got, want in zip(torch.autograd.grad(out.loss, leaves), (0.7 * clean + ce_gradient, 0.7 * noised), strict=True):
        allowed = torch.finfo(dtype).eps / 2 * 1.01 * np.abs(want) + 1e-6 * np.abs(want).max() + tiny
        assert np.all(np.abs(got.double().numpy() - want) <= allowed)


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_cross_entropy_where_there_is_no_divergence(bad: float) -> None:
    """The noised stream makes the divergence infinite or undefined; the clean one has its cross-entropy still."""
    a, b = plain(0.1)
    b[0, 7000] = bad
    label = torch.tensor([1])
    truth, _ = oracles.cross_entropy(a, label)
    gradient = torch.empty_like(a)
    kl, ce = cuda.divergence_rows(DivergenceTask(a, b, label, grad_clean=gradient))
    assert float(ce) == pytest.approx(truth[0], rel=1e-6)
    assert float(kl) == math.inf if bad == -math.inf else math.isnan(kl)
    assert bool(gradient.isnan().all())
    a[0, 8000] = math.nan
    kl, ce = cuda.divergence_rows(DivergenceTask(a, b, label))
    assert math.isnan(kl)
    assert math.isnan(ce)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [COLS, 2050])
def test_cross_entropy_where_all_classes_are_masked(dtype: torch.dtype, cols: int) -> None:
    """Logits that all are the lowest number are a uniform distribution; columns that do not exist have no share in it."""
    a, b = (torch.full((1, cols), torch.finfo(dtype).min, dtype=dtype, requires_grad=True) for _ in range(2))
    found = r3f_loss(a, b, torch.tensor([7]), reduction="sum")
    found.loss.backward()
    assert float(found.loss) == pytest.approx(math.log(cols), rel=1e-6)
    assert a.grad is not None
    want = torch.full((1, cols), 1 / cols, dtype=torch.float64)
    want[0, 7] -= 1
    assert relative_l2(a.grad, want.numpy()) <= (1e-6 if dtype == torch.float32 else 4e-3)
