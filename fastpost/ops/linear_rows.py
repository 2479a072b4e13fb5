"""The output head and the divergence of its rows, as torch.library sees them: one walk over chunks of rows.

Both streams are stacked, so the head's weight is read once for both: per chunk of rows one product makes the logits, the
row kernels turn them into their own gradients in place, and two products carry those to the hidden states and the weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.dispatch import select
from fastpost.ops.head import Head, power_of_two
from fastpost.ops.reductions import add_smoothing_gradient_, smoothing_gap
from fastpost.ops.registry import define
from fastpost.ops.vocab_parallel import group_named, sharded_divergence_rows_


class Settings(NamedTuple):
    """A call but for its tensors, as the operation takes it.

    softcap 0: none. grad "none": the divergence has no weight, and only the clean stream is looked at. group "": the
    vocabulary is whole.
    """

    ignore_index: int
    smoothing: float
    softcap: float
    temperature: float
    chunk: int
    grad: str
    dtype: torch.dtype
    group: str


def _linear_divergence(
    hidden: Tensor,
    noised: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    kl_weights: Tensor,
    ce_weights: Tensor | None,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    temperature: float,
    chunk: int,
    grad: str,
    dtype: torch.dtype,
    group: str,
    want: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    how = Settings(ignore_index, smoothing, softcap, temperature, chunk, grad, dtype, group)
    with torch.autocast(hidden.device.type, enabled=False):
        return _Run(hidden, noised, weight, bias, labels, kl_weights, ce_weights, how, want).over_all_rows()


def _grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient is kept in until the upstream gradient is known: float16 might lose it before a loss scale arrives."""
    return torch.float32 if dtype == torch.float16 else dtype


def _skips_rows(device: torch.device) -> bool:
    """Whether rows without a weight are left out of the walk: where asking for them waits for nothing."""
    return device.type == "cpu"


class _Run:
    """One walk over the rows, a chunk at a time."""

    def __init__(
        self,
        hidden: Tensor,
        noised: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        kl_weights: Tensor,
        ce_weights: Tensor | None,
        how: Settings,
        want: list[bool],
    ) -> None:
        self.hidden, self.noised, self.labels, self.how = hidden, noised, labels, how
        self.kl_weights, self.ce_weights = kl_weights, ce_weights
        self.head = Head(weight, bias, how.dtype)
        self.group = group_named(how.group) if how.group else None
        n, (vocab, width) = hidden.shape[0], weight.shape
        self.want_clean, self.want_noised, self.want_weight, self.want_bias = want
        self.kl, self.ce = (torch.zeros(n, dtype=torch.float64, device=hidden.device) for _ in range(2))

        def room(shape: tuple[int, ...], wanted: bool, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape if wanted else 0, dtype=dtype, device=hidden.device)

        self.grad_clean = room((n, width), self.want_clean, _grad_dtype(hidden.dtype))
        self.grad_noised = room((n, width), self.want_noised, _grad_dtype(noised.dtype))
        self.grad_weight = room((vocab, width), self.want_weight, self.head.work)
        self.grad_bias = room((vocab,), self.want_bias, self.head.work)
        self.one_stream = how.grad == "none"
        # Which logits get a gradient.
        shared = self.want_weight or self.want_bias
        self.want = (self.want_clean or shared, (self.want_noised or shared) and how.grad in ("both", "noised"))

    def over_all_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        used = self._used()
        total = len(self.hidden) if used is None else len(used)
        if total:
            chunk = -(-total // -(-total // self.how.chunk))  # of equal size
            shape = ((1 if self.one_stream else 2) * chunk, len(self.head.weight))
            logits = torch.empty(shape, dtype=self.head.work, device=self.hidden.device)
            apart = torch.empty_like(logits) if self.how.softcap and any(self.want) else None
            for at in range(0, total, chunk):
                rows = slice(at, min(at + chunk, total))
                self._over(rows if used is None else used[rows], logits, apart)
        if self.group is not None:  # each rank's columns have given their part of dX
            for grad in (self.grad_clean, self.grad_noised):
                if grad.numel():
                    dist.all_reduce(grad, group=self.group)
        return self.kl, self.ce, self.grad_clean, self.grad_noised, self.grad_weight, self.grad_bias

    def _used(self) -> Tensor | None:
        """The rows that have a weight, where asking is free; None for all. Padding and prompts then cost nothing."""
        if not _skips_rows(self.hidden.device):
            return None
        used = self._weighted(slice(None))
        return None if bool(used.all()) else used.nonzero().squeeze(-1)

    def _weighted(self, rows: slice | Tensor) -> Tensor:
        used = self.kl_weights[rows] != 0
        return used if self.ce_weights is None else used | (self.ce_weights[rows] != 0)

    def _without_unused(self, rows: slice | Tensor, hidden: Tensor) -> Tensor:
        return torch.where(self._weighted(rows).unsqueeze(-1), hidden, torch.zeros_like(hidden))

    def _over(self, rows: slice | Tensor, logits: Tensor, apart: Tensor | None) -> None:
        """One chunk. `logits` and `apart` are room for the streams' logits, and for gradients where those need their own."""
        head, how = self.head, self.how
        clean, noised = self.hidden[rows], self.noised[rows]
        if not _skips_rows(self.hidden.device):  # where 0 times NaN would be NaN
            clean, noised = self._without_unused(rows, clean), self._without_unused(rows, noised)
        n, both = len(clean), not self.one_stream
        x = torch.cat((clean.to(head.dtype), noised.to(head.dtype))) if both else clean.to(head.dtype)
        logits = logits[: len(x)]
        # The KL lives on what the streams differ by, and the rounding of two logits drowns a small difference. So it is the
        # difference that is multiplied: operands of 16 bits in a range of its own, unless the streams came in 16 bits.
        difference = factor = None
        if both and head.dtype != torch.float64:
            difference = noised.to(head.work) - clean.to(head.work)
            if head.dtype.itemsize == 2:
                factor = power_of_two(difference)
                difference = (difference * factor).to(head.dtype)
        if difference is not None and (
            factor is None or head.dtype.itemsize < min(clean.dtype.itemsize, noised.dtype.itemsize)
        ):
            head.products(torch.cat((x[:n], difference)), logits)
            if factor is not None:
                logits[n:].div_(factor)
            logits[n:].add_(logits[:n])
        else:
            head.products(x, logits)
        if head.bias is not None:
            logits.add_(head.bias)
        if how.softcap:
            logits.div_(how.softcap).tanh_().mul_(how.softcap)
        if how.temperature != 1:
            logits.div_(how.temperature)

        grads = logits if apart is None else apart[: len(x)]
        self._divergence(rows, (logits[:n], logits[n:] if both else logits), (grads[:n], grads[n:]))
        if apart is not None:  # d cap(y) / dy = 1 - (cap(y) / softcap)^2
            grads.mul_(logits.mul_(how.temperature / how.softcap).square_().neg_().add_(1))
        if not any(self.want):
            return
        if self.want_bias:
            self.grad_bias += grads[0 if self.want[0] else n : 2 * n if self.want[1] else n].sum(0)
        if difference is not None and factor is not None and all(self.want):
            # G1' X1 + G2' X2 = (G1 + G2)' X1 + G2' (X2 - X1): the KL's two gradients all but cancel, and rounded would not.
            grads[:n] += grads[n:]
            total, rest = self._carry(grads[:n], x[:n], None), self._carry(grads[n:], difference, factor)
            if total is not None and rest is not None:
                self._hand_out(rows, total - rest, rest)
        else:
            live = slice(0 if self.want[0] else n, 2 * n if self.want[1] else n)
            gradient = self._carry(grads[live], x[live], None)
            if gradient is not None:
                self._hand_out(rows, gradient[:n] if self.want[0] else None, gradient[-n:] if self.want[1] else None)

    def _divergence(self, rows: slice | Tensor, logits: tuple[Tensor, Tensor], room: tuple[Tensor, Tensor]) -> None:
        """Values of these rows, and the logits' gradients, already divided by the temperature, in `room`."""
        how = self.how
        weights = self.kl_weights[rows] / how.temperature
        labels = ce_weights = gap = None
        if self.labels is not None:
            assert self.ce_weights is not None
            labels, ce_weights = self.labels[rows], self.ce_weights[rows] / how.temperature
        grads = (room[0] if self.want[0] else None, room[1] if self.want[1] else None)
        if self.group is not None:
            self.kl[rows], self.ce[rows] = sharded_divergence_rows_(
                logits, labels, how.ignore_index, weights, ce_weights, how.smoothing, grads, how.grad != "noised", self.group
            )
            return
        function = select("divergence_rows", logits[0].device, logits[0].dtype)
        if how.smoothing and labels is not None:
            gap = smoothing_gap(logits[0], labels, labels != how.ignore_index)
        if how.grad == "noised":
            # The teacher's logits send back the cross-entropy only, which overwrites them when the divergence is done.
            kl, ce = function(*logits, None, how.ignore_index, weights, None, None, grads[1])
            if labels is not None:
                off = torch.zeros_like(weights)
                _, ce = function(logits[0], logits[0], labels, how.ignore_index, off, ce_weights, grads[0], None)
            elif grads[0] is not None:
                grads[0].zero_()
        else:
            kl, ce = function(*logits, labels, how.ignore_index, weights, ce_weights, *grads)
        if gap is not None:
            assert labels is not None
            assert ce_weights is not None
            ce = ce + how.smoothing * gap
            if grads[0] is not None:
                add_smoothing_gradient_(grads[0], labels, how.smoothing * ce_weights)
        self.kl[rows], self.ce[rows] = kl, ce

    def _carry(self, grads: Tensor, x: Tensor, x_factor: Tensor | None) -> Tensor | None:
        """From logits' gradients to the weight's, and to those of the hidden states, where wanted.

        Args:
            grads: (rows, vocab).
            x: (rows, width), what they are multiplied by for the weight's gradient, times x_factor.
        """
        operand, factor = self.head.operand(grads)
        if self.want_weight:
            both = factor if x_factor is None else x_factor if factor is None else factor * x_factor
            self.head.add_weight_gradient_(self.grad_weight, operand, both, x)
        return self.head.hidden_gradient(operand, factor) if self.want_clean or self.want_noised else None

    def _hand_out(self, rows: slice | Tensor, clean: Tensor | None, noised: Tensor | None) -> None:
        if self.want_clean and clean is not None:
            self.grad_clean[rows] = clean.to(self.grad_clean.dtype)
        if self.want_noised and noised is not None:
            self.grad_noised[rows] = noised.to(self.grad_noised.dtype)


def _fake(hidden: Tensor, noised: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype, want = rest[-3], rest[-1]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float64),
        hidden.new_empty(hidden.shape[0], dtype=torch.float64),
        hidden.new_empty(hidden.shape, dtype=_grad_dtype(hidden.dtype)) if want[0] else hidden.new_empty(0),
        noised.new_empty(noised.shape, dtype=_grad_dtype(noised.dtype)) if want[1] else noised.new_empty(0),
        hidden.new_empty(weight.shape if want[2] else 0, dtype=work),
        hidden.new_empty(weight.shape[0] if want[3] else 0, dtype=work),
    )


linear_divergence = define(
    "linear_divergence(Tensor hidden, Tensor noised, Tensor weight, Tensor? bias, Tensor? labels, Tensor kl_weights, "
    "Tensor? ce_weights, int ignore_index, float smoothing, float softcap, float temperature, int chunk, str grad, "
    "ScalarType dtype, str group, bool[] want) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_divergence,
    _fake,
)
