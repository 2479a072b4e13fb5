"""Numbers that a device has been asked for, read when somebody needs them."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """Numbers on their way from their device to the host.

    On CUDA they travel into pinned memory behind the work that makes them, and `values` waits for that work, not for what
    was queued since. Everywhere else `values` reads them.

    Args:
        numbers: a tensor of any shape. What is written into it afterwards does not count on CUDA; elsewhere nothing must be
            written into it.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.detach()
        self._there: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            with torch.cuda.device(numbers.device):
                pinned = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
                self._numbers = pinned.copy_(self._numbers, non_blocking=True)
                self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._there.record()

    def values(self) -> list[float]:
        """All of them, in order of the tensor's elements."""
        if self._there is not None:
            self._there.synchronize()
        found: list[float] = self._numbers.reshape(-1).tolist()
        return found

    def value(self) -> float:
        """The only one."""
        (value,) = self.values()
        return value
