"""What weights looked like when they were perturbed, what has become of them since, and how w gets back into them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpost import plan

if TYPE_CHECKING:
    from fastpost.sam.buckets import ParameterBucket
    from fastpost.sam.reduction import Reduction

_dtype, _device, _shape = attrgetter("dtype"), attrgetter("device"), attrgetter("shape")


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
    """dtype, device, shapes and strides of the tensors of one bucket."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self._dtypes = [self.dtype] * len(tensors)
        self._devices = [self.device] * len(tensors)
        self._shapes: list[torch.Size] = list(map(_shape, tensors))
        self._strides = list(map(Tensor.stride, tensors))

    def shape(self, row: int) -> torch.Size:
        """Of the tensor of this row."""
        return self._shapes[row]

    def shared_by(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are laid out the same in every respect."""
        try:
            return self._but_for_strides(tensors) and list(map(Tensor.stride, tensors)) == self._strides
        except RuntimeError:  # a sparse tensor has no strides
            return False

    def fits(self, gradients: Sequence[Tensor], walkable: bool) -> bool:
        """Whether gradients agree with these tensors as operations need it: walkable ones in their strides too."""
        if walkable:
            return self.shared_by(gradients)
        return self._but_for_strides(gradients) and all(g.layout == torch.strided for g in gradients)

    def _but_for_strides(self, tensors: Sequence[Tensor]) -> bool:
        return (
            list(map(_dtype, tensors)) == self._dtypes
            and list(map(_shape, tensors)) == self._shapes
            and list(map(_device, tensors)) == self._devices
        )

    def change(self, row: int, w: Tensor) -> Change | None:
        """How `w` differs from the tensor of this row; None where it does not."""
        if w.layout != torch.strided:
            return Change(f"is of layout {w.layout} now", in_place=False)
        if w.shape != self._shapes[row]:
            return Change(f"has shape {tuple(w.shape)} now", in_place=False)
        if w.device.type == "meta":
            return Change("is a meta tensor now", in_place=False)
        if has_lost_memory(w):
            return Change("has lost its memory", in_place=False)
        if not plan.distinct(w):
            return Change("is expanded now (its elements share memory)", in_place=False)
        if w.dtype != self.dtype:
            return Change(f"was {_name(self.dtype)} and is {_name(w.dtype)} now", in_place=True)
        if w.device != self.device:
            return Change(f"was on {self.device} and is on {w.device} now", in_place=True)
        return None if w.stride() == self._strides[row] else Change(None, in_place=True)


def changes(buckets: Sequence[ParameterBucket], reduction: Reduction) -> Changes:
    """What has become of the weights of these buckets since they took their gradients; nothing is written."""
    found: Changes = []
    moved = False
    for b in buckets:
        weights, rows = b.follow(reduction), {}
        if not b.layout.shared_by(weights) or list(map(Tensor.data_ptr, weights)) != b.addresses:
            moved = True
            known = ((row, b.layout.change(row, w)) for row, w in enumerate(weights))
            rows = {row: change for row, change in known if change is not None}
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


@torch.no_grad()
def put(p: Tensor, w: Tensor, values: Tensor, change: Change | None, reduction: Reduction) -> None:
    """Writes values into the parameter `p` whose part on this rank is `w`, converted; into memory of its own if need be."""
    if change is None or change.in_place:
        w.copy_(values)
        return
    device = values.device if w.device.type == "meta" else w.device
    dtype = w.dtype if w.dtype.is_floating_point else values.dtype
    p.data = reduction.like(p, values.to(device, dtype, copy=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_lost_memory(w: Tensor) -> bool:
    """Whether the tensor's storage is too small for it, as where it was resized to free memory."""
    last = sum(stride * (size - 1) for stride, size in zip(w.stride(), w.shape, strict=True))
    return w.numel() > 0 and (w.storage_offset() + last + 1) * w.element_size() > w.untyped_storage().nbytes()
