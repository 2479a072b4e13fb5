"""How w + e comes about, and how w comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost.distributed import part_number
from fastpost.ops import params as ops
from fastpost.sam.buckets import ParameterBucket, ShardReducer, changes, put, refuse_changes
from fastpost.sam.masters import Masters


class PerturbParams(NamedTuple):
    """What one bucket's perturbation is made with.

    Attributes:
        rho: radius; negative where the way uphill is against the gradient, as with an optimizer that maximises.
        eta: ASAM's constant; None for SAM.
        compute_dtype: dtype that the forward pass computes in.
    """

    rho: float
    eta: float | None
    compute_dtype: torch.dtype


class Perturbation:
    """w + e written over w, with w kept aside in a buffer that is allocated once.

    A bucket is noted before it is written, so that an interrupt finds it whatever it interrupts. That its stash holds w is
    noted inside of the call that writes (`plan.Bucket.stashed`). Restoring is harmless where nothing was written, and may be
    repeated.

    Args:
        reducer: how ranks add up, and who learns that weights were written.
    """

    stash = True
    number = 0  # of the ascent, counted over steps: a key for random numbers

    def __init__(self, reducer: ShardReducer) -> None:
        self._reducer = reducer
        self._noted: list[ParameterBucket] = []

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError where these parameters cannot be perturbed this way."""

    @property
    def active(self) -> bool:
        """Whether weights are perturbed."""
        return bool(self._noted)

    @property
    def params(self) -> list[Tensor]:
        """The parameters that are perturbed."""
        return [p for b in self._noted for p in b.params]

    def apply(self, buckets: Sequence[ParameterBucket], settings: Sequence[PerturbParams], squared: Tensor) -> Tensor:
        """Perturbs every bucket, or none when one fails; returns the six sums of `ops.sam_perturb_`, over all of them."""
        parts: list[tuple[Hashable, Tensor]] = []
        try:
            for b, setting in zip(buckets, settings, strict=True):
                b.bucket.stashed = False
                self._noted.append(b)
                parts.append((b.key, self.write(b, setting, squared.to(b.bucket.device))))
        except BaseException:  # a later bucket failed: the earlier ones must not stay perturbed
            self.undo()
            raise
        self._wrote(buckets)
        return self._reducer.total(parts)

    def undo(self, convert: bool = False) -> None:
        """Puts w back, bit for bit; without a perturbation nothing happens.

        Weights that have been moved are followed. Where only their strides are others the values go to where they belong.

        Args:
            convert: put w back whatever has become of the weights: cast to their dtype, on their device. Those of another
                shape, and those whose memory cannot be written, get memory of their own.

        Raises:
            WeightsChanged: without `convert`, where weights are of another dtype, shape or device than those that were
                perturbed, or share memory. Nothing has been written.
        """
        if not self._noted:
            return
        written = list(filter(self.writes, self._noted))
        found = changes(written)
        if not convert:
            refuse_changes(written, found)
        for b, changed in zip(written, found, strict=True):
            if not changed:
                self.put_back(b)
                continue
            for row, p in enumerate(b.params):
                put(p, b.bucket.weights[row], self.origin(b, row), changed.get(row))
        self._close()

    def check_weights(self) -> bool:
        """Whether every perturbed weight is laid out as it was; raises as `undo` does, and writes nothing."""
        written = list(filter(self.writes, self._noted))
        found = changes(written)
        refuse_changes(written, found)
        return not any(found)

    @contextlib.contextmanager
    def settled(self) -> Iterator[list[ParameterBucket]]:
        """Hands the perturbed buckets to a block that writes all their weights itself. Until it has, w can be put back."""
        yield self._noted
        self._close()

    def _close(self) -> None:
        self._wrote(self._noted)
        self._noted = []

    def _wrote(self, buckets: Sequence[ParameterBucket]) -> None:
        self._reducer.mark_modified(p for b in buckets for p in b.params)
        torch.clear_autocast_cache()  # or an enclosing autocast region would go on with its casts of the old weights

    def write(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Tensor:
        """Perturbs one bucket and returns its six sums."""
        sums = ops.run("sam_perturb_", b.bucket, squared, *setting)
        ops.mark_modified(b.bucket.weights)
        return sums

    def writes(self, b: ParameterBucket) -> bool:
        """Whether weights of this noted bucket may have been written, so that w has to be put back."""
        return b.bucket.stashed

    def put_back(self, b: ParameterBucket) -> None:
        """Puts w back into the weights of a bucket, which are laid out as they were."""
        ops.run("sam_restore_", b.bucket)
        ops.mark_modified(b.bucket.weights)

    def origin(self, b: ParameterBucket, row: int) -> Tensor:
        """w of one tensor, in the dtype and shape that it was perturbed in."""
        return b.bucket.stash[row]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted": []}  # copies and pickles are refused while perturbed


class StochasticPerturbation(Perturbation):
    """w + e rounded at random to one of its neighbours, so that the mean over steps is w + e; w is kept aside.

    It keeps the mean of the step, not its direction: most of what is stored is rounding noise.

    Args:
        seed: with the number of the ascent, the key of the random numbers.
    """

    def __init__(self, reducer: ShardReducer, seed: int) -> None:
        super().__init__(reducer)
        self._seed = seed

    def check(self, params: Sequence[Tensor]) -> None:
        if not any(p.dtype.itemsize == 2 for p in params):
            raise ValueError("SAM: rounding='stochastic' is for 16-bit weights, and none is perturbed here")

    def write(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Tensor:
        # Replicas draw the same numbers, or they would part; the shards of a tensor draw numbers of their own.
        key = self._seed + self.number * 0x9E3779B97F4A7C15 + part_number(b.params[0]) * 0xD1B54A32D192ED03
        seed = ops.seed_tensor(key % 2**64, b.bucket.device)
        sums = ops.run("sam_perturb_", b.bucket, squared, *setting, seed)
        ops.mark_modified(b.bucket.weights)
        return sums


class MasterPerturbation(Perturbation):
    """w = cast(m + e), and back to cast(m): nothing is stashed.

    Like every rounding to 16 bits it keeps little of e where e is small against the weights' last place; m + e is formed in
    float32, so that what is kept is right on average.
    """

    stash = False

    def __init__(self, reducer: ShardReducer, masters: Masters) -> None:
        super().__init__(reducer)
        self._masters = masters

    def apply(self, buckets: Sequence[ParameterBucket], settings: Sequence[PerturbParams], squared: Tensor) -> Tensor:
        for p in (p for b in buckets for p in b.params):
            self._masters.refuse_misfit(p)
        return super().apply(buckets, settings, squared)

    def write(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Tensor:
        self._point(b)
        sums = ops.run("sam_perturb_masters_", b.bucket, squared, *setting)
        ops.mark_modified(b.bucket.weights)
        return sums

    def writes(self, b: ParameterBucket) -> bool:
        return True  # a cast of the masters is w, whether or not w + e has been written

    def origin(self, b: ParameterBucket, row: int) -> Tensor:
        return self._masters.master_of[id(b.params[row])].detach().to(b.layout.dtype)

    def put_back(self, b: ParameterBucket) -> None:
        if any(self._masters.misfit(p) for p in b.params):
            self._masters.cast()
            return
        self._point(b)
        ops.run("sam_cast_", b.bucket)
        ops.mark_modified(b.bucket.weights)

    def _close(self) -> None:
        super()._close()
        self._masters.note()

    def _point(self, b: ParameterBucket) -> None:
        """The column of origins: here they lie in float32, and are never written. Masters may have been moved."""
        b.bucket.stash = [self._masters.master_of[id(p)].detach() for p in b.params]
        pairs = zip(b.bucket.weights, b.bucket.stash, strict=True)
        b.bucket.walkable = b.walkable and all(w.stride() == m.stride() for w, m in pairs)
