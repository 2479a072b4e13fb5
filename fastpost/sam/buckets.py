"""Buckets of parameters that outlive a step, although gradients are allocated anew in each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastpost import plan
from fastpost.ops import params as ops


class ParameterBucket:
    """A bucket of one parameter group's tensors, kept from step to step.

    Attributes:
        bucket: the columns as operations take them.
        group: index of the parameter group.
        rows: where its tensors stand among all that have a gradient.
    """

    def __init__(self, bucket: plan.Bucket, group: int, rows: list[int], stash: bool) -> None:
        self.bucket = bucket
        self.group = group
        self.rows = rows
        self._numels = [p.numel() for p in bucket.weights]
        self.elements = sum(self._numels)
        # The buffer is held beside its views, so that spans know the stash's padding to be its own.
        self._stash_buffer: Tensor | None = None
        if stash:
            self._stash_buffer, bucket.stash = plan.flat_like(bucket.weights)

    def point(self, grads: list[Tensor]) -> bool:
        """Takes these gradients; False when the bucket has to be built anew."""
        # Weights can be given other storage between steps (model.to(), p.data = ...); a stale plan would walk off its end.
        bucket, weights = self.bucket, self.bucket.weights
        if {p.dtype for p in weights} != {bucket.dtype} or weights[0].device != bucket.device:
            return False
        if list(map(Tensor.numel, weights)) != self._numels:
            return False
        if bucket.walkable:
            try:
                if list(map(Tensor.stride, grads)) != list(map(Tensor.stride, weights)):
                    return False
            except RuntimeError:  # a sparse gradient has no strides
                return False
        bucket.grads = grads
        return True


class BucketCache:
    """The buckets of all parameters that have a gradient; built and checked only when that set or a layout changes.

    Args:
        stash: whether each bucket keeps room for a copy of its weights.
    """

    def __init__(self, stash: bool) -> None:
        self._stash = stash
        self._key: tuple[int, ...] = ()
        self._buckets: list[ParameterBucket] = []

    def of(self, groups: list[dict[str, Any]], scope: set[int] | None) -> list[ParameterBucket]:
        """Buckets of the tensors in scope (ids, or None for all), pointing at the gradients present."""
        params = [p for group in groups for p in group["params"]]
        if scope is not None:
            params = [p for p in params if id(p) in scope]
        grads = [p.grad for p in params]
        if type(None) in set(map(type, grads)):
            params = [p for p, g in zip(params, grads, strict=True) if g is not None]
            grads = [g for g in grads if g is not None]
        key = tuple(map(id, params))
        if key != self._key or not all(
            b.point(grads if len(b.rows) == len(grads) else [grads[i] for i in b.rows]) for b in self._buckets
        ):
            self._buckets = self._build(groups, params, grads) if params else []
            self._key = key
        return self._buckets

    def _build(self, groups: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> list[ParameterBucket]:
        ops.check_lists("SAM", {"parameters": params, "gradients": grads}, written=("parameters",))
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        members: dict[int, list[int]] = {}
        for row, p in enumerate(params):
            members.setdefault(group_of[id(p)], []).append(row)
        result = []
        for group, rows in sorted(members.items()):
            weights, gradients = [params[i] for i in rows], [grads[i] for i in rows]
            for bucket in ops.make_buckets(weights=weights, grads=gradients, streams=rows):
                result.append(ParameterBucket(bucket, group, bucket.streams, self._stash))
        return result
