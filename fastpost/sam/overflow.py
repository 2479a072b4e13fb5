"""An ascent gradient that is not finite, shown to everyone who looks at the second gradient."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpost.sam.buckets import ParameterBucket, total_squared_norm
from fastpost.sam.reduction import Reduction


def at_hand(norm: Tensor) -> bool:
    """Whether reading this value waits for nobody."""
    return norm.device.type == "cpu"


class OverflowGuard:
    """Carries a non-finite ascent norm into the second pass.

    GradScaler, fused base optimizers and our own test all look for NaN in gradients. So the first gradient that the second
    backward pass brings forth gets NaN * (norm is not finite), that is NaN or nothing, added to one element: on the device,
    inside backward, hence before any `unscale_`. Parameters without a second gradient stay without one.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._norm: Tensor | None = None
        self._seed: Tensor | None = None
        self._hooked: tuple[int, ...] = ()
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def saw(self, squared: Tensor, params: Callable[[], list[Tensor]]) -> None:
        """Remembers the squared norm of an ascent; `params` returns those that may get a second gradient."""
        # Sums of squares stay NaN or inf once they are: windows that ascend several times add up.
        self._norm = squared if self._norm is None else self._norm + squared.to(self._norm.device)
        self.rearm(params)

    def rearm(self, params: Callable[[], list[Tensor]]) -> None:
        """Seeds (again) the next gradient to appear, as after the gradients were dropped."""
        norm = self._norm
        if norm is None or (at_hand(norm) and bool(torch.isfinite(norm))):
            self._seed = None
            return
        self._seed = torch.where(torch.isfinite(norm), torch.zeros_like(norm), torch.full_like(norm, math.nan))
        self._hook([p for p in params() if p.requires_grad])

    def forget(self) -> None:
        """The step is given up."""
        self._norm = self._seed = None

    @property
    def armed(self) -> bool:
        """Whether there was an ascent since the last step."""
        return self._norm is not None

    def take(self) -> Tensor | None:
        """The squared norm seen since the last step, None without one; the guard starts afresh."""
        norm = self._norm
        self.forget()
        return norm

    def _hook(self, params: list[Tensor]) -> None:
        key = tuple(map(id, params))
        if key == self._hooked:
            return
        self._hooked = ()
        _remove(self._handles)
        myself = weakref.ref(self)

        def plant(p: Tensor) -> None:
            guard = myself()
            if guard is not None and guard._seed is not None:
                guard._plant(p)

        self._handles += [p.register_post_accumulate_grad_hook(plant) for p in params]  # type: ignore[no-untyped-call]
        self._hooked = key

    @torch.no_grad()
    def _plant(self, p: Tensor) -> None:
        grad = self._reduction.gradient(p)
        values = None if grad is None else values_of(grad)
        if values is None or not values.numel():
            return
        assert self._seed is not None
        values[(0,) * values.ndim].add_(self._seed.to(values.device, values.dtype))
        self._seed = None


def values_of(gradient: Tensor) -> Tensor | None:
    """The values that a gradient stores, as memory that can be read and written; None where it has none."""
    if gradient.device.type == "meta":
        return None
    if gradient.layout == torch.strided:
        return gradient
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient.values()


def is_finite(gradient: Tensor) -> Tensor:
    """Whether all of a gradient is, whatever its layout and dtype: a bool scalar on its device."""
    values = values_of(gradient)
    if values is None:
        return torch.ones((), dtype=torch.bool)
    wide = values if values.is_complex() or values.dtype.itemsize > 1 else values.float()
    return torch.isfinite(wide).all()


@torch.no_grad()
def overflowed(
    ascent: Tensor,
    found_inf: Tensor | None,
    buckets: Sequence[ParameterBucket],
    reduction: Reduction,
    others: Iterable[Tensor] = (),
) -> Tensor:
    """1.0 where a gradient of either pass is not finite on any rank, else 0.0; a float32 scalar as GradScaler's found_inf.

    Args:
        ascent: squared norm of the ascent gradient.
        found_inf: what GradScaler found in the second gradient; None where nobody has looked.
        buckets: the second gradients, to be looked at where nobody has.
        others: second gradients that fit into no bucket.
        reduction: how ranks agree.
    """
    bad = (~torch.isfinite(ascent)).float()
    if found_inf is not None:
        bad = torch.maximum(found_inf.float(), bad.to(found_inf.device))
    elif buckets:
        norm = total_squared_norm(buckets, [None] * len(buckets), reduction)
        bad = torch.maximum(bad.to(norm.device), (~torch.isfinite(norm)).float())
    if found_inf is None:
        for gradient in others:
            bad = torch.maximum(bad, (~is_finite(gradient)).float().to(bad.device))
    return reduction.agree(bad)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
