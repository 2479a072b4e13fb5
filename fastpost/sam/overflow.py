"""An ascent gradient that is not finite, shown to everyone who looks at the second gradient."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpost import distributed
from fastpost.sam.buckets import ParameterBucket, total_squared_norm
from fastpost.sam.hooks import ParameterHooks
from fastpost.sam.reduction import Reduction


def at_hand(norm: Tensor) -> bool:
    """Whether reading this value waits for nobody."""
    return norm.device.type == "cpu"


class OverflowGuard:
    """Carries a non-finite ascent norm into the second pass.

    GradScaler, fused base optimizers and our own test all look for NaN in gradients. So the first gradient that the second
    backward pass brings forth gets NaN * (norm is not finite), that is NaN or nothing, added to one element: on the device,
    inside backward, hence before any `unscale_`. Parameters without a second gradient stay without one. A gradient that is
    assigned by hand (`torch.autograd.grad`) passes no hook; it is found when somebody who looks at gradients asks for the
    parameter groups, as GradScaler does.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._norm: Tensor | None = None
        self._seed: Tensor | None = None
        self._hooks = ParameterHooks()

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
        self._hook(params())

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

    @property
    def waits(self) -> bool:
        """Whether no second gradient has been seen to carry the seed."""
        return self._seed is not None

    def plant_in(self, params: Callable[[], list[Tensor]]) -> None:
        """Seeds a gradient that is there; again when asked again, because it may be dropped before the second pass."""
        seed, self._seed = self._seed, None
        assert seed is not None
        for p in params():
            # Not `reduction.gradient`, which may talk to other ranks: they need not be asking.
            if p.grad is not None and _plant(distributed.local(p.grad), seed):
                break
        self._seed = seed

    def _hook(self, params: list[Tensor]) -> None:
        myself = weakref.ref(self)

        def plant(p: Tensor) -> None:
            guard = myself()
            if guard is not None and guard._seed is not None:
                grad = guard._reduction.gradient(p)
                if grad is not None and _plant(grad, guard._seed):
                    guard._seed = None

        def register(p: Tensor) -> Iterable[Any]:
            return [p.register_post_accumulate_grad_hook(plant)]  # type: ignore[no-untyped-call]

        self._hooks.put(params, register)


@torch.no_grad()
def _plant(grad: Tensor, seed: Tensor) -> bool:
    """Adds the seed to one element; returns whether there was any."""
    values = values_of(grad)
    if values is None or not values.numel():
        return False
    values[(0,) * values.ndim].add_(seed.to(values.device, values.dtype))
    return True


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
