"""Uphill and downhill in one gradient: micro-batches that count with a sign and a weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

from fastpost import distributed
from fastpost.gap.checks import trained_parameters
from fastpost.ops.params import negate_


class SignedWindow:
    """Accumulates sign * weight * gradient over micro-batches, whoever computes their losses (GradDiff in any loop).

        with fastpost.gap.SignedWindow(model) as window:
            for batch, sign, weight in micro_batches:
                window.next(sign, weight)
                loss_of(model, batch).backward()
        optimizer.step()                       # p.grad is the signed sum; gradients from before the window count as they are

    Backward adds to `.grad`; so before a micro-batch that counts f = sign * weight the gradients so far are divided by f,
    and multiplied by it when that changes: in place, one pass over the gradients where f changes and none where it does
    not. For weights of 1 that is the fused negation, exact: the same bits as a loss times -1 (but for signs of zeros).
    Other weights round each gradient once more where they change, and what is divided by a small one grows: in float16,
    which ends at 65,504, scale the losses instead of giving weights far from 1.

    It is linear in the gradients, so it commutes with what averages them: DDP (also under `no_sync`), FSDP2 (also with
    gradients that wait for their reduction), a loss scaler. All ranks give the same signs and weights in the same order.

    Args:
        model: a module, or parameters.

    Raises:
        TypeError: neither a module nor parameters.
        ValueError: no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module | Iterable[Tensor]) -> None:
        self._params = trained_parameters("SignedWindow", model)
        self._factor = 1.0
        self._open = False

    def __enter__(self) -> SignedWindow:
        if self._open:
            raise RuntimeError("SignedWindow: already open")
        self._factor, self._open = 1.0, True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._count(1.0)
        self._open = False
        if kind is not None:  # half of a step is no step, and zero_grad() does not see it
            distributed.drop_waiting_gradients(self._params)

    def next(self, sign: int, weight: float = 1.0) -> None:
        """What is differentiated from here on counts sign * weight times.

        Args:
            sign: 1 goes downhill, -1 uphill.
            weight: finite and > 0; leave out what shall not count.

        Raises:
            ValueError: another sign or weight. RuntimeError: the window is not open. Nothing is written then.
        """
        if not self._open:
            raise RuntimeError("SignedWindow: next() is for inside `with`")
        if isinstance(sign, bool) or sign not in (1, -1):
            raise ValueError(f"SignedWindow: sign must be 1 or -1, not {sign!r}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"SignedWindow: weight must be finite and > 0, not {weight!r}")
        self._count(sign * weight)

    @torch.no_grad()
    def _count(self, factor: float) -> None:
        """Holds the gradients divided by `factor` from here on."""
        ratio = self._factor / factor
        self._factor = factor
        if ratio == 1:
            return
        held = [distributed.local_gradient(p) for p in self._params]
        present = [g for g in [*held, *distributed.waiting_gradients(self._params)] if g is not None and g.numel()]
        if not present:
            return
        if ratio == -1 and all(g.layout == torch.strided for g in present):
            negate_(present)
        else:
            torch._foreach_mul_(present, ratio)
