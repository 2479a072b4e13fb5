"""The running statistics of norm layers, put back as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastpost.errors import unknown

CHOICES = ("first", "both")


def check_norm_stats(name: str, value: str) -> None:
    """Raises ValueError for a choice that does not exist."""
    if value not in CHOICES:
        raise unknown(name, value, CHOICES)


class NormStats:
    """The running statistics of a model's norm layers: what they were, to be put back.

    Statistics are the buffers called `running_...` and `num_batches_tracked`: those of torch's batch and instance norms,
    synchronised or not, and of others that follow them. Values are copied and put back, so it does not matter how a layer
    computes them (momentum None, layers in eval mode, compiled ones).

    Args:
        model: the model; its layers are looked up each time, because layers are converted and added.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: list[tuple[nn.Module, str, Tensor]] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers the statistics as they are now."""
        self._kept = [(module, name, buffer.clone()) for module, name, buffer in _statistics(self.model)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Gives the layers what was remembered, bit for bit and into the same storage, once."""
        kept, self._kept = self._kept, []
        for module, name, value in kept:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.shape == value.shape:
                buffer.copy_(value)

    def __getstate__(self) -> dict[str, object]:
        return {"model": self.model, "_kept": []}


@contextlib.contextmanager
def frozen_norm_stats(model: nn.Module) -> Iterator[None]:
    """Leaves the running statistics of norm layers as they were on entry, whatever passes are made inside.

    For a second pass by hand, forward and backward both, where SAM was not given `model=`. Layers normalise by the batch all
    the same, frozen ones (in eval mode) by their running statistics.

    Args:
        model: any module. Its layers with buffers called `running_...` and `num_batches_tracked` count: batch norm, instance
            norm with `track_running_stats`, synchronised ones.
    """
    stats = NormStats(model)
    stats.keep()
    try:
        yield
    finally:
        stats.put_back()


def _statistics(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            counts = name == "num_batches_tracked" or name.startswith("running_")
            if counts and buffer is not None and not buffer.is_meta and not nn.parameter.is_lazy(buffer):
                yield module, name, buffer
