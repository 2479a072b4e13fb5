"""Rounding to 16 bits with given random bits, so that the mean over them is the number itself."""

from __future__ import annotations

import torch
from torch import Tensor


def round_randomly(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to a neighbour in `dtype`, away from zero with the probability that keeps the mean.

    Args:
        x: float32, any shape.
        bits: integers in [0, 65536), uniform, of x's shape.
        dtype: bfloat16 or float16; anything else is rounded to nearest.

    Returns:
        `x` in `dtype`. Numbers that `dtype` holds stay as they are, whatever the bits; infinities and NaN too.
    """
    if dtype == torch.bfloat16:
        raw = x.view(torch.int32)
        up = (raw + bits.to(torch.int32)) & -65536  # the sign is apart, so adding moves away from zero
        return torch.where(x.isfinite(), up, raw).view(torch.float32).to(dtype)
    if dtype == torch.float16:
        # In units of float16's last place at |x| (2^-24 below its smallest normal number) the sum is exact in float64.
        size = x.double().abs()
        unit = torch.exp2(torch.frexp(size).exponent.double().clamp(min=-13) - 11)
        rounded = torch.floor(size / unit + bits.double() / 65536) * unit
        return torch.where(x.isfinite(), torch.copysign(rounded, x.double()), x.double()).to(dtype)
    return x.to(dtype)


def hashed_bits(index: Tensor, seed: int = 0) -> Tensor:
    """16 well-mixed bits for each int64 index: the same ones every time, without a generator."""
    mask = 0xFFFFFFFF
    h = (index + seed * 0x9E3779B9) & mask
    for factor in (0x7FEB352D, 0x846CA68B):  # a 32-bit finaliser, in int64, where products of 32 and 31 bits still fit
        h = h ^ (h >> 16)
        h = ((h & 0xFFFF) * factor + (((h >> 16) * factor & 0xFFFF) << 16)) & mask
    return (h ^ (h >> 16)) & 0xFFFF
