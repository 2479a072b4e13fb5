"""How w is kept while w + e stands in its place: as a copy here or in the host's memory, or as its distance from w + e."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from fastpost import plan
from fastpost.errors import unknown
from fastpost.ops import params as ops
from fastpost.sam.buckets import Change, Changes, ParameterBucket

KINDS = ("copy", "ulp", "cpu")
WRITTEN = Change("was written between the passes, and stash='ulp' tells w from w + e", in_place=True)


class Stash:
    """A copy of w on its device."""

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError where w cannot be kept this way."""

    def room(self, bucket: plan.Bucket) -> list[Tensor]:
        """Fills the stash's column of a bucket; returns what has to be kept along with it, of which bytes are counted."""
        # The buffer is kept along with its views, so that spans know the stash's padding to be its own.
        buffer, bucket.stash = plan.flat_like(bucket.weights)
        return [buffer]

    def operations(self, bucket: plan.Bucket) -> tuple[str, str]:
        """Those that keep w and write w + e, and that put w back into weights that are laid out as they were."""
        return "sam_perturb_", "sam_restore_"

    def make_ready(self, b: ParameterBucket) -> None:
        """w is about to be kept."""

    def note(self, b: ParameterBucket) -> None:
        """The weights are w + e now, and autograd knows that they were written."""

    def restore(self, b: ParameterBucket) -> None:
        """Puts w back into weights that are laid out as they were."""
        ops.run(self.operations(b.bucket)[1], b.bucket)

    def changes(self, buckets: Sequence[ParameterBucket], found: Changes) -> None:
        """Adds to the changes found those that matter to this stash."""

    def origins(self, b: ParameterBucket, changed: dict[int, Change]) -> Sequence[Tensor | None]:
        """w in the dtype and shape that it was perturbed in; None where it is lost."""
        return b.bucket.stash

    def settle(self, b: ParameterBucket) -> None:
        """w is back, by way of `origins`."""


class WatchedCodes(plan.CodeList):
    """Codes of weights that nobody else may write.

    Attributes:
        versions: of the weights when they had been perturbed, by which writing in between is noticed.
    """

    versions: list[int]


class UlpStash(Stash):
    """The number of floats between w and w + e: 8 bits for 16-bit weights, 16 bits for float32, and w itself in a list where
    the distance does not fit. w comes back bit for bit, whatever it is. A group whose list would take more than a copy gets
    a copy.

    It is told from w + e, so nobody may write the weights between the passes. Writing that autograd counts is refused.
    """

    def check(self, params: Sequence[Tensor]) -> None:
        for dtype in {p.dtype for p in params}:
            if dtype not in plan.CODES:
                raise ValueError(
                    f"SAM: stash='ulp' serves bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}; leave "
                    "those weights out with scope=, or use stash='copy'"
                )

    def room(self, bucket: plan.Bucket) -> list[Tensor]:
        self.check(bucket.weights)
        numels = [w.numel() for w in bucket.weights]
        if sum(-(-n >> 16) for n in numels) > 1 << 16 and bucket.dtype == torch.float32:
            raise ValueError(
                "SAM: stash='ulp' serves up to 65,536 pieces of 65,536 float32 elements in a parameter group; put the "
                "parameters into several groups, or use stash='copy'"
            )
        buffer, bucket.stash = plan.flat_like(bucket.weights, plan.CODES[bucket.dtype])
        bucket.codes = WatchedCodes(sum(numels), bucket.dtype, bucket.device)
        return [buffer]

    def operations(self, bucket: plan.Bucket) -> tuple[str, str]:
        return super().operations(bucket) if bucket.codes is None else ("sam_perturb_coded_", "sam_decode_")

    def make_ready(self, b: ParameterBucket) -> None:
        codes = _codes(b)
        if codes is not None and 8 * codes.capacity > 1024 + b.elements * b.bucket.dtype.itemsize // 2:
            b.keep(super().room)  # weights that are small against e: a copy takes less
            b.bucket.codes = None
        elif codes is not None:
            codes.origins, codes.waits, codes.versions = None, None, []

    def note(self, b: ParameterBucket) -> None:
        codes = _codes(b)
        if codes is not None:
            codes.versions = [] if b.sharded else [w._version for w in b.bucket.weights]

    @ops.without_grad
    def restore(self, b: ParameterBucket) -> None:
        codes = b.bucket.codes
        if codes is None or codes.origins is None:
            super().restore(b)
        else:  # an interrupt came while these were written
            for w, origin in zip(b.bucket.weights, codes.origins, strict=True):
                if origin is not None:
                    w.copy_(origin)
        self.settle(b)

    def changes(self, buckets: Sequence[ParameterBucket], found: Changes) -> None:
        for b, rows in zip(buckets, found, strict=True):
            codes = _codes(b)
            if codes is None:
                continue
            if codes.origins is not None:
                rows.update((row, WRITTEN) for row, origin in enumerate(codes.origins) if origin is None)
                continue
            for row, (w, version) in enumerate(zip(b.bucket.weights, codes.versions, strict=False)):  # none if interrupted
                if w._version != version:
                    rows[row] = WRITTEN

    @ops.without_grad
    def origins(self, b: ParameterBucket, changed: dict[int, Change]) -> Sequence[Tensor | None]:
        codes = b.bucket.codes
        if codes is None:
            return super().origins(b, changed)
        lost = {row for row, change in changed.items() if not change.in_place or change is WRITTEN}
        if codes.origins is None:
            as_they_were = [
                torch.empty_strided(b.layout.shape(row), b.layout.stride(row), dtype=b.layout.dtype, device=b.layout.device)
                for row in range(len(b.params))
            ]
            for row, (there, w) in enumerate(zip(as_they_were, b.bucket.weights, strict=True)):
                if row not in lost:
                    there.copy_(w)
            was = plan.Bucket(b.bucket.streams, weights=as_they_were, stash=b.bucket.stash, walkable=b.bucket.walkable)
            # What is decoded here are copies, so the note of what is decoded there stays.
            was.codes = copy.copy(codes)
            was.codes.waits = None if codes.waits is None else codes.waits.clone()
            ops.run("sam_decode_", was)
            codes.origins = [None if row in lost else w for row, w in enumerate(as_they_were)]
        return codes.origins

    def settle(self, b: ParameterBucket) -> None:
        if b.bucket.codes is not None:
            b.bucket.stashed = False
            b.bucket.codes.origins = None


def _codes(b: ParameterBucket) -> WatchedCodes | None:
    codes = b.bucket.codes
    assert codes is None or isinstance(codes, WatchedCodes)
    return codes


class HostStash(Stash):
    """A copy of w in the host's pinned memory, written and read on the current stream of the weights' device."""

    def check(self, params: Sequence[Tensor]) -> None:
        if any(p.is_cpu for p in params):
            raise ValueError(
                "SAM: stash='cpu' moves w to the host's memory, where these weights lie already; use stash='ulp' or 'copy'"
            )

    def room(self, bucket: plan.Bucket) -> list[Tensor]:
        self.check(bucket.weights)
        return [torch.empty_like(w, device="cpu", pin_memory=w.is_cuda, requires_grad=False) for w in bucket.weights]

    @ops.without_grad
    def make_ready(self, b: ParameterBucket) -> None:
        for there, w in zip(b.kept, b.bucket.weights, strict=True):
            there.copy_(w, non_blocking=True)
        # The kernel's copy goes onto the weight itself, so it changes nothing. A list of its own, to be pointed at anew
        # whenever weights have moved.
        b.bucket.stash = list(b.bucket.weights)

    @ops.without_grad
    def restore(self, b: ParameterBucket) -> None:
        for there, w in zip(b.kept, b.bucket.weights, strict=True):
            w.copy_(there, non_blocking=True)

    def origins(self, b: ParameterBucket, changed: dict[int, Change]) -> Sequence[Tensor | None]:
        if b.layout.device.type == "cuda":
            torch.cuda.synchronize(b.layout.device)  # the host may be who reads them
        return b.kept


def build_stash(kind: str) -> Stash:
    """Raises ValueError for a kind that does not exist."""
    if kind not in KINDS:
        raise unknown("stash", kind, KINDS)
    return {"copy": Stash, "ulp": UlpStash, "cpu": HostStash}[kind]()
