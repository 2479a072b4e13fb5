"""The output head and the loss in one: divergences, R3F's and R-Drop's losses from hidden states; no full logits."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.errors import unknown
from fastpost.ops.chunks import chunk_rows
from fastpost.ops.divergence import check_bounded, check_finite
from fastpost.ops.fused_loss import fused_loss
from fastpost.ops.head import check_head, check_tensor, operand_dtype
from fastpost.ops.linear_rows import ROW_KERNELS, Settings
from fastpost.ops.reductions import R3FLoss, kl_weights, out_dtype, r3f_weights
from fastpost.ops.scalars import POSITIVE, check_number

GRADS = ("both", "noised", "clean")


def _check(
    op: str, hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float,
    grad: str, second: str = "noised_hidden",
) -> None:  # fmt: skip
    """Refuses what does not fit; `second` is what the caller names the other stream."""
    sharded = "under tensor parallelism pass its local part, .to_local(), and vocab_group="
    check_head(op, hidden, weight, bias, softcap, sharded=sharded)
    check_tensor(op, second, noised, sharded)
    if noised.device != hidden.device:
        raise ValueError(f"{op}: hidden is on {hidden.device}, {second} on {noised.device}")
    if hidden.shape != noised.shape:
        raise ValueError(f"{op}: hidden has shape {tuple(hidden.shape)}, {second} {tuple(noised.shape)}; they must agree")
    check_number(op, "temperature", temperature, POSITIVE)
    if grad not in GRADS:
        raise unknown("grad", grad, GRADS)


def _run(
    op: str, hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None,
    weights: list[Tensor], ignore_index: int, smoothing: float, softcap: float | None, temperature: float, grad: str,
    memory_budget: int, group: dist.ProcessGroup | None, per_row: bool, divergence: str = "symmetric_kl",
    both_classify: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The weighted sum with its graph (per_row: every row's value), the sums of both kinds, the rows' values; float64."""
    dtype = operand_dtype(weight, hidden, noised)
    flat = [t.reshape(-1, t.shape[-1]) for t in (hidden, noised)]
    vocab, width = weight.shape
    chunk = chunk_rows(op, len(flat[0]), vocab, width, dtype, hidden.device, memory_budget, group)
    how = Settings(
        ignore_index, smoothing, softcap or 0.0, temperature, chunk, grad, dtype, "" if group is None else group.group_name,
        divergence, both_classify,
    )  # fmt: skip
    value, sums, values = fused_loss("divergence", how, (*flat, weight, bias), labels, weights, per_row)
    check_finite(op, values[0])
    return value, sums, values


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
        memory_budget: bytes for what is held of the logits, > 0. Where it holds all rows there is one chunk of them (on
            CPUs of 1,024 at most), else chunks of a multiple of 256 or 128 rows; it wins down to 64. Gradients of the size
            of weight and hidden are extra (a 16-bit weight's is summed in float32), as are 64 MB at most.
        vocab_group: process group whose ranks hold one slice of the vocabulary each, in the order of their ranks, as weight
            and bias; hidden is the same on all of them. Gradients of hidden are summed over the group.

    Returns:
        float32 (float64 where an argument is): a scalar, or (...) under "none".

    Raises:
        ValueError: shapes or devices that do not fit, unknown reduction or grad, softcap or temperature not positive, a
            budget too small for 64 rows.
        TypeError: dtypes that are not served; a DTensor.
    """
    return _divergence(
        "linear_symmetric_kl", "symmetric_kl", hidden, noised_hidden, weight, bias, mask, reduction, softcap, temperature,
        grad, memory_budget, vocab_group,
    )  # fmt: skip


def linear_js_divergence(
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
) -> Tensor:
    """`js_divergence` of two streams of hidden states under one output head, whose logits are never held all at once.

    At most ln 2 in each row, never negative, exactly 0 for identical streams. Its rows have a compiled kernel on the CPU and
    on CUDA, where they are read three times, the symmetric KL's twice.

    Args:
        hidden, noised_hidden, weight, bias, mask, reduction, softcap, temperature, grad, memory_budget: as in
            `linear_symmetric_kl`. A vocabulary that is cut across ranks is not served.

    Returns:
        float32 (float64 where an argument is): a scalar, or (...) under "none".

    Raises:
        ValueError, TypeError: as `linear_symmetric_kl`.
    """
    return _divergence(
        "linear_js_divergence", "js", hidden, noised_hidden, weight, bias, mask, reduction, softcap, temperature, grad,
        memory_budget, None,
    )  # fmt: skip


def _divergence(
    op: str, divergence: str, hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    reduction: str, softcap: float | None, temperature: float, grad: str, memory_budget: int,
    group: dist.ProcessGroup | None,
) -> Tensor:  # fmt: skip
    _check(op, hidden, noised, weight, bias, softcap, temperature, grad)
    rows = hidden.shape[:-1]
    weights = kl_weights(op, rows, hidden.device, mask, reduction)
    if weights is None:
        weights = torch.ones(math.prod(rows), dtype=torch.float64, device=hidden.device)
    value, _, _ = _run(
        op, hidden, noised, weight, bias, None, [weights], -100, 0.0, softcap, temperature, grad, memory_budget, group,
        reduction == "none", divergence,
    )  # fmt: skip
    dtype = out_dtype(operand_dtype(weight, hidden, noised))
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
    divergence: str = "symmetric_kl",
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
        divergence: "symmetric_kl", or "js", the Jensen-Shannon divergence, as in `R3F`; not with a vocab_group.

    Returns:
        R3FLoss(loss, task_loss, symm_kl), scalars; task_loss and symm_kl (the divergence) are detached. Where no label
        counts, the loss is 0 with zero gradients.

    Raises:
        ValueError, TypeError: as `linear_symmetric_kl` and `r3f_loss`.
    """
    op = "linear_r3f_loss"
    _check(op, hidden, noised_hidden, weight, bias, softcap, temperature, grad)
    if divergence not in ROW_KERNELS:
        raise unknown("divergence", divergence, tuple(ROW_KERNELS))
    if vocab_group is not None and divergence != "symmetric_kl":
        raise ValueError(f"{op}: divergence {divergence!r} is not served under vocab_group; gather the head's weight")
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
    value, sums, values = _run(
        op, hidden, noised_hidden, weight, bias, weights.labels, [weights.kl, weights.ce], ignore_index, weights.smoothing,
        softcap, temperature, grad, memory_budget, vocab_group, False, divergence,
    )  # fmt: skip
    check_bounded(op, values[0])
    return _loss(value, sums, r3f_lambda, out_dtype(operand_dtype(weight, hidden, noised_hidden)))


def _loss(value: Tensor, sums: Tensor, factor: float, dtype: torch.dtype) -> R3FLoss:
    """The loss and its parts from the sums of both kinds, of which the divergence's holds its factor."""
    if factor not in (0, 1):
        sums = torch.stack((sums[0] / factor, sums[1]))
    symm_kl, task_loss = sums.detach().to(dtype).unbind()
    return R3FLoss(value.to(dtype), task_loss, symm_kl)


def linear_r_drop_loss(
    hidden: Tensor,
    second_hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    reduction: str = "token",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    memory_budget: int = 1 << 30,
) -> R3FLoss:
    """R-Drop's loss of two passes' hidden states under one output head, whose logits are never held all at once.

    (CE1 + CE2) / 2 + alpha * (KL(p1 || p2) + KL(p2 || p1)) / 2, as `fastpost.r3f.relatives.RDrop` (2106.14448, section 2,
    with the averages of its released code). Both cross-entropies and the KL come out of one walk over the rows, at the cost
    of `linear_r3f_loss`.

    Args:
        hidden, second_hidden: (..., width), of two passes with dropout masks of their own.
        weight, bias, softcap, temperature, memory_budget: as in `linear_symmetric_kl`. The temperature divides logits of
            the cross-entropies as well. A vocabulary that is cut across ranks is not served.
        labels: as in `linear_r3f_loss`.
        alpha: weight of the KL, >= 0. At 0 the cross-entropies of both passes remain.
        reduction, ignore_index, num_items, label_smoothing: as in `r3f_loss`.

    Returns:
        R3FLoss(loss, task_loss, symm_kl), scalars: loss = task_loss + alpha * symm_kl, symm_kl half the symmetric KL;
        task_loss and symm_kl are detached. Where no label counts, the loss is 0 with zero gradients.

    Raises:
        ValueError, TypeError: as `linear_r3f_loss`.
    """
    op = "linear_r_drop_loss"
    _check(op, hidden, second_hidden, weight, bias, softcap, temperature, "both", "second_hidden")
    check_number(op, "alpha", alpha)
    weights = r3f_weights(
        op,
        hidden.shape[:-1],
        weight.shape[0],
        hidden.device,
        labels,
        r3f_lambda=alpha,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items=num_items,
        label_smoothing=label_smoothing,
    )
    kl, ce, targets, grad = weights.kl / 2, weights.ce / 2, weights.labels, "both"
    if alpha == 0:  # two streams that have nothing to do with each other are one, twice as long
        flat = (t.reshape(-1, t.shape[-1]) for t in (hidden, second_hidden))
        kl, ce, targets, grad = kl.repeat(2), ce.repeat(2), targets.repeat(2), "none"
        hidden = torch.cat(tuple(flat))
        second_hidden = hidden.detach()
    value, sums, values = _run(
        op, hidden, second_hidden, weight, bias, targets, [kl, ce], ignore_index, weights.smoothing, softcap, temperature,
        grad, memory_budget, None, False, "symmetric_kl", grad == "both",
    )  # fmt: skip
    check_bounded(op, values[0])
    return _loss(value, sums, alpha, out_dtype(operand_dtype(weight, hidden, second_hidden)))
