"""Values of rows in two streams of logits, their gradients, and the gradients' own derivatives, as autograd sees them.

What is computed is said by a `Kind`: the symmetric KL with or without the cross-entropy (`divergence.py`), the
Jensen-Shannon divergence (`jensen_shannon.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastpost.dispatch import select
from fastpost.ops.autograd import Function, by_operation, over_rows, refuse_nested_forward_mode, unmapped_batch
from fastpost.ops.registry import define

Streams = tuple[bool, bool]

ONCE = (
    "symmetric_kl/r3f_loss with inplace=True: the logits are overwritten by their gradients; a second backward pass "
    "(retain_graph) or a second derivative (create_graph) needs inplace=False, and so does forward mode"
)


def made_backward(dtype: torch.dtype) -> bool:
    """Whether gradients of this dtype are made in the backward pass, where the factor on them is known.

    float16 ends at 6e-8, below which the gradients of a mean lie; a loss scale could not bring back what they have lost.
    """
    return dtype == torch.float16


class Kind(Protocol):
    """What rows of two streams give. `more` are the further tensors, a number (or a label) for each row, or None.

    Attributes:
        inplace: whether `values` leaves the gradients in the logits' own memory.
        overwrites: whether `gradients` does.
    """

    inplace: bool
    overwrites: bool

    def values(self, want: Streams, clean: Tensor, noised: Tensor, *more: Tensor | None) -> tuple[Tensor, ...]:
        """Weighted values (float64), values for show, and the gradients of the wanted streams, by one kernel.

        Gradients that are not made here are empty.
        """

    def gradients(
        self, want: Streams, clean: Tensor, noised: Tensor, factors: Tensor, *more: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradients of values times factors, by one kernel; empty where not wanted."""

    def formula(self, clean: Tensor, noised: Tensor, factors: Tensor, *more: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same gradients in operations that torch can differentiate."""


class RowValues(Function):
    """`(kind, want, clean, noised, *more)` -> the kind's values; only the first result carries a graph.

    Gradients of the streams in `want` are made in the forward pass, where the rows are read anyway, and scaled in the first
    backward pass. Any other backward pass makes them anew.
    """

    @staticmethod
    def forward(kind: Kind, want: Streams, clean: Tensor, noised: Tensor, *more: Tensor | None) -> tuple[Tensor, ...]:
        return kind.values(want, clean, noised, *more)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kind, ctx.want, clean, noised, *more = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or backward would be given zeros of the size of the logits
        ctx.grads = output[-2:] if any(ctx.want) else None
        if ctx.kind.inplace:
            ctx.grads = (clean.detach(), noised.detach())
        else:
            ctx.save_for_backward(clean, noised, *more)
            ctx.save_for_forward(clean, noised, *more)
        ctx.more, ctx.results, ctx.overwritten = len(more), len(output), False

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, *[None] * ctx.more
        grads, ctx.grads = ctx.grads, None
        again, batched = by_operation(), unmapped_batch(upstream)
        if ctx.kind.inplace and (again or batched or grads is None):
            raise RuntimeError(ONCE)
        if ctx.kind.overwrites and (again or batched or ctx.overwritten):
            raise RuntimeError(ONCE)
        if grads is not None and not again and not batched:
            wanted = ctx.want
            scale_([g for g, w in zip(grads, wanted, strict=True) if w], upstream)
        else:
            wanted = ctx.needs_input_grad[2:4]
            clean, noised, *more = ctx.saved_tensors
            ctx.overwritten = ctx.kind.overwrites
            if batched:
                grads = ctx.kind.formula(clean, noised, upstream, *more)
            elif again:
                grads = RowGradients.apply(ctx.kind, wanted, clean, noised, upstream, *more)
            else:
                grads = ctx.kind.gradients(wanted, clean, noised, upstream, *more)
        return None, None, *(g if w else None for g, w in zip(grads, wanted, strict=True)), *[None] * ctx.more

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return over_rows(RowValues, info.batch_size, in_dims, args)

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        refuse_nested_forward_mode()
        if ctx.kind.inplace or ctx.kind.overwrites:
            raise RuntimeError(ONCE)
        clean, noised, *more = ctx.saved_tensors
        ones = torch.ones(len(clean), dtype=torch.float64, device=clean.device)
        moves = tangents[2:4]
        want = tuple(t is not None for t in moves)
        grads = RowGradients.apply(ctx.kind, want, clean, noised, ones, *more)
        parts = [(g.double() * t.double()).sum(-1) for g, t in zip(grads, moves, strict=True) if t is not None]
        return sum(parts[1:], parts[0]), *[None] * (ctx.results - 1)


class RowGradients(Function):
    """`(kind, want, clean, noised, factors, *more)` -> the kind's gradients, to be differentiated by its formula."""

    @staticmethod
    def forward(
        kind: Kind, want: Streams, clean: Tensor, noised: Tensor, factors: Tensor, *more: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return kind.gradients(want, clean, noised, factors, *more)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.kind, ctx.want, *tensors = inputs
        ctx.mark_non_differentiable(*(g for g, wanted in zip(output, ctx.want, strict=True) if not wanted))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        clean, noised, factors, *more = ctx.saved_tensors
        _, pull, *_ = torch.func.vjp(lambda a, b, f: ctx.kind.formula(a, b, f, *more), clean, noised, factors)
        cotangents = tuple(
            u if wanted else torch.zeros_like(t) for u, wanted, t in zip(upstream, ctx.want, (clean, noised), strict=True)
        )
        return None, None, *pull(cotangents), *[None] * len(more)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return over_rows(RowGradients, info.batch_size, in_dims, args)

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        refuse_nested_forward_mode()
        clean, noised, factors, *more = ctx.saved_tensors
        # The gradients' Jacobian is symmetric, so that a product with a tangent is one with a cotangent.
        _, pull, *_ = torch.func.vjp(lambda a, b: ctx.kind.formula(a, b, factors, *more), clean, noised)
        moves = zip(tangents[2:4], (clean, noised), strict=True)
        moved = pull(tuple(torch.zeros_like(t) if move is None else move for move, t in moves))
        if tangents[4] is not None:
            more_factor = ctx.kind.formula(clean, noised, tangents[4], *more)
            moved = tuple(a + b for a, b in zip(moved, more_factor, strict=True))
        return tuple(m if wanted else None for m, wanted in zip(moved, ctx.want, strict=True))


# -- scaling --------------------------------------------------------------------------------------------------------------


def _scale_rows_(block: Tensor, factors: Tensor) -> None:
    select("scale_rows_", block.device, block.dtype)(block, factors)


_op_scale_ = define("scale_rows_(Tensor(a!) block, Tensor factors) -> ()", _scale_rows_, None)


def scale_(blocks: list[Tensor], factors: Tensor) -> None:
    """Multiplies matrices by a factor per row, or by one for all, that is read on the device."""
    if factors.stride(0) == 0 and len(factors):  # where a sum was taken: an expanded scalar
        factors = factors[:1]
    factors = factors.double().contiguous()
    # On the CPU asking whether it is 1 is free.
    free = factors.device.type == "cpu" and factors.numel() == 1 and not torch.compiler.is_compiling()
    if factors.numel() and not (free and factors.item() == 1):
        for block in blocks:
            if block.numel():
                _op_scale_(block, factors)
