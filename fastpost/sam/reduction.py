"""What SAM needs of other ranks: the sum of a norm over all shards, and one answer to whether a gradient overflowed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastpost import distributed


class Reduction:
    """Local parts of parameters and sums over the ranks that hold the others. A process without others reduces nothing.

    Plain parameters are taken to be the same on all ranks, gradients included (one process, DDP), and are not reduced over.
    All sums are float64, scalars or vectors; nothing here waits for a device.
    """

    def __init__(self) -> None:
        self._ranks = distributed.Ranks()

    @property
    def shards(self) -> bool:
        """Whether `local` and `gradient` may hand out anything but the tensors themselves."""
        return distributed.active()

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter, as memory that can be read and written."""
        return distributed.local(tensor)

    def like(self, p: Tensor, part: Tensor) -> Tensor:
        """A local part as a tensor placed as `p` is."""
        return distributed.like(p, part)

    def gradient(self, p: Tensor) -> Tensor | None:
        """This rank's part of the gradient of `p`, cut as `p` is; None where there is none."""
        return distributed.local_gradient(p)

    def key(self, p: Tensor) -> Hashable:
        """Parameters with the same key are summed together before one reduction over the ranks that share them."""
        return self._ranks.sharing(p)

    def total(self, parts: Mapping[Hashable, Tensor]) -> Tensor:
        """The sum over all keys, each reduced over the ranks that hold its other parts."""
        if not distributed.active():
            first, *others = parts.values()
            total = first
            for part in others:
                total = total + part.to(total.device)
            return total
        known: Any = parts
        return self._ranks.sum(known)

    def agree(self, flag: Tensor) -> Tensor:
        """1.0 where any rank's flag is, as a float32 scalar."""
        return self._ranks.any(flag)

    def computes_in(self, params: Iterable[Tensor]) -> torch.dtype | None:
        """The dtype that FSDP2's mixed precision casts these parameters to, or None."""
        return distributed.compute_dtype(params) if self.shards else None

    def wrote(self, params: Iterable[Tensor]) -> None:
        """Called after weights were written in place, by perturbing or restoring."""
        if self.shards:
            distributed.reshard(params)


def add_part(parts: dict[Hashable, Tensor], key: Hashable, part: Tensor) -> None:
    """Adds to the sum of this key, on the device where that began."""
    parts[key] = parts[key] + part.to(parts[key].device) if key in parts else part


def check_sharding(params: Iterable[Tensor], sync_ascent: bool | None) -> None:
    """Raises ValueError where ranks are asked for ascents of their own and none holds a whole gradient."""
    if sync_ascent is False and any(distributed.is_sharded(p) for p in params):
        raise ValueError(
            "SAM: sync_ascent=False lets each rank perturb by its own gradient, and of sharded parameters (FSDP2, tensor "
            "parallel) no rank has one; leave sync_ascent out, or use DDP"
        )
