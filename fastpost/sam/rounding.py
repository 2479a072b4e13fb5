"""Rounding to 16 bits with given random bits, so that the mean over them is the number itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpost.backends.reference import philox
from fastpost.ops import params as ops
from fastpost.plan import Bucket
from fastpost.sam.buckets import ParameterBucket
from fastpost.sam.perturbation import Perturbation, Term


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


def random_bits(n: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """16 random bits for each of n elements: half-words of Philox4x32-10(seed, element // 8, stream), in order."""
    key = ops.seed_tensor(seed, device)
    words = philox(key, torch.arange(-(-n // 8), device=device), stream)  # (calls, 4)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)[:n]


class StochasticPerturbation(Perturbation):
    """w + e rounded at random to one of its neighbours, so that the mean over steps is w + e; w is kept aside.

    It keeps the mean of the step, not its direction: most of what is stored is rounding noise.

    Args:
        seed: with the number of the ascent, the key of the random numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def check(self, params: Sequence[Tensor]) -> None:
        if not any(p.dtype.itemsize == 2 for p in params):
            raise ValueError("SAM: rounding='stochastic' is for 16-bit weights, and none is perturbed here")

    def write(self, b: ParameterBucket, term: Term, squared: Tensor) -> Tensor:
        if b.bucket.dtype.itemsize > 2:
            return super().write(b, term, squared)
        seed = (self._seed + self.number * 0x9E3779B97F4A7C15) % 2**64
        sums = sam_perturb_stochastic_(b.bucket, squared, term, seed)
        ops.wrote(b.bucket.weights)
        return sums


def sam_perturb_stochastic_(bucket: Bucket, squared: Tensor, term: Term, seed: int) -> Tensor:
    """`sam_perturb_` with w + e rounded by `round_randomly`; elements are counted as they lie in memory."""
    moves = torch.isfinite(squared) & (squared > 0)
    scale = torch.where(moves, term.rho / squared.sqrt(), torch.zeros_like(squared))
    sums = torch.zeros(6, dtype=torch.float64, device=squared.device)
    for w, g, stash, stream in zip(bucket.weights, bucket.grads, bucket.stash, bucket.streams, strict=True):
        stash.copy_(w)
        before = w.float()
        e = g.float() if term.eta is None else g.float() * (before.abs() + term.eta).square()
        e = torch.where(moves, e * scale.float(), torch.zeros_like(e))
        order = sorted(range(w.ndim), key=w.stride, reverse=True)
        bits = random_bits(w.numel(), seed, stream, w.device).view([w.shape[d] for d in order])
        back = [order.index(d) for d in range(w.ndim)]
        w.copy_(torch.where(moves, round_randomly(before + e, bits.permute(back), w.dtype), w))
        stored = (w.float() - before).double()
        seen = (w.to(term.seen).float() - stash.to(term.seen).float()).double()
        e = e.double()
        parts = (e * e, stored * stored, e * stored, seen * seen, e * seen, (stored != 0).double())
        sums += torch.stack([part.sum() for part in parts])
    return sums
