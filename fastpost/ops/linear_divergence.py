"""The output head and the loss in one: symmetric KL and R3F's loss from hidden states, the full logits never held."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpost.errors import unknown
from fastpost.ops import linear_rows
from fastpost.ops.autograd import Function, by_operation, one_by_one, transformed, unmapped_batch
from fastpost.ops.divergence import check_bounded, check_finite
from fastpost.ops.linear_rows import Settings
from fastpost.ops.reductions import (
    R3FLoss,
    kl_weights,
    out_dtype,
    r3f_weights,
)
from fastpost.ops.rows import scale_

GRADS = ("both", "noised", "clean")
_ROWS = 1024  # of a chunk: enough that the products run at full speed
_LEAST_ROWS = 64


# -- autograd -------------------------------------------------------------------------------------------------------------


class _LinearDivergence(Function):
    """Weighted sum of the rows' values (per_row: each of them), kl and ce for show, and gradients made in the forward pass.

    What is asked per row gets its gradients in the backward pass, from logits made again: only then are their weights known.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        noised: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        kl_weights: Tensor,
        ce_weights: Tensor | None,
        how: Settings,
        want: list[bool],
        per_row: bool,
    ) -> tuple[Tensor, ...]:
        now = [False] * len(want) if per_row else want
        kl, ce, *grads = linear_rows.linear_divergence(
            hidden, noised, weight, bias, labels, kl_weights, ce_weights, *how, now
        )
        value = kl * kl_weights
        if ce_weights is not None:
            value = value + ce * ce_weights
        return value if per_row else value.sum(), kl, ce, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.how, want, per_row = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or backward would be given zeros of the size of the gradients
        ctx.grads = output[3:] if any(want) and not per_row else None
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 10
        wanted = ctx.needs_input_grad[:4]
        tensors = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if by_operation() or unmapped_batch(upstream):  # which calls operations that it does not know one by one
            grads = _LinearGradients.apply(ctx.how, list(wanted), upstream, *tensors)
        elif grads is None:
            grads = _LinearGradients.forward(ctx.how, list(wanted), upstream, *tensors)
        else:  # of a sum
            scale_([g.view(1, -1) if g.ndim == 1 else g for g in grads], upstream.reshape(1))
        given = [g.to(t.dtype) if w else None for g, t, w in zip(grads, tensors[:4], wanted, strict=True)]
        return *given, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_LinearDivergence, info.batch_size, in_dims, args)


class _LinearGradients(Function):
    """The gradients of hidden, noised, weight and bias, empty where not wanted; `tensors` are those of _LinearDivergence."""

    @staticmethod
    def forward(how: Settings, want: list[bool], upstream: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        *rest, kl_weights, ce_weights = tensors
        kl_weights, ce_weights = (None if w is None else w * upstream for w in (kl_weights, ce_weights))
        _, _, *grads = linear_rows.linear_divergence(*rest, kl_weights, ce_weights, *how, want)
        return tuple(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            "linear_symmetric_kl and linear_r3f_loss (R3F's fused_linear=True) have no second derivative, since they never "
            "hold the logits; for a gradient penalty use symmetric_kl or r3f_loss on torch.nn.functional.linear(hidden, "
            "weight, bias)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return one_by_one(_LinearGradients, info.batch_size, in_dims, args)


# -- public ---------------------------------------------------------------------------------------------------------------


def _check(
    op: str, hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float,
    grad: str,
) -> None:  # fmt: skip
    for name, t in (("hidden", hidden), ("noised_hidden", noised), ("weight", weight), ("bias", bias)):
        if t is None and name == "bias":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
        if isinstance(t, DTensor):
            raise TypeError(
                f"{op}: {name} is a DTensor. Under FSDP call this where the head's weight is gathered (or pass "
                f"{name}.full_tensor()); under tensor parallelism pass {name}.to_local() and vocab_group="
            )
        if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; float16, bfloat16, float32 and float64 are served")
        if t.device != hidden.device:
            raise ValueError(f"{op}: hidden is on {hidden.device}, {name} on {t.device}")
    if hidden.shape != noised.shape:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)}, noised_hidden {tuple(noised.shape)}; they must agree"
        )
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: hidden (..., width) has shape {tuple(hidden.shape)}, weight (vocab, width) {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"{op}: softcap must be finite and > 0, or None, not {softcap}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{op}: temperature must be finite and > 0, not {temperature}")
    if grad not in GRADS:
        raise unknown("grad", grad, GRADS)


def _operand_dtype(hidden: Tensor, noised: Tensor, weight: Tensor) -> torch.dtype:
    """What the products' operands are rounded to.

    That of autocast or of 16-bit weights where the hardware multiplies it with float32 results; CPUs multiply in float32.
    """
    if torch.float64 in (hidden.dtype, noised.dtype, weight.dtype):
        return torch.float64
    if not hidden.is_cuda:
        return torch.float32
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return weight.dtype


def _chunk_rows(op: str, rows: int, weight: Tensor, dtype: torch.dtype, softcap: float | None, budget: int) -> int:
    """Rows of a chunk under a budget in bytes."""
    vocab, width = weight.shape
    work = 8 if dtype == torch.float64 else 4
    blocks = work * (1 if softcap is None else 2) + (dtype.itemsize if dtype.itemsize < work else 0)
    per_row = 2 * vocab * blocks + 2 * width * (dtype.itemsize + 2 * work)
    least = max(min(_LEAST_ROWS, rows), 1)
    fitting = int(budget) // per_row
    if fitting < least:
        raise ValueError(
            f"{op}: memory_budget of {int(budget):,} bytes holds {fitting} rows of two streams of {vocab:,} logits; "
            f"{least} rows need {least * per_row:,}"
        )
    return min(_ROWS, fitting)


def _run(
    op: str, hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, kl_weights: Tensor,
    ce_weights: Tensor | None, ignore_index: int, smoothing: float, softcap: float | None, temperature: float, grad: str,
    memory_budget: int, group: dist.ProcessGroup | None, per_row: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _operand_dtype(hidden, noised, weight)
    flat = [t.reshape(-1, t.shape[-1]) for t in (hidden, noised)]
    chunk = _chunk_rows(op, flat[0].shape[0], weight, dtype, softcap, memory_budget)
    how = Settings(
        ignore_index, smoothing, softcap or 0.0, temperature, chunk, grad, dtype, "" if group is None else group.group_name
    )
    tensors = (*flat, weight, bias)
    # Under torch.func, which backward passes there will be is not known here.
    ahead = torch.is_grad_enabled() and not transformed()
    want = [t is not None and ahead and t.requires_grad for t in tensors]
    value, kl, ce, *_ = _LinearDivergence.apply(*tensors, labels, kl_weights, ce_weights, how, want, per_row)
    check_finite(op, kl)
    return value, kl, ce


def linear_symmetric_kl(
    hidden: Tensor,
    noised_hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    softcap: float | None = None,
    temperature: float = 1.0,
    grad: str = "both",
    memory_budget: int = 1 << 30,
    vocab_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`symmetric_kl` of two streams of hidden states under one output head, whose logits are never held all at once.

    Args:
        hidden, noised_hidden: (..., width); float16, bfloat16, float32 or float64.
        weight: (vocab, width) of the head; may be the embedding's (tied), and may be frozen.
        bias: (vocab,) or None.
        mask: bool of shape (...); rows where it is False count in no reduction and get no gradient.
        reduction: as in `symmetric_kl`; "none" makes the logits a second time in the backward pass.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None: as they are.
        temperature: then divides the logits; a model's logit scale is 1 / temperature.
        grad: which stream gradients are sent into: "both", "noised" (hidden is a fixed teacher) or "clean".
        memory_budget: bytes for what is held of the logits, > 0. Chunks have 1,024 rows at most; the budget wins down to 64.
            Gradients of the size of weight and hidden are extra (a 16-bit weight's is summed in float32), as are 64 MB at
            most.
        vocab_group: process group whose ranks hold one slice of the vocabulary each, in the order of their ranks, as weight
            and bias; hidden is the same on all of them. Gradients of hidden are summed over the group.

    Returns:
        float32 (float64 where an argument is): a scalar, or (...) under "none".

    Raises:
        ValueError: shapes or devices that do not fit, unknown reduction or grad, softcap or temperature not positive, a
            budget too small for 64 rows.
        TypeError: dtypes that are not served; a DTensor.
    """
    op = "linear_symmetric_kl"
    _check(op, hidden, noised_hidden, weight, bias, softcap, temperature, grad)
    rows = hidden.shape[:-1]
    weights = kl_weights(op, rows, hidden.device, mask, reduction)
    if weights is None:
        weights = torch.ones(math.prod(rows), dtype=torch.float64, device=hidden.device)
    value, _, _ = _run(
        op, hidden, noised_hidden, weight, bias, None, weights, None, -100, 0.0, softcap, temperature, grad, memory_budget,
        vocab_group, reduction == "none",
    )  # fmt: skip
    dtype = out_dtype(_operand_dtype(hidden, noised_hidden, weight))
    return (value.reshape(rows) if reduction == "none" else value).to(dtype)


def linear_r3f_loss(
    hidden: Tensor,
    noised_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    r3f_lambda: float = 1.0,
    reduction: str = "token",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    grad: str = "both",
    memory_budget: int = 1 << 30,
    vocab_group: dist.ProcessGroup | None = None,
) -> R3FLoss:
    """`r3f_loss` of two streams of hidden states under one output head, whose logits are never held all at once.

    One product makes both streams' logits of a chunk in float32, one carries their gradients to the hidden states, one to
    the weight: 12 * rows * width * vocab operations, like the products of two plain passes. Rows whose label does not count
    cost nothing on the CPU. Under autocast on a GPU, operands are rounded to its dtype; hidden states that are wider then
    travel as one stream and the difference, so that rounding does not drown it.

    Args:
        hidden, noised_hidden, weight, bias, softcap, temperature, memory_budget, vocab_group: as in `linear_symmetric_kl`.
        labels: integers of shape (...), of the whole vocabulary, each a class or `ignore_index`. Row t is compared with
            labels[t]: a causal model's labels have to be shifted before.
        r3f_lambda, reduction, ignore_index, num_items, label_smoothing: as in `r3f_loss`.
        grad: which branch the divergence sends gradients into, as in `R3F`; the task loss always reaches the clean one.

    Returns:
        R3FLoss(loss, task_loss, symm_kl), scalars; task_loss and symm_kl are detached. Where no label counts, the loss is 0
        with zero gradients.

    Raises:
        ValueError, TypeError: as `linear_symmetric_kl` and `r3f_loss`.
    """
    op = "linear_r3f_loss"
    _check(op, hidden, noised_hidden, weight, bias, softcap, temperature, grad)
    if vocab_group is not None and reduction == "fairseq" and label_smoothing:
        raise ValueError(f"{op}: reduction 'fairseq' with label smoothing is not served under vocab_group")
    weights = r3f_weights(
        op,
        hidden.shape[:-1],
        weight.shape[0] if vocab_group is None else None,
        hidden.device,
        labels,
        r3f_lambda=r3f_lambda,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items=num_items,
        label_smoothing=label_smoothing,
    )
    if r3f_lambda == 0:
        noised_hidden, grad = hidden.detach(), "none"
    value, kl, ce = _run(
        op, hidden, noised_hidden, weight, bias, weights.labels, weights.kl, weights.ce, ignore_index, weights.smoothing,
        softcap, temperature, grad, memory_budget, vocab_group, False,
    )  # fmt: skip
    check_bounded(op, kl)
    return weights.loss(value, kl, ce, out_dtype(_operand_dtype(hidden, noised_hidden, weight)))
