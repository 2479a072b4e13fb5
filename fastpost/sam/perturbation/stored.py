"""How w + e is written over w, and how w comes back, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost import plan
from fastpost.ops import params as ops
from fastpost.rng import seed_of
from fastpost.sam.buckets import Change, Changes, ParameterBucket, ShardReducer, changes, put, refuse_changes
from fastpost.sam.perturbation.stash import Stash
from fastpost.sam.step import PerturbationSums


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
    """w + e written over w, with w kept aside in a stash that is allocated once.

    A bucket is noted before it is written, so that an interrupt finds it whatever it interrupts. That its stash holds w is
    noted inside of the call that writes (`plan.Bucket.stashed`). Restoring is harmless where nothing was written, and may be
    repeated.

    Args:
        reducer: how ranks add up, and who learns that weights were written.
        stash: how w is kept; None for those kinds that have it anyway.
    """

    number = 0  # of the ascent, counted over steps: a key for random numbers

    def __init__(self, reducer: ShardReducer, stash: Stash | None) -> None:
        self._reducer = reducer
        self.stash = stash
        self._noted: list[ParameterBucket] = []
        self._last: plan.Bucket | None = None  # with whose codes w of all the others went

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError where these parameters cannot be perturbed this way."""
        if self.stash is not None:
            self.stash.check(params)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups with the tensors that the model computes with.

        Raises:
            ValueError: a group holds a tensor for which none is known.
        """
        return groups

    @property
    def active(self) -> bool:
        """Whether weights are perturbed, or were left behind by a step that was interrupted."""
        return bool(self._noted)

    @property
    def params(self) -> list[Tensor]:
        """The parameters that are perturbed."""
        return [p for b in self._noted for p in b.params]

    def apply(
        self, buckets: Sequence[ParameterBucket], settings: Sequence[PerturbParams], squared: Tensor
    ) -> PerturbationSums:
        """Perturbs every bucket, or none when one fails; returns what was added up, over all of them and all ranks."""
        parts: list[tuple[Hashable, Tensor]] = []
        try:
            for b, setting in zip(buckets, settings, strict=True):
                b.bucket.stashed = False
                self._noted.append(b)
                operation, *arguments = self._prepare(b, setting, squared.to(b.bucket.device))
                parts.append((b.key, ops.run(operation, b.bucket, *arguments)))
                self._is_written(b)
        except BaseException:  # a later bucket failed: the earlier ones must not stay perturbed
            self.undo()
            raise
        self._wrote(buckets)
        return PerturbationSums(*self._reducer.total_and_count(parts, [b.elements for b in buckets], len(ops.NAMES_OF_SUMS)))

    def undo(self, convert: bool = False) -> None:
        """Puts w back, bit for bit; without a perturbation nothing happens.

        Weights that have been moved are followed. Where only their strides are others the values go to where they belong.

        Args:
            convert: put w back whatever has become of the weights: cast to their dtype, on their device. Those of another
                shape, and those whose memory cannot be written, get memory of their own.

        Raises:
            WeightsChanged: without `convert`, where weights are of another dtype, shape or device than those that were
                perturbed, or share memory. Nothing has been written.
            RuntimeError: with `convert`, where w of some weights is lost with them. All others are w again.
        """
        if not self._noted:
            return
        written = self.written()
        if written:
            self._last = None  # its codes are about to go without those of the others
        found = self._changes(written)
        if not convert and any(found):
            refuse_changes(written, found)
        lost = 0
        for b, changed in zip(written, found, strict=True):
            if not changed:
                self.put_back(b)
                continue
            for row, (p, w) in enumerate(zip(b.params, self.origins(b, changed), strict=True)):
                if w is None:
                    lost += 1
                else:
                    put(p, b.bucket.weights[row], w, changed.get(row))
            if self.stash is not None:
                self.stash.settle(b)
        self._close()
        if lost:
            raise RuntimeError(
                f"SAM: {lost} weights were written or lost their memory between the two passes, and with stash='ulp' w is "
                "told from w + e, which lay there. They are as they were left; all others are w again. Load these from a "
                "checkpoint; stash='copy' keeps them"
            )

    def check_weights(self) -> bool:
        """Whether every perturbed weight is laid out as it was; raises as `undo` does, and writes nothing."""
        written = self.written()
        found = self._changes(written)
        refuse_changes(written, found)
        return not any(found)

    def _changes(self, written: list[ParameterBucket]) -> Changes:
        found = changes(written)
        if self.stash is not None:
            self.stash.changes(written, found)
        return found

    @contextlib.contextmanager
    def settled(self) -> Iterator[list[ParameterBucket]]:
        """Hands the perturbed buckets to a block that writes all their weights itself. Until it has, w can be put back."""
        yield self.written()
        self._close()

    def settles_with(self, bucket: plan.Bucket) -> None:
        """The weights of this bucket are written last, in a call that clears `plan.Bucket.stashed`, and w is gone with them.
        Until then w can be put back everywhere; from then on there is nothing to put back, anywhere."""
        self._last = bucket

    def take_gradients(self, scaled: bool) -> None:
        """Gives the base optimizer's tensors the gradients to step with.

        Args:
            scaled: a GradScaler has looked for gradients at the base optimizer's tensors.
        """

    def stepping(self) -> contextlib.AbstractContextManager[None]:
        """Around the base optimizer's step."""
        return contextlib.nullcontext()

    def state_loaded(self) -> None:
        """The optimizer has loaded a state."""

    def _close(self) -> None:
        self._wrote(self._noted)
        self._noted, self._last = [], None

    def _wrote(self, buckets: Sequence[ParameterBucket]) -> None:
        self._reducer.mark_modified(p for b in buckets for p in b.params)
        torch.clear_autocast_cache()  # or an enclosing autocast region would go on with its casts of the old weights

    def _prepare(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Iterable[Any]:
        """Makes ready to perturb one bucket; returns the operation's name and its arguments. It returns the six sums."""
        assert self.stash is not None
        self.stash.make_ready(b)
        return (self.stash.operations(b.bucket)[0], squared, *setting)

    def _is_written(self, b: ParameterBucket) -> None:
        """The operation has perturbed a bucket."""
        ops.mark_modified(b.bucket.weights)
        if self.stash is not None:
            self.stash.note(b)

    def writes(self, b: ParameterBucket) -> bool:
        """Whether weights of this noted bucket may have been written, so that w has to be put back."""
        return b.bucket.stashed and (self._last is None or self._last.stashed)

    def written(self) -> list[ParameterBucket]:
        """The noted buckets whose weights may have been written."""
        return list(filter(self.writes, self._noted))

    def put_back(self, b: ParameterBucket) -> None:
        """Puts w back into the weights of a bucket, which are laid out as they were."""
        assert self.stash is not None
        self.stash.restore(b)
        ops.mark_modified(b.bucket.weights)

    def origins(self, b: ParameterBucket, changed: dict[int, Change]) -> Sequence[Tensor | None]:
        """w of a bucket's tensors in the dtype and shape that they were perturbed in; None where it is lost."""
        assert self.stash is not None
        return self.stash.origins(b, changed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted": [], "_last": None}  # copies and pickles are refused while perturbed


class StochasticPerturbation(Perturbation):
    """w + e rounded at random to one of its neighbours, so that the mean over steps is w + e; w is kept aside.

    It keeps the mean of the step, not its direction: most of what is stored is rounding noise.

    Args:
        seed: with the number of the ascent, the key of the random numbers.
    """

    def __init__(self, reducer: ShardReducer, stash: Stash, seed: int) -> None:
        super().__init__(reducer, stash)
        self._seed = seed

    def check(self, params: Sequence[Tensor]) -> None:
        super().check(params)
        if not any(p.dtype.itemsize == 2 for p in params):
            raise ValueError("SAM: rounding='stochastic' is for 16-bit weights, and none is perturbed here")

    def _prepare(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Iterable[Any]:
        # Replicas draw the same numbers, or they would part; the shards of a tensor draw numbers of their own.
        key = seed_of(self._seed, self.number, self._reducer.part_number(b.params[0]))
        return (*super()._prepare(b, setting, squared), ops.seed_tensor(key, b.bucket.device))
