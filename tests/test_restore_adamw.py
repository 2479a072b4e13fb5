"""SAM's restore and a step of AdamW in one pass: float64 truth from the paper's algorithm, and torch's own optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpost.ops import params as ops

from .conftest import DTYPES, same_bits

SHAPES = ((3,), (70_001,), (0,), (5, 7), (257, 256), (1,))


def case(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    columns = {}
    for name, scale in (("stash", 1.0), ("grads", 1e-2), ("exp_avgs", 1e-2), ("exp_avg_sqs", 1e-2)):
        columns[name] = [(torch.randn(s, dtype=torch.float64) * scale).to(dtype) for s in SHAPES]
    columns["exp_avg_sqs"] = [v.square() for v in columns["exp_avg_sqs"]]
    columns["weights"] = [torch.full_like(w, math.nan) for w in columns["stash"]]  # must not be read
    columns["steps"] = [torch.tensor(float(1 + 3 * i)) for i in range(len(SHAPES))]
    return columns


def truth(columns: dict[str, list[Tensor]], how: dict, i: int) -> list[tuple[Tensor, Tensor]]:
    """Algorithm 2 of 1711.05101 for tensor i, in float64 from the values as they are stored: w, m and v.

    Each with the size of its terms, which is what float32's rounding is relative to where they cancel.
    """
    w, g, m, v = (columns[name][i].double() for name in ("stash", "grads", "exp_avgs", "exp_avg_sqs"))
    t, (b1, b2) = columns["steps"][i].item(), how["betas"]
    g = -g if how["maximize"] else g
    terms = b1 * m.abs() + (1 - b1) * g.abs()
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    rate = how["lr"] / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + how["eps"])
    new = w - how["lr"] * how["weight_decay"] * w - rate * m
    return [(new, w.abs() + rate * terms), (m, terms), (v, v)]


HOW = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1, "maximize": False}


def run(columns: dict[str, list[Tensor]], **how: object) -> None:
    ops.sam_restore_adamw_(**columns, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_algorithm_in_float64(backend: str, dtype: torch.dtype, maximize: bool) -> None:
    columns, how = case(dtype), {**HOW, "maximize": maximize}
    expected = [truth(columns, how, i) for i in range(len(SHAPES))]
    run(columns, **how)
    unit = torch.finfo(dtype).eps
    for i, wanted in enumerate(expected):
        for name, (value, size) in zip(("weights", "exp_avgs", "exp_avg_sqs"), wanted, strict=True):
            # One rounding to the dtype, and float32's few before it; float16's moments may be subnormal.
            bound = unit / 2 * value.abs() + 4e-7 * size + torch.finfo(dtype).smallest_normal * unit
            assert bool(((columns[name][i].double() - value).abs() <= bound).all()), (name, i)


def test_float64_goes_to_the_reference() -> None:
    columns = case(torch.float64)
    expected = [truth(columns, HOW, i) for i in range(len(SHAPES))]
    run(columns, **HOW)
    for i, wanted in enumerate(expected):
        torch.testing.assert_close(columns["weights"][i], wanted[0][0], rtol=1e-14, atol=1e-15)


def test_equals_the_algorithm_in_float64_over_steps(backend: str) -> None:
    """Moments and weights carried along in both. Torch's fused AdamW on CUDA keeps exp_avg_sq to 1.3e-5 only, so it is no
    measure; what it makes of the weights has to agree."""
    shapes = [s for s in SHAPES if math.prod(s)]
    params = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    opt = torch.optim.AdamW(params, lr=1e-3, fused=True)
    mine = [p.detach().clone() for p in params]
    moments = [[torch.zeros_like(p) for p in mine] for _ in range(2)]
    exact = [[t.double() for t in column] for column in (mine, *moments)]
    for count in range(1, 6):
        grads = [torch.randn_like(p) for p in mine]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.step()
        steps = [torch.tensor(float(count)) for _ in mine]
        how = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "maximize": False}
        columns = dict(zip(("stash", "exp_avgs", "exp_avg_sqs"), exact, strict=True)) | {"grads": grads, "steps": steps}
        for i in range(len(shapes)):
            for column, (value, _) in zip(exact, truth(columns, how, i), strict=True):
                column[i] = value
        ops.sam_restore_adamw_(mine, grads, [p.clone() for p in mine], *moments, steps, **how)
    for i, p in enumerate(params):
        w, m, v = (column[i] for column in exact)
        torch.testing.assert_close(mine[i].double(), w, rtol=10 * 2.0**-24, atol=2e-9)  # two roundings a step
        torch.testing.assert_close(moments[0][i].double(), m, rtol=1e-6, atol=3e-7)
        torch.testing.assert_close(moments[1][i].double(), v, rtol=5e-7, atol=0)
        torch.testing.assert_close(mine[i], p.detach(), rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_found_inf_restores_bit_for_bit_and_leaves_the_moments(backend: str, dtype: torch.dtype) -> None:
    columns = case(dtype)
    columns["grads"][1][5] = math.inf
    columns["stash"][1][7] = -0.0
    kept = {name: [t.clone() for t in columns[name]] for name in ("stash", "exp_avgs", "exp_avg_sqs")}
    run(columns, **HOW, found_inf=torch.ones(()))
    for i in range(len(SHAPES)):
        assert same_bits(columns["weights"][i], kept["stash"][i])
        assert same_bits(columns["exp_avgs"][i], kept["exp_avgs"][i])
        assert same_bits(columns["exp_avg_sqs"][i], kept["exp_avg_sqs"][i])


def test_gradients_are_divided_by_the_scale(backend: str) -> None:
    plain, scaled = case(torch.float32), {}
    scaled = {name: [t.clone() for t in column] for name, column in plain.items()}
    scaled["grads"] = [g * 1024 for g in scaled["grads"]]
    run(plain, **HOW, found_inf=torch.zeros(()))
    run(scaled, **HOW, grad_scale=torch.tensor(1024.0))
    assert all(same_bits(a, b) for name in ("weights", "exp_avgs") for a, b in zip(plain[name], scaled[name], strict=True))
    assert all(same_bits(g / 1024, h) for g, h in zip(scaled["grads"], plain["grads"], strict=True))  # left as they were


def test_bad_input_is_refused_before_anything_is_written() -> None:
    columns = case(torch.float32)
    before = [w.clone() for w in columns["weights"]]
    for change, error, words in (
        ({"steps": columns["steps"][:-1]}, ValueError, "6 weights but 5 steps"),
        ({"steps": [torch.ones((), dtype=torch.int64)] * 6}, TypeError, "one float32"),
        ({"stash": [w.double() for w in columns["stash"]]}, ValueError, "float64"),
        ({"exp_avgs": columns["exp_avgs"][:5]}, ValueError, "5 exp_avgs"),
    ):
        with pytest.raises(error, match=words):
            run({**columns, **change}, **HOW)  # type: ignore[arg-type]
    assert all(same_bits(a, b) for a, b in zip(columns["weights"], before, strict=True))
