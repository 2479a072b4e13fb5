"""Copies of a model's weights that can be put back bit for bit, and how far the weights have gone from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastpost import plan
from fastpost.ops import params as ops


class Snapshot:
    """One copy of a list of tensors, in one buffer per (device, dtype), taken when constructed.

    Args:
        tensors: dense floating-point tensors, each memory once; devices and dtypes may mix.

    Raises:
        TypeError, ValueError: as `fastpost.ops.params.check_lists`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        ops.check_lists("GAP", {"weights": tensors}, written=("weights",))
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._buffers: list[Tensor] = []  # held beside their views, so that spans know the padding to be theirs
        for bucket in ops.make_buckets(weights=tensors):
            buffer, views = plan.flat_like(bucket.weights)
            self._tensors += bucket.weights
            self._copies += views
            self._buffers.append(buffer)
        self.save()

    @torch.no_grad()
    def save(self) -> None:
        """Takes the tensors' present bits."""
        ops.sam_restore_(self._copies, self._tensors)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the saved bits back, into the same storage.

        Raises:
            ValueError: a tensor has changed its dtype, shape or device since it was copied; nothing is written.
        """
        for now, then in zip(self._tensors, self._copies, strict=True):
            if (now.dtype, now.shape, now.device) != (then.dtype, then.shape, then.device):
                raise ValueError(
                    f"GAP: a weight was {then.dtype} of shape {tuple(then.shape)} on {then.device} when copied and is "
                    f"{now.dtype} of shape {tuple(now.shape)} on {now.device} now, so that its bits cannot be put back; "
                    "convert the model back (model.to(...)) and call this again"
                )
        ops.sam_restore_(self._tensors, self._copies)
        torch.clear_autocast_cache()

    def by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """The copies by the names that their tensors have in a model; those that it does not hold are left out."""
        names = {id(p): name for name, p in model.named_parameters()}
        pairs = zip(self._tensors, self._copies, strict=True)
        return {names[id(t)]: copy for t, copy in pairs if id(t) in names}

    @torch.no_grad()
    def squared_distance(self) -> Tensor:
        """Sum of (now - saved)^2 over all tensors: float64, on the first one's device."""
        return ops.squared_distance(self._tensors, self._copies)

    @torch.no_grad()
    def distances(self, model: nn.Module, group_of: Callable[[str], str]) -> dict[str, float]:
        """The same of each group of a model's tensors; `group_of` says a tensor's group by the tensor's name."""
        names = {id(p): name for name, p in model.named_parameters()}
        groups: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for now, then in zip(self._tensors, self._copies, strict=True):
            if id(now) in names:
                group = groups.setdefault(group_of(names[id(now)]), ([], []))
                group[0].append(now)
                group[1].append(then)
        squares = [ops.squared_distance(*group) for group in groups.values()]  # all queued before the first is waited for
        return {name: float(square.sqrt()) for name, square in zip(groups, squares, strict=True)}

    @torch.no_grad()
    def moved(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Of the elements with a nonzero gradient, how many have a stored value that is not the saved one, and how many
        there are: (2,), int64; on the tensors' device, or on the CPU where they have several.

        Elements without a gradient say nothing about rounding: Adam leaves them where they are in any precision.

        Args:
            gradients: by the ids of the tensors.
        """
        counts: list[tuple[Tensor, Tensor]] = []
        for now, then in zip(self._tensors, self._copies, strict=True):
            if (g := gradients.get(id(now))) is not None:
                for a, b, c in zip(_pieces(now), _pieces(then), _pieces(g), strict=True):
                    pushed = c != 0
                    counts.append((_count((a != b) & pushed), _count(pushed)))
        if not counts:
            return torch.zeros(2, dtype=torch.int64)
        several = len({moved.device for moved, _ in counts}) > 1
        return torch.stack([n.cpu() if several else n for pair in counts for n in pair]).view(-1, 2).sum(0)


def _count(mask: Tensor) -> Tensor:
    """How many are True; elsewhere than on a CPU `count_nonzero` compares once more before it adds."""
    return mask.count_nonzero() if mask.device.type == "cpu" else mask.sum()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor in pieces: on a CPU such as fit a cache, so that a difference need not travel to memory and back; elsewhere
    large ones, so that there are few launches."""
    size = 1 << 18 if tensor.device.type == "cpu" else 1 << 24
    return torch.split(tensor.reshape(-1), size)
