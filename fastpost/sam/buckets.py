"""Buckets of parameters that outlive a step, although gradients are allocated anew in each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpost import plan
from fastpost.ops import params as ops
from fastpost.sam.layout import Layout, has_lost_memory
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
        walkable: whether weights and gradients can be walked by address, in step.
        layout: of the weights that the bucket was built for. Those of another layout take another bucket.
        addresses: of the weights, when the bucket last took gradients.
        moved: whether it found them elsewhere than the time before.
    """

    def __init__(
        self, bucket: plan.Bucket, params: list[Tensor], group: int, key: Hashable, rows: list[int], stash: bool
    ) -> None:
        self.bucket = bucket
        self.params = params
        self.group = group
        self.key = key
        self.rows = rows
        self.walkable = bucket.walkable
        self.layout = Layout(bucket.weights)
        self.addresses: list[int] = []
        self.moved = self._note_addresses()
        self.elements = sum(p.numel() for p in bucket.weights)
        self.elements_everywhere = sum(p.numel() for p in params)
        # The buffer is held beside its views, so that spans know the stash's padding to be its own.
        self._stash_buffer: Tensor | None = None
        if stash:
            self._stash_buffer, bucket.stash = plan.flat_like(bucket.weights)

    def point(self, grads: list[Tensor], reduction: Reduction) -> bool:
        """Takes these gradients; False when the bucket has to be built anew."""
        # Weights can be given other storage between steps (model.to(), p.data = ...); a stale plan would walk off its end.
        weights = self.follow(reduction)
        if not self.layout.shared_by(weights) or not self.layout.fits(grads, self.walkable):
            return False
        self.moved = self._note_addresses()
        self.bucket.grads = grads
        return True

    def _note_addresses(self) -> bool:
        before, self.addresses = self.addresses, list(map(Tensor.data_ptr, self.bucket.weights))
        return before != self.addresses

    def follow(self, reduction: Reduction) -> list[Tensor]:
        """The weights as they are now."""
        if reduction.shards:
            self.bucket.weights = [reduction.local(p) for p in self.params]
        return self.bucket.weights


class BucketCache:
    """The buckets of all parameters that have a gradient; built and checked only when that set or a layout changes.

    Args:
        stash: whether each bucket keeps room for a copy of its weights.
        reduction: where a parameter's part on this rank lies.
        reads_only: nothing will be written, and parameters that operations do not serve are kept apart in `others`;
            otherwise they are refused.

    Attributes:
        others: parameters in no bucket: complex, sparse, without data.
    """

    def __init__(self, stash: bool, reduction: Reduction, reads_only: bool = False) -> None:
        self._stash = stash
        self._reduction = reduction
        self._reads_only = reads_only
        self._key: tuple[int, ...] = ()
        self._buckets: list[ParameterBucket] = []
        self.others: list[Tensor] = []

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

        Raises:
            TypeError, ValueError: a tensor cannot be perturbed. Nothing has been written.
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
            elif not self._reads_only and any(b.moved for b in self._buckets):
                self._check_written([w for b in self._buckets for w in b.bucket.weights])
            del found, grads
            yield self._buckets
        finally:
            for b in self._buckets:
                b.bucket.release_gradients()

    def _build(self, groups: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> list[ParameterBucket]:
        weights = [self._reduction.local(p) for p in params] if self._reduction.shards else params
        served = self._served(weights, grads)
        self.others = [p for row, p in enumerate(params) if row not in served]
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        members: dict[tuple[int, Hashable], list[int]] = {}
        for row in served:
            members.setdefault((group_of[id(params[row])], self._reduction.key(params[row])), []).append(row)
        result = []
        for (group, key), rows in members.items():
            buckets = ops.make_buckets(weights=[weights[i] for i in rows], grads=[grads[i] for i in rows], streams=rows)
            for bucket in buckets:
                mine = [params[i] for i in bucket.streams]
                result.append(ParameterBucket(bucket, mine, group, key, bucket.streams, self._stash))
        return result

    def _served(self, weights: list[Tensor], grads: list[Tensor]) -> dict[int, None]:
        """The rows that go into buckets, in order."""
        if not self._reads_only:
            _check_served(weights, grads)
            self._check_written(weights)
            return dict.fromkeys(range(len(weights)))
        rows: dict[int, None] = {}
        for row in range(len(weights)):
            with contextlib.suppress(TypeError, ValueError):
                _check_served([weights[row]], [grads[row]])
                rows[row] = None
        return rows

    def _check_written(self, weights: list[Tensor]) -> None:
        for i, w in enumerate(weights):
            if has_lost_memory(w):
                raise ValueError(f"SAM: the memory of parameters[{i}] was given away; give it back before the ascent")
        ops.check_memory("SAM", "parameters", weights)


def _check_served(weights: list[Tensor], grads: list[Tensor]) -> None:
    """Raises TypeError or ValueError where operations cannot read one of these tensors."""
    for i, w in enumerate(weights):
        if w.device.type == "meta":
            raise ValueError(
                f"SAM: parameters[{i}] is a meta tensor, which has a shape and no values; give the model its weights first "
                "(to_empty() and load_state_dict()), or leave it out with scope="
            )
        wrapper: bool = is_traceable_wrapper_subclass(w)
        if wrapper:
            raise TypeError(
                f"SAM: parameters[{i}] is a {type(w).__name__}, whose values lie in other tensors where they cannot be "
                "written as numbers; leave it out with scope="
            )
    try:
        ops.check_lists("SAM", {"parameters": weights, "gradients": grads}, written=())
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}. What is not to be perturbed is left out with scope=") from None


def total_squared_norm(buckets: Sequence[ParameterBucket], etas: Sequence[float | None], reduction: Reduction) -> Tensor:
    """Squared norm of all gradients, scaled by abs(w) + eta where there is an eta, over all ranks: a float64 scalar."""
    parts: dict[Hashable, Tensor] = {}
    for b, eta in zip(buckets, etas, strict=True):
        add_part(parts, b.key, ops.run("squared_norm", b.bucket, eta))
    return reduction.total(parts)
