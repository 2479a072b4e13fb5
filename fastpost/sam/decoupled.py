"""Decoupled WSAM: sharpness steps beside the base optimizer, which sees the gradient alone."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fastpost import distributed
from fastpost.ops.params import chunk_squares
from fastpost.sam.external import ExternalSAM
from fastpost.sam.optimizer import SAM
from fastpost.sam.step import Gradients, ratio
from fastpost.sam.variants import WSAM, VariantContext


class DecoupledWSAM(WSAM):
    """WSAM in the form that its authors' code takes by default (2305.15817): sharpness stays out of the moments.

    The base optimizer steps with g, the gradient at w, and then w loses lr gamma / (1 - gamma) (g' - g), g' the gradient at
    w + e. `WSAM` feeds the sum of both to the base optimizer; for SGD without momentum that is the same::

        wsam = DecoupledWSAM(gamma=0.9)
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3, variant=wsam)
        wsam.attach(opt)

    lr is that of the parameter's group. A factor that the caller puts on all gradients after the second pass (unscaling,
    `clip_grad_norm_`) is put on g' - g as well: what clips sees g. `clip_grad_value_` has no common factor: g' - g is then
    scaled by the ratio of the norms, so clip by norm instead. A parameter whose gradient is removed after the second pass
    stays where it is. Where g' is not finite, nor is what is left in `.grad`, and the whole step is skipped.

    Two copies of the gradients are held between the second pass and the step. In 16-bit weights a step is rounded twice. Not
    for trainers, whose optimizer is stepped by others, nor with `fused_restore`. A copy or a pickle of the optimizer is to
    be attached again.

    Args:
        gamma: in [0, 1), as in `WSAM`.
    """

    serves_fused_restore = False  # which steps before w is back

    def __init__(self, gamma: float = 0.9) -> None:
        super().__init__(gamma)
        self._attached = False
        self._sharpness: Gradients = {}
        self._context: VariantContext | None = None
        self._squares: Gradients = {}  # of each parameter's g, as it came out of the second pass: float64 scalars
        self._factor: Tensor | None = None

    def attach(self, optimizer: SAM) -> None:
        """Steps along the sharpness after each step of the base optimizer.

        Raises:
            TypeError: not a SAM that steps its own base optimizer.
            ValueError: it has another variant, several base optimizers, or a group without a learning rate.
        """
        if not isinstance(optimizer, SAM) or isinstance(optimizer, ExternalSAM):
            raise TypeError(f"DecoupledWSAM: attach() takes a fastpost.SAM in a loop, not {type(optimizer).__name__}")
        base: Any = optimizer.base_optimizer
        if optimizer.variant is not self or self._attached:
            raise ValueError("DecoupledWSAM: attach it once, to the SAM whose variant it is")
        if sum(len(group["params"]) for group in base.param_groups) != len(optimizer.tensors()):
            raise ValueError("DecoupledWSAM: it serves one base optimizer, not several")
        if any(group.get("lr") is None for group in base.param_groups):
            raise ValueError("DecoupledWSAM: a group of the base optimizer has no lr, by which sharpness is stepped")
        mine = weakref.ref(optimizer)  # or base and SAM would keep each other alive

        def before(base: Any, *_: Any) -> None:
            sam = mine()
            self._before(base, sam is not None and sam.is_perturbed)

        base.register_step_pre_hook(before)
        base.register_step_post_hook(lambda base, *_: self._after(base))
        self._attached = True

    def descend(self, context: VariantContext, clean: Gradients, second: Gradients) -> None:
        if not self._attached:
            raise RuntimeError("SAM: DecoupledWSAM steps beside the base optimizer; call attach(opt) after building SAM")
        at_w = {p: clean[p] if p in clean else torch.zeros_like(g) for p, g in second.items()}
        sharpness = {p: g - at_w[p] for p, g in second.items()}
        finite = torch.isfinite(context.dot(sharpness, sharpness))  # not where g or g' overflowed, nor where g' - g does
        for p, g in second.items():
            g.copy_(torch.where(finite.to(g.device), at_w[p], torch.nan))  # for all who look for overflows
        chunks = chunk_squares(list(second.values()))
        self._squares = {p: squares.sum() for p, squares in zip(second, chunks, strict=True)}
        self._context, self._sharpness = context, sharpness

    def forget(self) -> None:
        self._sharpness = {}
        self._squares = {}
        self._context = self._factor = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(type(self)(self.gamma))  # base optimizers are copied without their hooks

    @torch.no_grad()
    def _before(self, base: Any, perturbed: bool) -> None:
        """Finds out by which factor the gradients have changed since the second pass."""
        self._factor = None
        if self._context is None:
            return
        if perturbed:
            raise RuntimeError(
                "SAM: DecoupledWSAM steps from w, and the base optimizer was stepped at w + e; call the SAM's step(). "
                "opt.abandon() gives this step up"
            )
        held = {p: g for p in self._sharpness if (g := distributed.local_gradient(p)) is not None}
        self._sharpness = {p: self._sharpness[p] for p in held}
        before = self._context.total({p: self._squares[p] for p in held})
        factor = ratio(self._context.dot(held, held), before).sqrt()
        # Not after an overflow that somebody has removed from the gradients.
        factor = torch.where(torch.isfinite(before), factor, 0.0)
        scale, found_inf = getattr(base, "grad_scale", None), getattr(base, "found_inf", None)
        if scale is not None:  # comes off in the base optimizer's own step
            factor = factor / scale.to(factor)
        if found_inf is not None:
            factor = torch.where(found_inf.to(factor.device) == 0, factor, 0.0)
        self._factor = factor

    @torch.no_grad()
    def _after(self, base: Any) -> None:
        if self._factor is None:
            return
        weight = self.gamma / (1 - self.gamma)
        moved = []
        for group in base.param_groups:
            sign = 1 if group.get("maximize", False) else -1
            for p in group["params"]:
                s = self._sharpness.pop(p, None)
                if s is not None:
                    factor = self._factor * (sign * weight * group["lr"])
                    # Where the base optimizer left its step out, s may be infinite.
                    step = torch.where(factor.to(s.device) != 0, s * factor.to(s), torch.zeros_like(s))
                    distributed.local(p).add_(step)
                    moved.append(p)
        self.forget()
        if distributed.active():
            distributed.reshard(moved)
