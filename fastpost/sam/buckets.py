"""Buckets of parameters that outlive a step, although gradients are allocated anew in each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor

from fastpost import plan
from fastpost.ops import params as ops
from fastpost.sam.reduction import Reduction, add_part

Gradient = Callable[[Tensor], Tensor | None]


class ParameterBucket:
    """A bucket of one parameter group's tensors, kept from step to step.

    Attributes:
        bucket: the columns as operations take them; with shards, this rank's part.
        params: the parameters, as the optimizer knows them.
        group: index of the parameter group.
        key: parameters whose norms are reduced over the same ranks.
        elements, elements_everywhere: how many elements lie on this rank, and on all that share the parameters.
        rows: where its tensors stand among all that have a gradient.
    """

    def __init__(
        self, bucket: plan.Bucket, params: list[Tensor], group: int, key: Hashable, rows: list[int], stash: bool
    ) -> None:
        self.bucket = bucket
        self.params = params
        self.group = group
        self.key = key
        self.rows = rows
        self._numels = [p.numel() for p in bucket.weights]
        self.elements = sum(self._numels)
        self.elements_everywhere = sum(p.numel() for p in params)
        # The buffer is held beside its views, so that spans know the stash's padding to be its own.
        self._stash_buffer: Tensor | None = None
        if stash:
            self._stash_buffer, bucket.stash = plan.flat_like(bucket.weights)

    def point(self, grads: list[Tensor], reduction: Reduction) -> bool:
        """Takes these gradients; False when the bucket has to be built anew."""
        # Weights can be given other storage between steps (model.to(), p.data = ...); a stale plan would walk off its end.
        bucket, weights = self.bucket, self.bucket.weights
        if reduction.shards:
            weights = bucket.weights = [reduction.local(p) for p in self.params]
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
        reduction: where a parameter's part on this rank lies.
    """

    def __init__(self, stash: bool, reduction: Reduction) -> None:
        self._stash = stash
        self._reduction = reduction
        self._key: tuple[int, ...] = ()
        self._buckets: list[ParameterBucket] = []

    @contextlib.contextmanager
    def of(
        self, groups: list[dict[str, Any]], scope: set[int] | None, gradient: Gradient | None = None
    ) -> Iterator[list[ParameterBucket]]:
        """Buckets of the tensors in scope (ids, or None for all), pointing at their gradients inside of the block. After it
        they hold none: what the caller drops between two passes must be free for the second.

        Args:
            groups: parameter groups.
            scope: ids of the tensors to take; None for all.
            gradient: what to take for a tensor's gradient, or None for one that has none; by default its own.
        """
        params = [p for group in groups for p in group["params"]]
        if scope is not None:
            params = [p for p in params if id(p) in scope]
        if gradient is None and self._reduction.shards:
            gradient = self._reduction.gradient
        found = [p.grad for p in params] if gradient is None else list(map(gradient, params))
        if type(None) in set(map(type, found)):
            params = [p for p, g in zip(params, found, strict=True) if g is not None]
            found = [g for g in found if g is not None]
        grads = cast("list[Tensor]", found)
        key = tuple(map(id, params))
        try:
            if key != self._key or not all(
                b.point(grads if len(b.rows) == len(grads) else [grads[i] for i in b.rows], self._reduction)
                for b in self._buckets
            ):
                self._key = ()
                self._buckets = self._build(groups, params, grads) if params else []
                self._key = key
            del found, grads
            yield self._buckets
        finally:
            for b in self._buckets:
                b.bucket.release_gradients()

    def _build(self, groups: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> list[ParameterBucket]:
        weights = [self._reduction.local(p) for p in params] if self._reduction.shards else params
        ops.check_lists("SAM", {"parameters": weights, "gradients": grads}, written=("parameters",))
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        members: dict[tuple[int, Hashable], list[int]] = {}
        for row, p in enumerate(params):
            members.setdefault((group_of[id(p)], self._reduction.key(p)), []).append(row)
        result = []
        for (group, key), rows in members.items():
            buckets = ops.make_buckets(weights=[weights[i] for i in rows], grads=[grads[i] for i in rows], streams=rows)
            for bucket in buckets:
                mine = [params[i] for i in bucket.streams]
                result.append(ParameterBucket(bucket, mine, group, key, bucket.streams, self._stash))
        return result


def total_squared_norm(buckets: Sequence[ParameterBucket], etas: Sequence[float | None], reduction: Reduction) -> Tensor:
    """Squared norm of all gradients, scaled by abs(w) + eta where there is an eta, over all ranks: a float64 scalar."""
    parts: dict[Hashable, Tensor] = {}
    for b, eta in zip(buckets, etas, strict=True):
        add_part(parts, b.key, ops.run("squared_norm", b.bucket, eta))
    return reduction.total(parts)
