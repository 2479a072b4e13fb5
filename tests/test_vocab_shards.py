"""Rows whose classes are cut across ranks, against the equations in float64: a backend's part, the ranks in turn; and the
whole of it in a group of one process. Groups of several are in test_r3f_sharded.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastpost import linear_r3f_loss
from fastpost.backends import native, reference
from fastpost.backends.vocab_shards import own_columns
from fastpost.dispatch import select, serving
from fastpost.row_tasks import IGNORED, NO_CLASS, OperandTask, ShardTask

from .test_operand_rows import PLAIN, ROWS, run, streams, truth

COLS = 5003
CUTS = ((), (1024, 2001), (1, 64, 4999))  # where a rank's columns end and the next one's begin
RULES: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.1},
    {"cap": 12.0},
    {"teaches": False},
    {"smoothing": 0.2, "cap": 12.0, "teaches": False},
]
Found = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def run_shards(
    clean: Tensor, noised: Tensor, labels: Tensor | None, weights: Tensor, rule: dict[str, Any], want: tuple[bool, bool],
    dtype: torch.dtype, cuts: Sequence[int],
) -> Found:  # fmt: skip
    """`run` of test_operand_rows by ranks: kl and ce, which all of them have to give alike, and operands side by side."""
    sums_of, finish = (
        getattr(reference, op) if serving(op, clean.device, clean.dtype) is None else select(op, clean.device, clean.dtype)
        for op in ("shard_sums", "shard_operands")
    )
    tops = torch.stack((clean.amax(-1), noised.amax(-1)))
    tops = torch.where(tops == -math.inf, 0.0, tops)
    rows, cols = clean.shape
    values = torch.full((len(cuts) + 1, 2, rows), math.nan, dtype=torch.float64)
    # Those of the logits' dtype take their place, as in the fused head.
    room = [clean, noised] if dtype == clean.dtype else torch.full((2, rows, cols), math.nan, dtype=dtype)
    operands = [t if w else None for t, w in zip(room, want, strict=True)]
    shards: list[ShardTask] = []
    for rank, (begin, end) in enumerate(zip((0, *cuts), (*cuts, cols), strict=True)):
        here = slice(begin, end)
        own = None if labels is None else own_columns(labels, -100, begin, end - begin, cols)
        task = OperandTask(
            clean[:, here], noised[:, here], own, IGNORED, weights[0], None if labels is None else weights[1],
            *values[rank], *(None if t is None else t[:, here] for t in operands), **rule,
        )  # fmt: skip
        shards.append(ShardTask(task, tops, torch.tensor(float(cols), dtype=torch.float64)))
    before = sum(sums_of(shard, None) for shard in shards)
    again = [sums_of(shard, before) for shard in shards]
    assert len({part is None for part in again}) == 1
    after = before if again[0] is None else sum(again)
    for shard in shards:
        finish(shard, before, after)
    assert all(torch.equal(v.nan_to_num(7.0), values[0].nan_to_num(7.0)) for v in values)
    return *values[0], *operands


def check(got: Found, exact: Sequence[Tensor], want: tuple[bool, bool], labelled: bool, dtype: torch.dtype) -> None:
    """1e-6 of what was summed up, and one rounding of the operands."""
    kl, ce, *gradients = exact
    torch.testing.assert_close(got[0], kl, rtol=1e-6, atol=0)
    if labelled:
        torch.testing.assert_close(got[1], ce, rtol=1e-6, atol=1e-7)
    summed = sum(g.abs().amax(-1, keepdim=True) for g in gradients)
    expected = [gradients[0] + gradients[1] if want == (True, True) else gradients[0], gradients[1]]
    for operand, g in zip(got[2:], expected, strict=True):
        if operand is not None:
            rounding = torch.finfo(dtype).eps / 2 * 1.01 * g.abs() * (dtype != torch.float32)
            assert bool(((operand.double() - g).abs() <= rounding + 1e-6 * summed).all())


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("apart", "dtype"), [(1e-2, torch.float32), (1.0, torch.bfloat16)])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_against_the_equations(
    backend: str, rule: dict[str, Any], cuts: tuple[int, ...], apart: float, dtype: torch.dtype
) -> None:
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    for want, labelled in (((True, True), True), ((True, False), True), ((False, True), False)):
        clean, noised, labels = streams(COLS, apart)
        chosen = labels if labelled else None
        exact = truth(clean, noised, chosen, *weights, **{**PLAIN, **rule})
        check(run_shards(clean, noised, chosen, weights, rule, want, dtype, cuts), exact, want, labelled, dtype)


def difficult(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that one look at begins badly for."""
    clean, noised, labels = streams(COLS, 1e-3)
    if kind == "one stream is the other moved":
        noised.copy_(clean + torch.tensor([5.0, -3.0, 1e-3, 40.0, 0.0]).unsqueeze(1))
    elif kind == "an outlier":
        noised[:, 3000] += torch.tensor([0.7, 3.0, 8.0, 15.0, 20.0])
    elif kind == "all but the largest moved":
        clean[:, 77] = noised[:, 77] = 30.0
        noised[:, :77] += 5
        noised[:, 78:] += 5
    elif kind == "the largest weighs little, and moved otherwise":  # so the look begins off the centre
        clean.copy_(1e-2 * clean)
        noised.copy_(clean + 4)
        clean[:, 2500], noised[:, 2500] = 3.0, 5.0
    elif kind == "sure of one class":
        clean[:, 4000] += 25
        noised[:, 4000] += 25
    elif kind == "classes that do not exist":
        clean[:, 1024:2001] = noised[:, 1024:2001] = -math.inf
        labels.clamp_(max=1000)
    elif kind == "huge":
        noised.add_(3e6)
        clean.add_(-2.5e6)
    elif kind == "next to nothing apart":
        noised.copy_(clean)
        noised[:, ::97] += 1e-6
    return clean, noised, labels


@pytest.mark.parametrize(
    "kind",
    [
        "one stream is the other moved",
        "an outlier",
        "all but the largest moved",
        "the largest weighs little, and moved otherwise",
        "sure of one class",
        "classes that do not exist",
        "huge",
        "next to nothing apart",
    ],
)
def test_difficult_rows(backend: str, kind: str) -> None:
    """As right as any other row."""
    weights = torch.rand(2, ROWS, dtype=torch.float64) + 0.1
    clean, noised, labels = difficult(kind)
    exact = truth(clean, noised, labels, *weights, **PLAIN)
    got = run_shards(clean, noised, labels, weights, {}, (True, False), torch.float32, (1024, 2001))
    check(got, exact, (True, False), True, torch.float32)


@pytest.mark.parametrize("teaches", [True, False])
def test_what_has_no_value_and_what_has_no_weight(backend: str, teaches: bool) -> None:
    """NaN, infinities, missing classes: as `operand_rows` has them, on every rank."""
    clean, noised = torch.randn(2, 13, COLS).unbind()
    labels = torch.randint(0, COLS, (13,))
    weights = torch.rand(2, 13, dtype=torch.float64) + 0.1
    noised[0, 1500] = math.nan
    clean[1, 4000] = math.nan
    clean[2, 7] = math.inf
    noised[3, 1030] = -math.inf
    clean[4, 1030] = -math.inf
    clean[5] = -math.inf
    noised[6] = clean[6] = -math.inf
    clean[7], weights[0, 7] = math.nan, 0  # no divergence, a cross-entropy of NaN
    noised[8], weights[0, 8] = math.nan, 0
    weights[:, 9] = 0
    clean[9] = noised[9] = math.nan
    labels[10] = -100
    clean[11, 3], noised[11, 4] = -math.inf, math.nan
    clean[12] = noised[12] = -math.inf  # no class, and nobody asks for its cross-entropy
    weights[1, 12] = 0
    want = (True, True) if teaches else (True, False)
    rule = {"teaches": teaches}
    got = run_shards(clean.clone(), noised.clone(), labels, weights, rule, want, torch.float32, (1024, 2001))
    whole = run(clean.clone(), noised.clone(), labels, weights, rule, want, torch.float32)
    for name, a, b in zip(("kl", "ce", "first", "second"), got, whole, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_a_label_that_is_no_class_has_no_cross_entropy(backend: str) -> None:
    """Which shows in its value; on a CPU it is refused before. The row's divergence has its gradient."""
    clean, noised, labels = streams(COLS, 0.1)
    weights = torch.ones(2, ROWS, dtype=torch.float64)
    without = labels.clone()
    labels[:2], without[:2] = torch.tensor([-1, COLS]), -100
    found = [
        run_shards(clean.clone(), noised.clone(), y, weights, {}, (True, True), torch.float32, (1024, 2001))
        for y in (labels, without)
    ]
    assert found[0][1].isnan().tolist() == [True, True, False, False, False]
    for k in (0, 2, 3):
        assert torch.equal(found[0][k], found[1][k])
    if backend == "cuda":
        core = native.core()
        assert (core.SHARD_NO_CLASS, core.SHARD_IGNORED) == (NO_CLASS, IGNORED)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 8.0}, {"grad": "noised"}], ids=str)
def test_a_group_of_one_process(backend: str, options: dict[str, Any]) -> None:
    """Has the whole vocabulary, so its loss and gradients are those without a group."""
    made = [torch.randn(n, 24).requires_grad_() for n in (7, 7, 1031)]
    with torch.no_grad():
        made[1].copy_(made[0] + 0.1 * made[1])
    labels = torch.randint(0, 1031, (7,))
    labels[3] = -100
    dist.init_process_group("nccl" if labels.is_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for group in (None, dist.group.WORLD):
            out = linear_r3f_loss(*made, labels, vocab_group=group, **options)
            found.append((*(t.detach() for t in out), *torch.autograd.grad(out.loss, made)))
    finally:
        dist.destroy_process_group()
    for whole, sharded in zip(*found, strict=True):
        torch.testing.assert_close(sharded, whole, rtol=2e-6, atol=2e-6 * float(whole.abs().max()))
