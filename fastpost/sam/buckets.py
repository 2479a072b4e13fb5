"""Buckets of parameters that outlive a step, although gradients are allocated anew in each."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost import plan
from fastpost.ops import params as ops


class ParameterBucket:
    """A bucket of one parameter group's tensors, kept from step to step while addresses and gradients come and go."""

    def __init__(self, bucket: plan.Bucket, parameters: list[Tensor], group: int, stash: bool) -> None:
        self.bucket = bucket
        self.parameters = parameters
        self.group = group
        self.elements = sum(p.numel() for p in parameters)
        # The buffer is held beside its views, so that spans know the stash's padding to be its own.
        self._stash_buffer: Tensor | None = None
        if stash:
            self._stash_buffer, bucket.stash = plan.flat_like(parameters)

    def point(self) -> bool:
        """Takes the gradients present; False when the bucket has to be built anew."""
        bucket = self.bucket
        grads: list[Tensor] = [p.grad for p in self.parameters]  # type: ignore[misc]
        for p, g in zip(self.parameters, grads, strict=True):
            if p.dtype != bucket.dtype or p.device != bucket.device:
                return False
            if bucket.walkable and (g.layout != torch.strided or g.stride() != p.stride()):
                return False
        bucket.grads = grads
        return True


def cached_buckets(
    cache: dict[tuple[int, ...], list[ParameterBucket]], rows: list[tuple[int, Tensor]], stash: bool
) -> list[ParameterBucket]:
    """Buckets of (group, parameter) rows with gradients; built and checked when the set of parameters changes."""
    key = tuple([id(p) for _, p in rows])
    buckets = cache.get(key)
    if buckets is not None and all(b.point() for b in buckets):
        return buckets
    grads: list[Tensor] = [p.grad for _, p in rows]  # type: ignore[misc]
    ops.check_lists("SAM", {"parameters": [p for _, p in rows], "gradients": grads}, written=("parameters",))
    buckets = []
    for index in sorted({index for index, _ in rows}):
        members = [p for i, p in rows if i == index]
        for bucket in ops.make_buckets(weights=members, grads=[p.grad for p in members]):  # type: ignore[misc]
            buckets.append(ParameterBucket(bucket, bucket.weights, index, stash))
    cache.clear()  # of the last set only: each keeps a copy of the weights
    cache[key] = buckets
    return buckets
