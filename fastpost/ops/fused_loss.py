"""Autograd of the losses of a fused head: values and gradients come out of one walk over the rows, in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastpost.ops import distillation_walk, linear_rows, top_k_rows
from fastpost.ops.autograd import Function, apply_any, by_operation, one_by_one, transformed, unmapped_batch
from fastpost.ops.registry import Operation
from fastpost.ops.rows import scale_


class Walk(NamedTuple):
    """An operation that walks the rows: (*tensors, labels, weights, *settings, want) -> (values, *gradients).

    stacks: how many of the tensors each of its gradients is of: (k, ...) for the first, whose tensors are alike, else what
    that tensor's shape says. What is not wanted is not in the stack, or empty.
    once: what is said to who asks for a second derivative.
    """

    operation: Operation
    stacks: tuple[int, ...]
    once: str


_HEAD_ONCE = (
    "the losses of a fused head (linear_r3f_loss, fused_linear=True, ...) have no second derivative, since they never hold "
    "the logits; for a gradient penalty use symmetric_kl or r3f_loss on torch.nn.functional.linear(hidden, weight, bias), "
    "or another formula of those logits"
)
_DISTILLATION_ONCE = (
    "distillation_loss, linear_distillation_loss and linear_top_k_distillation_loss have no second derivative, since their "
    "gradients are made with their values, some rows at a time; for a gradient penalty write the divergence in torch, such "
    "as torch.nn.functional.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction='sum')"
)
WALKS = {
    "divergence": Walk(linear_rows.linear_divergence, (2, 1, 1), _HEAD_ONCE),
    "distillation": Walk(distillation_walk.linear_distillation, (1, 1, 1, 1, 1, 1), _DISTILLATION_ONCE),
    "top_k_distillation": Walk(top_k_rows.linear_top_k_distillation, (1, 1, 1, 1, 1), _DISTILLATION_ONCE),
}


def fused_loss(
    walk: str,
    how: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    labels: Tensor | None,
    weights: list[Tensor],
    per_row: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of the rows' values with its graph (per_row: every row's), the sums of all kinds, the rows' values.

    Args:
        walk: a key of WALKS; how, tensors: its settings and tensors.
        labels: int64 (rows,), or None.
        weights: float64 (rows,) for each kind of value.

    Returns:
        float64: a scalar or (rows,), (kinds,), (kinds, rows).
    """
    # Under torch.func, which backward passes there will be is not known here.
    ahead = torch.is_grad_enabled() and not transformed()
    want = [t is not None and ahead and t.requires_grad for t in tensors]
    value, sums, values, *_ = apply_any(_FusedLoss, walk, how, want, per_row, labels, torch.stack(weights), *tensors)
    return value, sums, values


class _FusedLoss(Function):
    """The weighted sum of the rows' values (per_row: each row's), the sums of all kinds and the rows' values for show, and
    gradients made in the forward pass.

    What is asked per row gets its gradients in the backward pass, from logits made again: only then are their weights known.
    """

    @staticmethod
    def forward(
        walk: str,
        how: tuple[Any, ...],
        want: list[bool],
        per_row: bool,
        labels: Tensor | None,
        weights: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        now = [False] * len(want) if per_row else want
        values, *grads = WALKS[walk].operation(*tensors, labels, weights, *how, now)
        weighted = values * weights
        sums = weighted.sum(-1)
        return weighted.sum(0) if per_row else sums.sum(), sums, values, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.walk, ctx.how, want, per_row, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or backward would be given zeros of the size of the gradients
        ctx.grads = output[3:] if any(want) and not per_row else None
        # What torch.inference_mode() made has no gradient and no version, and torch refuses to save it.
        # (Under torch.compile, which cannot ask, the refusal stays.)
        ctx.fixed = {}
        if not torch.compiler.is_compiling():
            ctx.fixed = {at: t for at, t in enumerate(tensors) if t is not None and t.is_inference()}
            tensors = [None if at in ctx.fixed else t for at, t in enumerate(tensors)]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        stacks = WALKS[ctx.walk].stacks
        wanted = list(ctx.needs_input_grad[6:])
        saved = ctx.saved_tensors
        if ctx.fixed:
            saved = [ctx.fixed.get(at, t) for at, t in enumerate(saved)]
        labels, weights, *tensors = saved
        dtypes = [None if t is None else t.dtype for t in tensors]
        made, ctx.grads = ctx.grads, None
        again = by_operation() or unmapped_batch(upstream)  # which calls operations that it does not know one by one
        if made is not None and not again:  # of a sum
            given = _scaled(made, wanted, upstream, dtypes, stacks)
        else:
            gradients = _Gradients.apply if again else _Gradients.forward
            made = gradients(ctx.walk, ctx.how, wanted, upstream, labels, weights, *tensors)
            each = _of_each(made, wanted, stacks)
            given = [None if g is None else g.to(dtype) for g, dtype in zip(each, dtypes, strict=True)]
        return None, None, None, None, None, None, *given

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_FusedLoss, info.batch_size, in_dims, args)


class _Gradients(Function):
    """The gradients as the walk gives them, empty where not wanted, of the weighted values times `upstream`."""

    @staticmethod
    def forward(
        walk: str,
        how: tuple[Any, ...],
        want: list[bool],
        upstream: Tensor,
        labels: Tensor | None,
        weights: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _, *grads = WALKS[walk].operation(*tensors, labels, weights * upstream, *how, want)
        return tuple(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.walk = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(WALKS[ctx.walk].once)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_Gradients, info.batch_size, in_dims, args)


def _of_each(grads: Sequence[Tensor], wanted: Sequence[bool], stacks: Sequence[int]) -> list[Tensor | None]:
    """Of each of the walk's tensors, None where not wanted."""
    given: list[Tensor | None] = []
    for grad, count in zip(grads, stacks, strict=True):
        here = wanted[len(given) : len(given) + count]
        parts = iter(grad.unbind() if count > 1 else (grad,))
        given += [next(parts) if w else None for w in here]
    return given


def _scaled(
    grads: Sequence[Tensor],
    wanted: Sequence[bool],
    upstream: Tensor,
    dtypes: Sequence[torch.dtype | None],
    stacks: Sequence[int],
) -> list[Tensor | None]:
    """The gradients times a number, as `_of_each` has them and in these dtypes: one pass over each; none where the number is
    known to be 1 and the dtype is right."""
    done: set[int] = set()
    at = 0
    for grad, count in zip(grads, stacks, strict=True):
        members = range(at, at + count)
        at += count
        here = [dtypes[k] for k in members if wanted[k]]
        if here and all(dtype == grad.dtype for dtype in here):
            scale_([grad.view(1, -1) if grad.ndim == 1 else grad.view(-1, grad.shape[-1])], upstream.reshape(1))
            done.update(members)
    given = _of_each(grads, wanted, stacks)
    for k, part in enumerate(given):
        if part is not None and k not in done:
            given[k] = torch.mul(part, upstream, out=torch.empty(part.shape, dtype=dtypes[k], device=part.device))
    return given
