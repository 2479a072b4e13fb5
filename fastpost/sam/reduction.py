"""What SAM needs of other ranks: the sum of a norm over all shards, and one answer to whether a gradient overflowed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from torch import Tensor


class Reduction:
    """One process that holds every tensor whole: nothing to reduce. `fastpost.distributed` overrides these for shards.

    All sums are float64, scalars or vectors; nothing here waits for a device.

    Attributes:
        shards: whether `local` and `gradient` hand out anything but the tensors themselves.
    """

    shards = False

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter, as memory that can be read and written."""
        return tensor

    def gradient(self, p: Tensor) -> Tensor | None:
        """This rank's part of the gradient of `p`, cut as `p` is; None where there is none."""
        return p.grad

    def key(self, p: Tensor) -> Hashable:
        """Parameters with the same key are summed together before one reduction over the ranks that share them."""
        return None

    def total(self, parts: Mapping[Hashable, Tensor]) -> Tensor:
        """The sum over all keys, each reduced over the ranks that hold its other parts."""
        first, *others = parts.values()
        total = first
        for part in others:
            total = total + part.to(total.device)
        return total

    def agree(self, flag: Tensor) -> Tensor:
        """1.0 where any rank's flag is, as a float32 scalar."""
        return flag

    def wrote(self, params: Iterable[Tensor]) -> None:
        """Called after weights were written in place, by perturbing or restoring."""
