"""Losses of plain tensors: weights, rows and sums in one call of the core, and one node of autograd.

Everything else (Triton, torch.compile, torch.func, float64, label smoothing, every argument that has to be refused) takes
the way of `rows.py`, which gives the same values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastpost.dispatch import forced, select, shortcut
from fastpost.ops.autograd import by_operation, transformed, unmapped_batch
from fastpost.ops.lists import mark_modified
from fastpost.ops.rows import ONCE, made_backward, scale_
from fastpost.row_tasks import LossTask

_KL_REDUCTIONS = ("sum", "mean", "batchmean")


def kl_losses(
    jensen_shannon: bool,
    clean: Tensor,
    noised: Tensor,
    mask: Tensor | None,
    reduction: str,
    whole: Callable[..., Tensor],
    inplace: bool = False,
) -> tuple[Tensor, ...] | None:
    """`symmetric_kl` or `js_divergence` of arguments that are not checked yet; `whole` is the other way.

    Returns:
        The loss, a float32 scalar that carries a graph, or None, where the other way has to be taken, and nothing was
        written. Where gradients have taken the logits' place, and a divergence is known not to be finite, the divergences
        of all rows follow, float64, to be refused if need be.
    """
    if is_dynamo_compiling():
        return None
    unrecorded = _kl_loss(jensen_shannon, forced())
    if unrecorded is not None and forward_ad._current_level < 0:
        value: tuple[Tensor, ...] | None = unrecorded(clean, noised, mask, reduction)
        if value is not None:
            return value
    if reduction not in _KL_REDUCTIONS or not isinstance(clean, Tensor):
        return None
    scale = 1.0 / (clean.shape[0] or 1) if reduction == "batchmean" and clean.ndim > 1 else 1.0
    task = LossTask(jensen_shannon, clean, noised, None, mask, -100, scale, 1.0, reduction == "mean")
    return _losses(task, inplace, lambda clean, noised, _, mask: whole(clean, noised, mask, reduction))


@functools.cache
def _kl_loss(jensen_shannon: bool, forced: str | None) -> Callable[..., tuple[Tensor, ...] | None] | None:
    """What does all of a divergence that autograd does not record, on the CPU; None where no backend does."""
    whole = shortcut("kl_loss", torch.device("cpu"), torch.float32)
    return None if whole is None else whole(jensen_shannon)


def r3f_losses(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor,
    r3f_lambda: float,
    reduction: str,
    ignore_index: int,
    num_items: float | Tensor | None,
    whole: Callable[..., Any],
    inplace: bool = False,
) -> tuple[Tensor, ...] | None:
    """`r3f_loss` without label smoothing, as `kl_losses`: the loss, the cross-entropy and the divergence."""
    if is_dynamo_compiling() or not isinstance(clean, Tensor) or not isinstance(labels, Tensor):
        return None
    if type(r3f_lambda) not in (int, float) or type(ignore_index) is not int:  # to be looked at, and maybe refused
        return None
    items = num_items
    if isinstance(items, Tensor):
        if type(items) is not Tensor or items.requires_grad or transformed() or items.numel() != 1 or items.is_complex():
            return None
        if items.device.type == "cpu":
            items = float(items.detach())
    if not (0 <= r3f_lambda < math.inf and (items is None or reduction == "token")):
        return None
    if not (items is None or isinstance(items, Tensor) or (type(items) in (int, float) and 0 <= items < math.inf)):
        return None
    how = LossTask(False, clean, noised, labels, ignore_index=ignore_index, kl_weight=r3f_lambda)
    if reduction == "fairseq":
        task = how._replace(
            kl_scale=1.0 / max(clean.shape[0] if clean.ndim > 1 else 1, 1), averaged=True, kl_everywhere=True
        )
    elif isinstance(items, Tensor):
        if items.device != clean.device:
            return None
        task = how._replace(items=items)
    elif reduction == "token" and items is not None:
        share = 1.0 / items if items else 0.0
        task = how._replace(kl_scale=share, ce_scale=share)
    elif reduction == "token" or (reduction == "sentence" and clean.ndim == 2):
        task = how._replace(averaged=True)
    elif reduction == "sum":
        task = how
    else:
        return None
    return _losses(
        task,
        inplace,
        lambda clean, noised, labels, _: whole(clean, noised, labels, r3f_lambda, reduction, ignore_index, num_items).loss,
    )


def _losses(task: LossTask, inplace: bool, whole: Callable[..., Tensor]) -> tuple[Tensor, ...] | None:
    """What the core makes of a task, or None; see `kl_losses`.

    Args:
        whole: (clean, noised, labels, mask) -> the loss by the other way, for backward passes after the first and those that
            are differentiated or mapped.
    """
    clean, noised = task.clean, task.noised
    if forward_ad._current_level >= 0 or not isinstance(noised, Tensor):
        return None
    function = shortcut("row_losses", clean.device, clean.dtype)
    if function is None:
        return None
    if not (torch.is_grad_enabled() and (clean.requires_grad or noised.requires_grad)):
        unrecorded: tuple[Tensor, ...] | None = function(task, None, None)
        return unrecorded
    if task.jensen_shannon or made_backward(clean.dtype):
        return None
    if inplace:
        written = [t for t in (clean, noised) if t.requires_grad]
        if any(map(_must_stay, written)):
            return None
        grads = tuple(t.detach() if t.requires_grad else None for t in (clean, noised))
    else:
        like = select("gradient_like", clean.device, clean.dtype)
        grads = tuple(like(t) if t.requires_grad else None for t in (clean, noised))
    found = function(task, *grads)
    if found is None:
        return None
    loss = Loss.apply(clean, noised, task.labels, task.mask, found, grads, None if inplace else whole)
    if inplace:
        # Whoever else wanted these logits in its backward pass is told by autograd's version check. Not before the loss has
        # its place in the graph: a view that has been modified gets another backward node, which copies whole gradients.
        mark_modified(written)
    return loss, *(t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64) for t in found[1:])


def _must_stay(logits: Tensor) -> bool:
    """Whether they may not be overwritten by their gradient: a leaf, or a view of one."""
    base = logits if logits._base is None else logits._base
    return base.is_leaf and base.requires_grad


class Loss(torch.autograd.Function):
    """Gives a loss its place in the graph; its gradients are there already, in the logits' place where `whole` is None."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # no transform is active here

    @staticmethod
    def forward(
        ctx: Any, clean: Tensor, noised: Tensor, labels: Tensor | None, mask: Tensor | None,
        found: tuple[Tensor, ...], grads: tuple[Tensor | None, Tensor | None], whole: Callable[..., Tensor] | None,
    ) -> Tensor:  # fmt: skip
        if whole is not None:
            ctx.save_for_backward(clean, noised, labels, mask)
        ctx.grads, ctx.whole = grads, whole
        return found[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        again = by_operation()
        if grads is None or again or unmapped_batch(upstream):
            if ctx.whole is None:
                raise RuntimeError(ONCE)
            clean, noised, *rest = ctx.saved_tensors
            wanted = [t for t, need in zip((clean, noised), ctx.needs_input_grad, strict=False) if need]
            with torch.enable_grad():
                loss = ctx.whole(clean, noised, *rest)
            made = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=again))
            grads = [next(made) if need else None for need in ctx.needs_input_grad[:2]]
        else:
            _scale_([g for g in grads if g is not None], upstream)
        return *grads, None, None, None, None, None


def _scale_(grads: list[Tensor], factor: Tensor) -> None:
    """Multiplies gradients by a scalar, which is never read where that waits for a device."""
    first, second = grads[0], grads[1] if len(grads) == 2 else None
    function = shortcut("scale_gradients_", first.device, first.dtype)
    if function is None or not function(first, second, factor):
        scale_([g.reshape(-1, g.shape[-1]) for g in grads], factor.reshape(1))
