"""Buckets of parameters that outlive a step: their layout, their shards, and sums over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpost import distributed, plan
from fastpost.ops import params as ops
from fastpost.ranks import NormGroup, Ranks


class ShardReducer:
    """Sums over the ranks that hold the other parts of sharded parameters. A process without others reduces nothing.

    Plain parameters are taken to be the same on all ranks, gradients included (one process, DDP), and are not reduced over,
    but over the ranks that a caller names. All sums are float64, scalars or vectors; nothing here waits for a device.

    Args:
        norm_group: the ranks that hold other parameters, as `SAM` takes it.
    """

    def __init__(self, norm_group: NormGroup = None) -> None:
        self._ranks = Ranks(norm_group)
        self._apart = not self.named  # whether named ranks are known to hold different parameters

    @property
    def named(self) -> bool:
        """Whether a caller has named ranks, which may make their passes at different times."""
        return self._ranks.named

    @property
    def others(self) -> bool:
        """Whether other ranks hold parts of these parameters, or others."""
        return self._ranks.others

    def know(self, groups: list[dict[str, Any]]) -> None:
        """Learns who shares the parameters of these groups, so that all ranks reduce alike, whatever has a gradient."""
        self._ranks.know(groups)

    def key(self, p: Tensor) -> Hashable:
        """Parameters with the same key are summed together before one reduction over the ranks that share them."""
        return self._ranks.sharing(p)

    def part_number(self, p: Tensor) -> int:
        """Which of its parts this rank holds: the same on ranks that hold the same."""
        return self._ranks.part_number(p)

    def total(self, parts: Iterable[tuple[Hashable, Tensor]], shape: tuple[int, ...] = ()) -> Tensor:
        """The sum of the parts, each given with its key and reduced over the ranks that hold its other parts.

        Args:
            parts: keys and scalars or vectors; maybe none.
            shape: of a part.
        """
        sums: dict[Any, Tensor] = {}
        for key, part in parts:
            sums[key] = ops.plus(sums.get(key), part)
        if len(sums) == 1 and () in sums and not self._ranks.others:  # as nearly always
            return sums[()]
        if sums and not distributed.active():
            return functools.reduce(ops.plus, sums.values())
        return self._ranks.sum(sums, shape)

    def total_and_count(
        self, parts: Sequence[tuple[Hashable, Tensor]], counts: Sequence[int], length: int
    ) -> tuple[Tensor, int | Tensor]:
        """`total` of vectors of this length, and of the counts that come with them, in the same reductions."""
        if not self._ranks.others:
            return self.total(parts, (length,)), sum(counts)
        longer = [(key, torch.cat([part, part.new_full((1,), n)])) for (key, part), n in zip(parts, counts, strict=True)]
        found = self.total(longer, (length + 1,))
        return found[:-1], found[-1]

    def agree(self, flag: Tensor) -> Tensor:
        """1.0 where any rank's flag is, as a float32 scalar."""
        return self._ranks.any(flag)

    def pool(self, values: Tensor) -> Tensor:
        """A vector summed over all ranks that share or repeat parameters, each as often as another: its ratios are right."""
        return self._ranks.pool(values)

    def refuse_copies(self, buckets: Sequence[ParameterBucket]) -> None:
        """Looks, once, whether ranks that a caller has named hold the same parameters, which would be counted twice.

        The same weights with the same gradient tell: replicas have averaged theirs, and copies of a tied weight have added
        theirs up. Weights of zero, as biases begin, may have the same gradient by themselves (around a branch that adds
        nothing yet), and count where all of two ranks' parameters are alike.

        Raises:
            ValueError: two ranks have. Nothing has been written.
        """
        if self._apart:
            return
        found = (zip(b.params, b.bucket.weights, b.bucket.grads, strict=True) for b in buckets)
        tensors = [(p, w, g) for part in found for p, w, g in part if g.numel() > 1]

        def of(members: tuple[int, ...]) -> list[tuple[Any, ...]]:
            mine = [(p, w, g) for p, w, g in tensors if members in self._ranks.outer(p)]
            marks = [(tuple(p.shape), *_marks_of(g), *_marks_of(w)) for p, w, g in mine]
            return [mark for mark in marks if 0 < mark[1] < math.inf]

        for members, everywhere in self._ranks.gathered(of):
            first: dict[tuple[Any, ...], int] = {}
            for rank, marks in zip(members, everywhere, strict=True):
                copied = marks in everywhere[: members.index(rank)]
                for mark in marks:
                    if first.setdefault(mark, rank) != rank and (copied or mark[3]):
                        raise ValueError(
                            f"SAM: ranks {first[mark]} and {rank} of norm_group have the same values and gradient of a "
                            f"parameter of shape {mark[0]}, which would count twice. norm_group names ranks that hold "
                            "different parameters (pipeline stages, experts), not replicas; a weight tied between stages is "
                            "not served: untie it"
                        )
        self._apart = True

    def mark_modified(self, params: Iterable[Tensor]) -> None:
        """Called after weights were written in place, by perturbing or restoring."""
        if distributed.active():
            distributed.reshard(params)


def _marks_of(t: Tensor) -> tuple[float, float]:
    """Two numbers that the same values have, and others hardly."""
    return float(torch.linalg.vector_norm(t, dtype=torch.float64)), float(t.sum(dtype=torch.float64))


def check_sharding(params: Iterable[Tensor], sync_ascent: bool | None) -> None:
    """Raises ValueError where ranks are asked for ascents of their own and none holds a whole gradient."""
    if sync_ascent is False and any(distributed.is_sharded(p) for p in params):
        raise ValueError(
            "SAM: sync_ascent=False lets each rank perturb by its own gradient, and of sharded parameters (FSDP2, tensor "
            "parallel) no rank has one; leave sync_ascent out, or use DDP"
        )


class WeightsChanged(RuntimeError):
    """Between the two passes weights have become something that w does not fit into exactly. Nothing was written."""


class Change(NamedTuple):
    """A weight that is not laid out as it was when it was perturbed.

    Attributes:
        why_not: why w does not fit into it bit for bit, in words; None where it does, in another order in memory.
        in_place: whether values can be written where the weight lies.
    """

    why_not: str | None
    in_place: bool


Changes = list[dict[int, Change]]  # of each bucket: its rows that changed


class Layout:
    """dtype, device, shapes and strides of the tensors of one bucket, and whether their values are those in memory with the
    sign turned."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self._shapes, self._strides = [t.shape for t in tensors], [t.stride() for t in tensors]
        self._signs = [t.is_neg() for t in tensors]

    def shape(self, row: int) -> torch.Size:
        """Of the tensor of this row."""
        return self._shapes[row]

    def stride(self, row: int) -> tuple[int, ...]:
        """Of the tensor of this row."""
        return self._strides[row]

    def shared_by(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are laid out the same in every respect."""
        return all(self.change(row, t) is None for row, t in enumerate(tensors))

    def fits(self, gradients: Sequence[Tensor], walkable: bool) -> bool:
        """Whether gradients agree with these tensors as operations need it: walkable ones in their strides too."""
        if walkable:
            return self.shared_by(gradients)
        known, strided = (self.dtype, self.device), torch.strided
        return [g.shape for g in gradients] == self._shapes and all(
            (g.dtype, g.device) == known and g.layout == strided for g in gradients
        )

    def change(self, row: int, w: Tensor) -> Change | None:
        """How `w` differs from the tensor of this row; None where it does not."""
        if w.layout != torch.strided:
            return Change(f"is of layout {w.layout} now", in_place=False)
        if w.shape != self._shapes[row]:
            return Change(f"has shape {tuple(w.shape)} now", in_place=False)
        if w.is_meta:
            return Change("is a meta tensor now", in_place=False)
        if has_lost_memory(w):
            return Change("has lost its memory", in_place=False)
        if not plan.distinct(w):
            return Change("is expanded now (its elements share memory)", in_place=False)
        if w.dtype != self.dtype:
            return Change(f"was {_name(self.dtype)} and is {_name(w.dtype)} now", in_place=True)
        if w.device != self.device:
            return Change(f"was on {self.device} and is on {w.device} now", in_place=True)
        same = w.stride() == self._strides[row] and w.is_neg() == self._signs[row]
        return None if same else Change(None, in_place=True)


def changes(buckets: Sequence[ParameterBucket]) -> Changes:
    """What has become of the weights of these buckets since they took their gradients; nothing is written."""
    found: Changes = []
    moved = False
    for b in buckets:
        rows: dict[int, Change] = {}
        if not b.unchanged() or b.moved:
            known = ((row, b.layout.change(row, w)) for row, w in enumerate(b.bucket.weights))
            rows = {row: change for row, change in known if change is not None}
        moved = moved or b.moved
        found.append(rows)
    if moved:
        _find_shared_memory(buckets, found)
    return found


def _find_shared_memory(buckets: Sequence[ParameterBucket], found: Changes) -> None:
    places = [
        (rows, row, w)
        for b, rows in zip(buckets, found, strict=True)
        for row, w in enumerate(b.bucket.weights)
        if row not in rows or rows[row].in_place
    ]
    while (pair := plan.overlap([w for _, _, w in places])) is not None:
        rows, row, _ = places.pop(pair[0])
        rows[row] = Change("shares memory with another weight now", in_place=False)


def refuse_changes(buckets: Sequence[ParameterBucket], found: Changes) -> None:
    """Raises WeightsChanged where w does not fit into every weight exactly."""
    reasons = [
        f"a weight of shape {tuple(b.layout.shape(row))} {change.why_not}"
        for b, rows in zip(buckets, found, strict=True)
        for row, change in rows.items()
        if change.why_not is not None
    ]
    if reasons:
        others = f" ({len(reasons)} weights are affected)" if len(reasons) > 1 else ""
        raise WeightsChanged(
            f"SAM: {reasons[0]}{others}; w cannot be put back into it bit for bit. opt.abandon() puts w back, converted to "
            "what the weights are now, and gives this step up; change a model between steps, not between the two passes"
        )


@ops.without_grad
def put(p: Tensor, w: Tensor, values: Tensor, change: Change | None) -> None:
    """Writes values into the parameter `p` whose part on this rank is `w`, converted; into memory of its own if need be."""
    if change is None or change.in_place:
        w.copy_(values)
        return
    device = values.device if w.is_meta else w.device
    dtype = w.dtype if w.dtype.is_floating_point else values.dtype
    p.data = distributed.like(p, values.to(device, dtype, copy=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_lost_memory(w: Tensor) -> bool:
    """Whether the tensor's storage is too small for it, as where it was resized to free memory."""
    last = sum(stride * (size - 1) for stride, size in zip(w.stride(), w.shape, strict=True))
    return w.numel() > 0 and (w.storage_offset() + last + 1) * w.element_size() > w.untyped_storage().nbytes()


Gradient = Callable[[Tensor], Tensor | None]
Room = Callable[[plan.Bucket], "list[Tensor]"]  # fills the stash's column; returns what has to be kept along with it


class ParameterBucket:
    """A bucket of one parameter group's tensors, kept from step to step.

    Attributes:
        bucket: the columns as operations take them; with shards, this rank's part.
        params: the parameters, as the optimizer knows them.
        group: index of the parameter group.
        key: parameters whose norms are reduced over the same ranks.
        device_type: "cpu", "cuda", ...
        elements: how many lie on this rank.
        rows: where its tensors stand among all that have a gradient.
        walkable: whether weights and gradients can be walked by address, in step.
        sharded: whether any of them is cut over ranks.
        layout: of the weights that the bucket was built for. Those of another layout take another bucket.
        kept: what its stash has beside the column.
        moved: whether the weights lie elsewhere than when the bucket took gradients before, or have moved since.
    """

    def __init__(
        self, bucket: plan.Bucket, params: list[Tensor], group: int, key: Hashable, rows: list[int], room: Room | None
    ) -> None:
        self.bucket = bucket
        self.params = params
        self.group = group
        self.key = key
        self.rows = rows
        self.device_type = bucket.device.type
        self.walkable = bucket.walkable
        self.sharded = any(map(distributed.is_sharded, params))
        self.layout = Layout(bucket.weights)
        self.moved = False
        self._addresses = [w.data_ptr() for w in bucket.weights]
        ops.follow(bucket, held=not self.sharded)
        self.elements = sum(p.numel() for p in bucket.weights)
        self.kept: list[Tensor] = []
        if room is not None:
            self.keep(room)

    def keep(self, room: Room) -> None:
        """Has this stash from now on."""
        self.kept = room(self.bucket)

    @property
    def stash_bytes(self) -> int:
        """What is kept between the two passes so that w can be put back."""
        codes = self.bucket.codes
        return sum(t.nbytes for t in self.kept) + (0 if codes is None else codes.words.nbytes)

    def point(self, grads: list[Tensor]) -> bool:
        """Takes these gradients; False when the bucket has to be built anew."""
        bucket, self.moved = self.bucket, False
        if bucket.followed:
            if not (self.unchanged() and bucket.followed and bucket.follow(grads=grads)):
                return False
        elif not (self.unchanged() and self.layout.fits(grads, self.walkable)):
            return False
        bucket.grads = grads
        return True

    def take_gradients(self) -> bool:
        """As `point`, with the gradients that the parameters hold; False where the core cannot tell as well."""
        if not (self.bucket.followed and self.bucket.take_gradients()):
            return False
        self.moved = self.bucket.followed["weights"].moved
        return True

    def unchanged(self) -> bool:
        """Whether the weights, as they are now, are laid out as the bucket knows them; notes whether they have moved.

        Weights can be given other storage at any time (model.to(), p.data = ...); a stale plan would walk off its end.
        """
        weights, bucket = self.follow(), self.bucket
        if bucket.followed:
            if bucket.follow(weights=weights):
                self.moved = self.moved or bucket.followed["weights"].moved
                return True
            bucket.unfollow()
        if not self.layout.shared_by(weights):
            self.moved = True
            return False
        before, self._addresses = self._addresses, [w.data_ptr() for w in weights]
        self.moved = self.moved or before != self._addresses
        return True

    def compute_dtype(self) -> torch.dtype:
        """What the forward pass computes in, as far as is known: autocast's dtype, FSDP2's, else the weights' own."""
        if torch.is_autocast_enabled(self.device_type):
            return torch.get_autocast_dtype(self.device_type)
        sharded = distributed.compute_dtype(self.params) if self.sharded else None
        if sharded is torch.float64:  # casts of narrower weights to it lose nothing, so what is stored is seen
            sharded = None
        return sharded or self.bucket.dtype

    def follow(self) -> list[Tensor]:
        """The weights as they are now."""
        if self.sharded:
            self.bucket.weights = [distributed.local(p) for p in self.params]
        return self.bucket.weights


class BucketCache:
    """The buckets of all parameters that have a gradient; built and checked only when that set or a layout changes.

    Args:
        room: fills the stash's column of a bucket; None where nothing is stashed.
        reducer: tells which parameters are summed together.
    """

    def __init__(self, room: Room | None, reducer: ShardReducer) -> None:
        self._room = room
        self._reducer = reducer
        self._key: tuple[int, ...] = ()
        self._buckets: list[ParameterBucket] = []
        self._selection: ops.Selection | None = None  # where every gradient is a parameter's own

    def take(
        self, groups: list[dict[str, Any]], scope: set[int] | None, gradient: Gradient | None = None
    ) -> list[ParameterBucket]:
        """Buckets of the tensors in scope, pointing at their gradients until `release`, whatever comes in between.

        Args:
            groups: parameter groups.
            scope: ids of the tensors to take; None for all.
            gradient: what to take for a tensor's gradient, or None for one that has none; by default its own.

        Raises:
            TypeError, ValueError: a tensor cannot be perturbed. Nothing has been written.
        """
        if gradient is not None or not self._taken(groups, scope):
            self._take(groups, scope, gradient)
        for b in self._buckets:
            if b.moved:
                self._check_written([w for b in self._buckets for w in b.bucket.weights])
                break
        return self._buckets

    def release(self) -> None:
        """The buckets hold no gradients: what the caller drops between two passes must be free for the second."""
        for b in self._buckets:
            b.bucket.release_gradients()

    @property
    def stash_bytes(self) -> int:
        """Of all buckets."""
        return sum(b.stash_bytes for b in self._buckets)

    def hold(self, groups: list[dict[str, Any]]) -> bool:
        """Whether these groups are known to hold the very parameters that they held when `take` was called last."""
        return self._selection is not None and self._selection.same_tensors(_params(groups, None))

    def _taken(self, groups: list[dict[str, Any]], scope: set[int] | None) -> bool:
        """Whether the buckets are those of the step before and have taken the parameters' gradients, all in a few calls."""
        if self._selection is None or not self._selection.same(_params(groups, scope)):
            return False
        for b in self._buckets:
            if not b.take_gradients():
                self._forget()  # some have followed weights that moved, and would not say so again
                return False
        return True

    def _forget(self) -> None:
        self._key, self._buckets = (), []

    def _take(self, groups: list[dict[str, Any]], scope: set[int] | None, gradient: Gradient | None) -> None:
        self._selection = None
        params = [p for part in _params(groups, scope) for p in part]
        own = gradient is None
        if gradient is None and distributed.active():
            gradient = distributed.local_gradient
        found = [p.grad for p in params] if gradient is None else list(map(gradient, params))
        held = params
        if type(None) in set(map(type, found)):
            params = [p for p, g in zip(params, found, strict=True) if g is not None]
            found = [g for g in found if g is not None]
        grads = cast("list[Tensor]", found)
        key = tuple(map(id, params))
        if key != self._key or not all(
            b.point(grads if len(b.rows) == len(grads) else [grads[i] for i in b.rows]) for b in self._buckets
        ):
            self._forget()
            self._buckets = self._build(groups, params, grads) if params else []
            self._key = key
        if own and all(b.bucket.followed and not b.sharded for b in self._buckets):
            self._selection = ops.Selection(held, "grad")

    def _build(self, groups: list[dict[str, Any]], params: list[Tensor], grads: list[Tensor]) -> list[ParameterBucket]:
        weights = [distributed.local(p) for p in params] if distributed.active() else params
        _check_served(weights, grads)
        self._check_written(weights)
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        members: dict[tuple[int, Hashable], list[int]] = {}
        for row in range(len(params)):
            members.setdefault((group_of[id(params[row])], self._reducer.key(params[row])), []).append(row)
        result = []
        for (group, key), rows in members.items():
            buckets = ops.make_buckets(weights=[weights[i] for i in rows], grads=[grads[i] for i in rows], streams=rows)
            for bucket in buckets:
                mine = [params[i] for i in bucket.streams]
                result.append(ParameterBucket(bucket, mine, group, key, bucket.streams, self._room))
        return result

    def _check_written(self, weights: list[Tensor]) -> None:
        for i, w in enumerate(weights):
            if has_lost_memory(w):
                raise ValueError(f"SAM: the memory of parameters[{i}] was given away; give it back before the ascent")
        ops.check_memory("SAM", "parameters", weights)


def _params(groups: list[dict[str, Any]], scope: set[int] | None) -> list[list[Tensor]]:
    """The groups' parameters in scope, a list for each group."""
    if scope is None:
        return [group["params"] for group in groups]
    return [[p for p in group["params"] if id(p) in scope] for group in groups]


def _check_served(weights: list[Tensor], grads: list[Tensor]) -> None:
    """Raises TypeError or ValueError where operations cannot read one of these tensors."""
    for i, w in enumerate(weights):
        if w.is_meta:
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
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        if g.dtype != w.dtype and g.dtype.is_floating_point and w.dtype.is_floating_point:
            raise ValueError(
                f"SAM: parameters[{i}] is {w.dtype} and its gradient {g.dtype}, as grad_dtype makes it; SAM reads gradients "
                "in the dtype of the weights. Say p.grad_dtype = p.dtype; where gradients are to be summed in float32, hold "
                "the weights in float32 and compute under autocast, or by FSDP2's MixedPrecisionPolicy(param_dtype=...)"
            )
    try:
        ops.check_lists("SAM", {"parameters": weights, "gradients": grads}, written=())
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}. What is not to be perturbed is left out with scope=") from None


def total_dot(a: Mapping[Tensor, Tensor], b: Mapping[Tensor, Tensor], reducer: ShardReducer) -> Tensor:
    """Sum of a * b over all parameters that both hold, and over all ranks: a float64 scalar."""
    lists: dict[Hashable, tuple[list[Tensor], list[Tensor]]] = {}
    for p, x in a.items():
        if p in b:
            y = b[p]
            if x.dtype != y.dtype:  # a gradient may be wider than what the state keeps of it
                wide = torch.promote_types(x.dtype, y.dtype)
                x, y = x.to(wide), y.to(wide)
            ours, theirs = lists.setdefault(reducer.key(p), ([], []))
            ours.append(x)
            theirs.append(y)
    return reducer.total((key, ops.dot(*both)) for key, both in lists.items())


def total_squared_norm(buckets: Sequence[ParameterBucket], etas: Sequence[float | None], reducer: ShardReducer) -> Tensor:
    """Squared norm of all gradients, scaled by abs(w) + eta where there is an eta, over all ranks: a float64 scalar."""
    norms = [(b.key, ops.run("squared_norm", b.bucket, eta)) for b, eta in zip(buckets, etas, strict=True)]
    return reducer.total(norms)
