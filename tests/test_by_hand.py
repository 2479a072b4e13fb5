"""What measures the tests' differences lets no NaN through: every comparison with one is false."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from .by_hand import distance, largest_difference
from .distributed import Outcome


@pytest.mark.parametrize("where", range(3))
def test_a_difference_with_nan_is_nan(where: int) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    a, b = (nn.ParameterList([torch.ones(2, dtype=dtype) for dtype in dtypes]) for _ in range(2))
    with torch.no_grad():
        b[1][1] += 0.25
    assert distance(a, b) == largest_difference(zip(a, b, strict=True)) == 0.25
    with torch.no_grad():
        b[where][0] = math.nan
    assert math.isnan(distance(a, b))
    assert math.isnan(distance(b, a))


@pytest.mark.parametrize("numbers", [(math.nan, 0.0), (0.0, math.nan)])
def test_the_worst_rank_is_one_with_nan(numbers: tuple[float, float]) -> None:
    assert math.isnan(Outcome([{"case": ("passed", number)} for number in numbers]).worst("case"))
    assert Outcome([{"case": ("passed", number)} for number in (0.5, 0.25)]).worst("case") == 0.5
