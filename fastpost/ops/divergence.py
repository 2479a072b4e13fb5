"""Divergence of two streams of logits: symmetric KL, alone or in one pass with the cross-entropy of the first stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpost.backends.reference import divergence_of_rows
from fastpost.backends.serving import contiguous
from fastpost.dispatch import select, strict
from fastpost.ops.autograd import apply_any, traced, transformed
from fastpost.ops.lists import mark_modified
from fastpost.ops.reductions import (
    R3FLoss,
    add_smoothing_gradient_,
    kl_weights,
    out_dtype,
    plus_smoothing_gradient,
    r3f_weights,
    smoothing_gap,
)
from fastpost.ops.registry import define
from fastpost.ops.row_losses import kl_losses, r3f_losses
from fastpost.ops.rows import RowValues, Streams, made_backward, scale_
from fastpost.row_tasks import DivergenceTask

# -- implementations behind torch.ops.fastpost ----------------------------------------------------------------------------


def _divergence_rows(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    kl_weights: Tensor | None,
    ce_weights: Tensor | None,
    want_clean: bool,
    want_noised: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = select("divergence_rows", clean.device, clean.dtype)
    like = select("gradient_like", clean.device, clean.dtype)
    clean, noised = rows_of(clean), rows_of(noised)  # torch.func hands its slices straight to this
    labels, kl_weights, ce_weights = (contiguous(t) for t in (labels, kl_weights, ce_weights))
    grad_clean, grad_noised = like(clean) if want_clean else None, like(noised) if want_noised else None
    kl, ce = function(DivergenceTask(clean, noised, labels, ignore_index, kl_weights, ce_weights, grad_clean, grad_noised))
    nothing = clean.new_empty(0)
    return (
        kl,
        ce,
        nothing if grad_clean is None else grad_clean,
        noised.new_empty(0) if grad_noised is None else grad_noised,
    )


def _divergence_rows_(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    kl_weights: Tensor | None,
    ce_weights: Tensor | None,
    want_clean: bool,
    want_noised: bool,
) -> tuple[Tensor, Tensor]:
    function = select("divergence_rows", clean.device, clean.dtype)
    labels, kl_weights, ce_weights = (contiguous(t) for t in (labels, kl_weights, ce_weights))
    grad_clean, grad_noised = clean if want_clean else None, noised if want_noised else None
    kl, ce = function(DivergenceTask(clean, noised, labels, ignore_index, kl_weights, ce_weights, grad_clean, grad_noised))
    return kl, ce


def _row_values(clean: Tensor) -> Tensor:
    return clean.new_empty(clean.shape[0], dtype=torch.float64)


_SIGNATURE = "Tensor? labels, int ignore_index, Tensor? kl_weights, Tensor? ce_weights, bool want_clean, bool want_noised"
_op_rows = define(
    f"divergence_rows(Tensor clean, Tensor noised, {_SIGNATURE}) -> (Tensor, Tensor, Tensor, Tensor)",
    _divergence_rows,
    lambda clean, noised, labels, ignore_index, kl_weights, ce_weights, want_clean, want_noised: (
        _row_values(clean),
        _row_values(clean),
        clean.new_empty(clean.shape if want_clean else 0),
        noised.new_empty(noised.shape if want_noised else 0),
    ),
)
_op_rows_ = define(
    f"divergence_rows_(Tensor(a!) clean, Tensor(b!) noised, {_SIGNATURE}) -> (Tensor, Tensor)",
    _divergence_rows_,
    lambda clean, *_: (_row_values(clean), _row_values(clean)),
)


# -- autograd -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Divergence:
    """kl * kl_weights + ce * ce_weights for each row; kl and ce for show. `more` are labels, kl_weights and ce_weights.

    Attributes:
        smoothing: label smoothing in torch's convention.
    """

    ignore_index: int
    smoothing: float
    inplace: bool = False
    overwrites: bool = False

    def values(
        self,
        want: Streams,
        clean: Tensor,
        noised: Tensor,
        labels: Tensor | None,
        kl_weights: Tensor | None,
        ce_weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rest = (labels, self.ignore_index, kl_weights, ce_weights, *want)
        gap = None
        if self.smoothing and labels is not None:
            gap = smoothing_gap(clean, labels, labels != self.ignore_index)
        if self.inplace:
            kl, ce = _op_rows_(clean, noised, *rest)
            # Whoever else wanted these logits in its backward is told by autograd's version check.
            mark_modified([t for t, wanted in zip((clean, noised), want, strict=True) if wanted])
            self._smooth_(clean if want[0] else None, labels, ce_weights)
            grads = [clean.new_empty(0), noised.new_empty(0)]
        else:
            kl, ce, *grads = _op_rows(clean, noised, *rest)
            self._smooth_(grads[0] if want[0] else None, labels, ce_weights)
        if gap is not None:
            ce = ce + self.smoothing * gap
        value = kl.clone() if kl_weights is None else kl * kl_weights
        if labels is not None:
            value = value + (ce if ce_weights is None else ce * ce_weights)
        return value, kl, ce, *grads

    def gradients(
        self,
        want: Streams,
        clean: Tensor,
        noised: Tensor,
        factors: Tensor,
        labels: Tensor | None,
        kl_weights: Tensor | None,
        ce_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        late = made_backward(clean.dtype)
        if late:  # the factors are in what is rounded
            factors = factors.double().contiguous()
            kl_weights = factors if kl_weights is None else kl_weights * factors
            if labels is not None:
                ce_weights = factors if ce_weights is None else ce_weights * factors
        rest = (labels, self.ignore_index, kl_weights, ce_weights, *want)
        if self.overwrites:
            _op_rows_(clean, noised, *rest)
            mark_modified([t for t, wanted in zip((clean, noised), want, strict=True) if wanted])
            grad_clean, grad_noised = clean.detach(), noised.detach()
        else:
            *_, grad_clean, grad_noised = _op_rows(clean, noised, *rest)
        self._smooth_(grad_clean if want[0] else None, labels, ce_weights)
        if not late:  # the bits of the first backward pass
            scale_([grad_clean, grad_noised], factors)
        return grad_clean, grad_noised

    def formula(
        self,
        clean: Tensor,
        noised: Tensor,
        factors: Tensor,
        labels: Tensor | None,
        kl_weights: Tensor | None,
        ce_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        *_, grad_clean, grad_noised = divergence_of_rows(clean, noised, labels, self.ignore_index, kl_weights, ce_weights)
        if self.smoothing and labels is not None and ce_weights is not None:
            grad_clean = plus_smoothing_gradient(grad_clean, labels, self.smoothing * ce_weights)
        factors = factors.unsqueeze(-1)
        return (factors * grad_clean).to(clean.dtype), (factors * grad_noised).to(noised.dtype)

    def _smooth_(self, grad: Tensor | None, labels: Tensor | None, ce_weights: Tensor | None) -> None:
        if self.smoothing and grad is not None and labels is not None and ce_weights is not None:
            add_smoothing_gradient_(grad, labels, self.smoothing * ce_weights)


def rows_of(logits: Tensor) -> Tensor:
    """(rows, classes) with contiguous classes; a view where the layout allows it."""
    flat = logits.reshape(-1, logits.shape[-1]) if logits.ndim != 2 else logits
    return flat if flat.stride(-1) == 1 and (flat.shape[0] <= 1 or flat.stride(0) >= flat.shape[1]) else flat.contiguous()


def check_logits(op: str, logits: Tensor, noised_logits: Tensor) -> None:
    for name, t in (("logits", logits), ("noised_logits", noised_logits)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
        if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; float16, bfloat16, float32 and float64 are served")
    if logits.shape != noised_logits.shape:
        raise ValueError(
            f"{op}: logits have shape {tuple(logits.shape)}, noised_logits {tuple(noised_logits.shape)}; they must agree"
        )
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits of shape {tuple(logits.shape)} have no classes in the last dimension")
    if logits.dtype != noised_logits.dtype:
        raise ValueError(f"{op}: logits are {logits.dtype}, noised_logits {noised_logits.dtype}; they must agree")
    if logits.device != noised_logits.device:
        raise ValueError(f"{op}: logits are on {logits.device}, noised_logits on {noised_logits.device}")


def _check_inplace(op: str, given: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], want: tuple[bool, ...]) -> None:
    for name, t, walked, wanted in zip(("logits", "noised_logits"), given, rows, want, strict=True):
        base = t._base if t._is_view() else t
        if wanted and base is not None and base.is_leaf and base.requires_grad:
            raise ValueError(
                f"{op}: inplace=True would overwrite {name}, a leaf that requires grad (or a view of one), whose value "
                "is still needed; pass the output of a model, or inplace=False"
            )
        if t.numel() and t.data_ptr() != walked.data_ptr():
            raise ValueError(
                f"{op}: inplace=True needs {name} whose last dimension is contiguous and whose rows lie at one distance; "
                f"the strides are {t.stride()}"
            )
    if _overlap(*rows):
        raise ValueError(f"{op}: inplace=True with logits that share memory; their gradients would overwrite each other")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two row-strided matrices share an element; rows of one stride may lie between each other."""
    if a.numel() == 0 or traced():
        return False
    (rows, cols), stride = a.shape, a.stride(0)
    first, second = sorted((a.data_ptr() // a.element_size(), b.data_ptr() // b.element_size()))
    if rows == 1 or stride != b.stride(0):
        return second - first < max(rows - 1, 0) * max(stride, b.stride(0)) + cols
    apart = second - first
    return apart < (rows - 1) * stride + cols and not cols <= apart % stride <= stride - cols


def _untraced(loss: Callable[..., Any], *args: Any) -> Any:
    """A loss as without a compiler, which does not trace what overwrites its arguments."""
    return torch.compiler.disable(loss)(*args)  # type: ignore[no-untyped-call]


# What torch.compiler.disable leaves on a function. As a decorator that would import the compiler along with fastpost.
vars(_untraced).update(
    _torchdynamo_disable=True,
    _torchdynamo_disable_msg="symmetric_kl/r3f_loss with inplace=True overwrite the logits, so they run between two graphs; "
    "leave out inplace=True or fullgraph=True",
)


def _run(
    op: str,
    logits: Tensor,
    noised_logits: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    kl_weights: Tensor | None,
    ce_weights: Tensor | None,
    smoothing: float,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    clean, noised = rows_of(logits), rows_of(noised_logits)
    # Under torch.func, which backward passes there will be is not known here.
    ahead = torch.is_grad_enabled() and not transformed()
    want = (ahead and clean.requires_grad, ahead and noised.requires_grad)
    if inplace and transformed():
        raise ValueError(f"{op}: inplace=True does not go with the transforms of torch.func; pass inplace=False")
    inplace = inplace and any(want)
    if inplace:
        _check_inplace(op, (logits, noised_logits), (clean, noised), want)
    kind = _Divergence(ignore_index, smoothing, inplace)
    if made_backward(clean.dtype):
        kind, want = _Divergence(ignore_index, smoothing, overwrites=inplace), (False, False)
    value, kl, ce, *_ = apply_any(RowValues, kind, want, clean, noised, labels, kl_weights, ce_weights)
    check_finite(op, kl)
    return value, kl, ce


def check_finite(op: str, kl: Tensor) -> None:
    """Under FASTPOST_CHECKS=1: raises ValueError naming the first row that has no divergence."""
    if strict() and not traced() and not bool(kl.isfinite().all()):
        at = int((~kl.isfinite()).nonzero()[0])
        why = "NaN or +inf" if bool(kl[at].isnan()) else "a class that is -inf in one stream only"
        raise ValueError(f"{op}: row {at} holds {why}, so its divergence is {float(kl[at])} (FASTPOST_CHECKS=1)")


def check_bounded(op: str, kl: Tensor) -> None:
    """Where asking is free: raises ValueError naming the first row whose divergence is infinite.

    Nothing can be learnt from it. NaN passes: an overflow is for the loss scaler to see.
    """
    if kl.device.type == "cpu" and not traced() and bool((kl == torch.inf).any()):
        at = int((kl == torch.inf).nonzero()[0])
        raise ValueError(f"{op}: row {at} holds a class that is -inf in one stream only, so its divergence is infinite")


def symmetric_kl(
    logits: Tensor,
    noised_logits: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    inplace: bool = False,
) -> Tensor:
    """KL(p || q) + KL(q || p) for p = softmax(logits), q = softmax(noised_logits) (R3F, 2008.03156, eq. 4).

    One pass from raw logits, gradients to both streams. Values are right to 1e-6 relative for float32 logits however close
    the streams are (the textbook formula loses every digit at differences of 1e-5; a wide row of tiny differences with one
    outlier loses up to 2.4e-6), never negative, and exactly 0 for identical rows. A class that is -inf in both streams does
    not exist; in one only, the value is inf.

    Args:
        logits, noised_logits: (..., classes); float16, bfloat16, float32 or float64. Arithmetic is float32 or wider.
        mask: bool of shape (...); rows where it is False count in no reduction and get no gradient.
        reduction: "none" gives shape (...), zeros where masked; "sum"; "mean" over the rows that count; "batchmean" divides
            the sum by logits.shape[0], as fairseq does.
        inplace: the gradients overwrite the logits in this very call, without any allocation of their size; then only one
            backward pass can be run, and nobody else may use the logits. float16 logits are overwritten in the backward
            pass, where a loss scale is known; gradients of other dtypes are multiplied by the factor that comes back.
            torch.compile ends its graph before the call, and begins another behind it.

    Returns:
        float32 (float64 for float64 logits). No rows, or none that count, give 0.

    Raises:
        ValueError: shapes, dtypes or devices differ; unknown reduction; wrong shape of the mask.
        TypeError: logits are not floating point, the mask not bool.
    """
    if inplace and torch.compiler.is_compiling():
        alone: Tensor = _untraced(_symmetric_kl, logits, noised_logits, mask, reduction, inplace)
        return alone
    found = kl_losses(False, logits, noised_logits, mask, reduction, _symmetric_kl, inplace)
    if found is None:
        return _symmetric_kl(logits, noised_logits, mask, reduction, inplace)
    loss, *divergences = found
    for kl in divergences:
        check_finite("symmetric_kl", kl)
    return loss


def _symmetric_kl(
    logits: Tensor, noised_logits: Tensor, mask: Tensor | None, reduction: str, inplace: bool = False
) -> Tensor:
    op = "symmetric_kl"
    check_logits(op, logits, noised_logits)
    rows = logits.shape[:-1]
    weights = kl_weights(op, rows, logits.device, mask, reduction)
    value, _, _ = _run(op, logits, noised_logits, None, -100, weights, None, 0.0, inplace)
    result = value.reshape(rows) if reduction == "none" else value.sum()
    return result.to(out_dtype(logits.dtype))


def r3f_loss(
    logits: Tensor,
    noised_logits: Tensor,
    labels: Tensor,
    *,
    r3f_lambda: float = 1.0,
    reduction: str = "token",
    ignore_index: int = -100,
    num_items: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    inplace: bool = False,
) -> R3FLoss:
    """Cross-entropy of the clean logits plus r3f_lambda times the symmetric KL of both streams, in one pass (2008.03156).

    Args:
        logits, noised_logits: (..., classes), as in `symmetric_kl`.
        labels: integers of shape (...), each a class or `ignore_index`.
        r3f_lambda: weight of the KL, >= 0; at 0 the noised stream is not looked at, gets zero gradients, and symm_kl is 0.
        reduction: how both terms are reduced.
            "token": averaged over the rows whose label counts (or divided by `num_items`).
            "sentence": averaged over the batch; for (batch, classes).
            "fairseq": cross-entropy averaged over the rows that count, KL summed over *every* row, padding included, and
            divided by logits.shape[0] (what label_smoothed_cross_entropy_r3f does).
            "sum": both summed over the rows that count.
        ignore_index: label of rows that do not count.
        num_items: divisor in place of the count, for gradient accumulation, a number or a tensor with one; "token" only.
            0, a step without a label that counts, gives loss 0 with zero gradients.
        label_smoothing: weight of the uniform distribution in the cross-entropy's target, in [0, 1), as in
            torch.nn.functional.cross_entropy; under "fairseq" spread over the other classes only, as fairseq does.
        inplace: as in `symmetric_kl`.

    Returns:
        R3FLoss(loss, task_loss, symm_kl), scalars; task_loss and symm_kl are detached. Where no label counts, the loss is 0
        with zero gradients, not NaN.

    Raises:
        ValueError: shapes, dtypes or devices differ; unknown reduction; labels out of range, or a class that is -inf in one
            stream only (on the CPU and under FASTPOST_CHECKS=1; elsewhere they give NaN and inf; with `inplace` such a class
            is found when gradients have taken the logits' place); r3f_lambda negative or not finite; num_items negative, not
            finite or with another reduction.
        TypeError: logits not floating point, labels not integers.
    """
    arguments = logits, noised_logits, labels, r3f_lambda, reduction, ignore_index, num_items, label_smoothing, inplace
    if inplace and torch.compiler.is_compiling():
        alone: R3FLoss = _untraced(_r3f_loss, *arguments)
        return alone
    found = None
    if not label_smoothing:
        found = r3f_losses(logits, noised_logits, labels, r3f_lambda, reduction, ignore_index, num_items, _r3f_loss, inplace)
    if found is None:
        return _r3f_loss(*arguments)
    for kl in found[3:]:
        check_finite("r3f_loss", kl)
        check_bounded("r3f_loss", kl)
    return R3FLoss(*found[:3])


def _r3f_loss(
    logits: Tensor,
    noised_logits: Tensor,
    labels: Tensor,
    r3f_lambda: float,
    reduction: str,
    ignore_index: int,
    num_items: float | Tensor | None,
    label_smoothing: float = 0.0,
    inplace: bool = False,
) -> R3FLoss:
    op = "r3f_loss"
    check_logits(op, logits, noised_logits)
    weights = r3f_weights(
        op,
        logits.shape[:-1],
        logits.shape[-1],
        logits.device,
        labels,
        r3f_lambda=r3f_lambda,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items=num_items,
        label_smoothing=label_smoothing,
    )
    value, kl, ce = _run(
        op, logits, noised_logits, weights.labels, ignore_index, weights.kl, weights.ce, weights.smoothing, inplace
    )
    check_bounded(op, kl)
    return weights.loss(value.sum(), kl, ce, out_dtype(logits.dtype))
