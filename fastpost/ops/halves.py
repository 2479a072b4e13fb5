"""The two streams of a double batch, as tensors whose gradients may take the logits' place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpost.ops.autograd import Function


class _Halves(Function):
    """Hands out both halves of a tensor, in its own memory, and takes their gradients back together.

    Slices would have their gradients padded to full size each, two more streams of logits. Gradients that lie where the
    halves lie, because the loss wrote them there, are the whole gradient as it stands.
    """

    @staticmethod
    def forward(both: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        return _alias(both, both[:rows]), _alias(both, both[rows:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
        ctx.both = inputs[0].detach()

    @staticmethod
    def backward(ctx: Any, clean: Tensor | None, noised: Tensor | None) -> tuple[Tensor | None, None]:
        both: Tensor = ctx.both
        halves = both[: len(both) // 2], both[len(both) // 2 :]
        grads = [torch.zeros_like(h) if g is None else g for g, h in zip((clean, noised), halves, strict=True)]
        # A gradient that may be differentiated again (create_graph) has a graph, which an alias would lose.
        if not torch.is_grad_enabled() and all(
            g.data_ptr() == h.data_ptr() and g.stride() == h.stride() for g, h in zip(grads, halves, strict=True)
        ):
            # Whoever else kept these logits for its backward pass is told by autograd's version check.
            torch.autograd.graph.increment_version(both)
            return _alias(both, both), None
        return torch.cat(grads), None


def _alias(owner: Tensor, view: Tensor) -> Tensor:
    """A tensor over the view's memory, unknown to autograd as a view: a Function's views refuse to be written."""
    return torch.empty(0, dtype=owner.dtype, device=owner.device).set_(
        owner.untyped_storage(), view.storage_offset(), view.shape, view.stride()
    )


def writable_halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of `both` along its first dimension, which a loss may overwrite with their gradients.

    Args:
        both: (2 * n, ...), the output of an operation.

    Returns:
        Two tensors (n, ...) in the memory of `both`.
    """
    clean, noised = _Halves.apply(both, len(both) // 2)
    return clean, noised
