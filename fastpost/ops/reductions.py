"""How rows of logits are weighed and summed up: what `symmetric_kl`, `r3f_loss` and their fused-linear forms share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpost.errors import unknown
from fastpost.ops.autograd import checks_values, traced, waits
from fastpost.ops.scalars import check_number, check_real, check_whole

KL_REDUCTIONS = ("none", "sum", "mean", "batchmean")
_ELEMENTS = 1 << 18  # that are copied at a time
R3F_REDUCTIONS = ("token", "sentence", "fairseq", "sum")


class R3FLoss(NamedTuple):
    """loss = task_loss + r3f_lambda * symm_kl; only `loss` carries a graph."""

    loss: Tensor
    task_loss: Tensor
    symm_kl: Tensor


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a loss over logits of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def kl_weights(op: str, rows: torch.Size, device: torch.device, mask: Tensor | None, reduction: str) -> Tensor | None:
    """What each row's divergence is multiplied by before all are added up: float64 of shape (rows.numel(),), None for 1.

    Raises:
        ValueError: unknown reduction, wrong shape of the mask. TypeError: the mask is not bool.
    """
    if reduction not in KL_REDUCTIONS:
        raise unknown("reduction", reduction, KL_REDUCTIONS)
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"{op}: mask is a {type(mask).__name__}, not a tensor")
        if mask.shape != rows:
            raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, expected {tuple(rows)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask must be bool (True = counts), not {mask.dtype}")
    n = math.prod(rows)
    weights = None if mask is None else mask.reshape(-1).double()
    if reduction in ("mean", "batchmean"):
        batch = rows[0] if rows else 1
        if weights is None:
            scale = 1.0 / max(batch if reduction == "batchmean" else n, 1)
            weights = torch.full((n,), scale, dtype=torch.float64, device=device)
        elif reduction == "batchmean":
            weights = weights * (1.0 / max(batch, 1))
        else:
            weights = weights * (1.0 / weights.sum().clamp(min=1))
    return None if weights is None else _placed(weights, device)


@dataclass(frozen=True)
class R3FWeights:
    """How `r3f_loss` weighs its rows.

    Attributes:
        labels: int64 (rows,) on the logits' device.
        counts: bool (rows,), whether the label counts.
        ce_scale, kl_scale: what the sums of both terms are multiplied by.
        kl_rows: float64 (rows,), 1 for rows whose divergence counts.
        r3f_lambda: weight of the divergence.
        smoothing: label smoothing in torch's convention (weight of the uniform distribution).
    """

    labels: Tensor
    counts: Tensor
    ce_scale: Tensor | float
    kl_rows: Tensor
    kl_scale: Tensor | float
    r3f_lambda: float
    smoothing: float

    @property
    def ce(self) -> Tensor:
        return _placed(self.counts.double() * self.ce_scale, self.labels.device)

    @property
    def kl(self) -> Tensor:
        weights = self.kl_rows * self.kl_scale
        return _placed(weights if self.r3f_lambda == 1 else weights * self.r3f_lambda, self.labels.device)

    def loss(self, value: Tensor, kl: Tensor, ce: Tensor, dtype: torch.dtype) -> R3FLoss:
        """The loss from its weighted sum (with the graph) and from the rows' own values."""
        task = torch.where(self.counts, ce, torch.zeros_like(ce)).sum() * self.ce_scale
        symm = (kl * self.kl_rows).sum() * self.kl_scale
        return R3FLoss(value.to(dtype), task.detach().to(dtype), symm.detach().to(dtype))


def item_divisor(op: str, num_items: float | Tensor, device: torch.device) -> float | Tensor:
    """What sums over rows are divided by, in float64; infinite for 0 items, so that a step without a label gives 0.

    Raises:
        ValueError: negative, not finite or more than one number (a tensor's value is read on the CPU only).
    """
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"{op}: num_items must be one number, not a tensor of shape {tuple(num_items.shape)}")
        if num_items.requires_grad:
            raise TypeError(f"{op}: num_items is a tensor that requires a gradient, and gets none: pass num_items.detach()")
        known = checks_values(num_items.device)
        items = num_items.detach().reshape(()).to(device=device, dtype=torch.float64)
        if known and not 0 <= float(items) < math.inf:
            raise ValueError(f"{op}: num_items must be finite and >= 0, not {float(items):g}")
        return torch.where(items == 0, math.inf, items)
    check_real(op, "num_items", num_items)
    if not 0 <= num_items < math.inf:
        raise ValueError(f"{op}: num_items must be finite and >= 0, not {num_items}")
    return float(num_items) or math.inf


def r3f_weights(
    op: str,
    rows: torch.Size,
    classes: int | None,
    device: torch.device,
    labels: Tensor,
    *,
    r3f_lambda: float,
    reduction: str,
    ignore_index: int,
    num_items: float | Tensor | None,
    label_smoothing: float,
) -> R3FWeights:
    """Checks what `r3f_loss` takes beside its logits, and makes row weights of it.

    Args:
        rows: the logits' shape without classes.
        classes: their number; None: not known here, labels are checked later.
        device: where the logits are.

    Raises:
        ValueError, TypeError: as `r3f_loss`.
    """
    if reduction not in R3F_REDUCTIONS:
        raise unknown("reduction", reduction, R3F_REDUCTIONS)
    check_number(op, "r3f_lambda", r3f_lambda)
    check_number(op, "label_smoothing", label_smoothing)
    check_whole(op, "ignore_index", ignore_index)
    if label_smoothing >= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), not {label_smoothing}")
    if not isinstance(labels, Tensor):
        raise TypeError(f"{op}: labels are a {type(labels).__name__}, not a tensor")
    if labels.shape != rows:
        raise ValueError(f"{op}: labels have shape {tuple(labels.shape)}, expected {tuple(rows)}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{op}: labels must be integers, not {labels.dtype}")
    if reduction == "sentence" and len(rows) != 1:
        raise ValueError(f"{op}: reduction 'sentence' is for logits (batch, classes), not {(*rows, classes)}")
    if num_items is not None and reduction != "token":
        raise ValueError(f"{op}: num_items goes with reduction 'token', not {reduction!r}")
    labels = labels.reshape(-1).to(device=device, dtype=torch.int64).contiguous()
    counts = labels != ignore_index
    if classes is not None and checks_values(labels.device):
        outside = counts & ((labels < 0) | (labels >= classes))
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            raise ValueError(
                f"{op}: label {int(labels[at])} in row {at} is outside [0, {classes}) and is not ignore_index "
                f"({ignore_index})"
            )
    counted = counts.double()
    if reduction == "token" and num_items is not None:
        ce_scale: Tensor | float = 1.0 / item_divisor(op, num_items, device)
    elif reduction == "sum":
        ce_scale = 1.0
    else:
        ce_scale = counted.sum().clamp(min=1).reciprocal()
    fairseq = reduction == "fairseq"
    if fairseq and classes is not None and classes > 1:  # there the smoothed mass goes to the other classes, not to all
        label_smoothing *= classes / (classes - 1)
    return R3FWeights(
        labels,
        counts,
        ce_scale,
        torch.ones_like(counted) if fairseq else counted,
        1.0 / max(rows[0] if rows else 1, 1) if fairseq else ce_scale,
        r3f_lambda,
        label_smoothing,
    )


def _placed(weights: Tensor, device: torch.device) -> Tensor:
    return weights.to(device=device, dtype=torch.float64).contiguous()


# -- label smoothing ------------------------------------------------------------------------------------------------------
#
# With weight s on the uniform distribution, CE = lse - (1 - s) z_y - s mean(z): the plain one plus s (z_y - mean(z)). The
# kernels make the plain one; the rest is linear in the logits.


def smoothing_gap(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """z_y - mean(z) of every row, float64; 0 where the label does not count."""
    known = labels.clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
    gap = logits.gather(-1, known).squeeze(-1).double() - means(logits)
    return torch.where(counts, gap, torch.zeros_like(gap))


def means(logits: Tensor) -> Tensor:
    """Of every row, float64: a mean in float32 is rounded beside the logits, whose level may be far from 0."""
    if traced() or waits(logits.device):
        return logits.mean(-1, dtype=torch.float64)
    step = max(1, _ELEMENTS // logits.shape[-1])  # on a CPU torch copies what it sums up in another dtype
    parts = [logits[at : at + step].mean(-1, dtype=torch.float64) for at in range(0, len(logits), step)]
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float64)


def add_smoothing_gradient_(grad: Tensor, labels: Tensor, weights: Tensor) -> None:
    """grad += weights * d(z_y - mean(z))/dz for every row; rows of weight 0 stay as they are.

    Args:
        grad: (rows, classes).
        labels: (rows,).
        weights: (rows,), the rows' cross-entropy weights times s.
    """
    weights = weights.to(grad.dtype).unsqueeze(-1)
    grad.sub_(weights / grad.shape[-1])
    grad.scatter_add_(-1, labels.clamp(0, grad.shape[-1] - 1).unsqueeze(-1), weights)


def plus_smoothing_gradient(grad: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What `add_smoothing_gradient_` makes of grad, as a new tensor with a graph."""
    weights = weights.to(grad.dtype).unsqueeze(-1)
    return (grad - weights / grad.shape[-1]).scatter_add(-1, labels.clamp(0, grad.shape[-1] - 1).unsqueeze(-1), weights)
