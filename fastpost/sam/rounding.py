"""Stochastic rounding of a stored perturbation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastpost.distributed import part_number
from fastpost.ops import params as ops
from fastpost.sam.buckets import ParameterBucket
from fastpost.sam.perturbation import Perturbation, Term


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
        # Replicas draw the same numbers, or they would part; the shards of a tensor draw numbers of their own.
        key = self._seed + self.number * 0x9E3779B97F4A7C15 + part_number(b.params[0]) * 0xD1B54A32D192ED03
        seed = ops.seed_tensor(key % 2**64, b.bucket.device)
        sums = ops.run("sam_perturb_", b.bucket, squared, term.rho, term.eta, term.seen, seed)
        ops.wrote(b.bucket.weights)
        return sums
