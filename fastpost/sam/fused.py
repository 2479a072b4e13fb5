"""SAM's restore and AdamW's step in one pass: w = AdamW(stash, g), so that w + e is neither read nor restored first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastpost import plan
from fastpost.ops import params as ops
from fastpost.sam.buckets import ParameterBucket


def check_fused_restore(bases: Sequence[Optimizer]) -> None:
    """Raises TypeError or ValueError where a base optimizer's step cannot be made from the stash."""
    for base in bases:
        if type(base) is not torch.optim.AdamW:
            raise TypeError(
                f"SAM: fused_restore=True makes AdamW's step itself; the base optimizer is {type(base).__name__}. Use "
                "torch.optim.AdamW, or leave fused_restore off"
            )
        for group in base.param_groups:
            for option in ("amsgrad", "differentiable"):
                if group[option]:
                    raise ValueError(f"SAM: fused_restore=True cannot serve AdamW({option}=True)")
            if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
                raise ValueError("SAM: fused_restore=True takes lr as a number or a CPU tensor, not from the device")
            for p in group["params"]:
                if isinstance(p, DTensor):
                    raise TypeError("SAM: fused_restore=True does not serve sharded parameters (DTensor); leave it off")
                if p.device.type != "cpu" and not (group["fused"] or group["capturable"]):
                    raise ValueError(
                        f"SAM: fused_restore=True on {p.device.type} needs AdamW(fused=True) or capturable=True, which keep "
                        "the step count on the device"
                    )


class FusedRestore:
    """Steps torch.optim.AdamW from the stash of a perturbation; state, hooks and formulas stay AdamW's own."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], tuple[tuple[int, ...], list[plan.Bucket]]] = {}

    def step(
        self,
        bases: Sequence[Optimizer],
        perturbed: Sequence[ParameterBucket],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> int | Tensor:
        """Writes every weight: stepped where it has a gradient, restored where it has none or a gradient is not finite.

        Args:
            bases: AdamW optimizers that `check_fused_restore` has accepted.
            perturbed: the buckets whose weights are w + e.
            scale, found_inf: as GradScaler hands them over. Gradients are divided by the scale on their way and stay scaled.

        Returns:
            How many steps were skipped.
        """
        stash = {id(w): s for b in perturbed for w, s in zip(b.params, b.bucket.stash, strict=True)}
        weights = {id(w): w for b in perturbed for w in b.params}
        skips = found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf)
        if not skips:
            for number, base in enumerate(bases):
                _hooks(base, _global_optimizer_pre_hooks, base._optimizer_step_pre_hooks)
                for index, group in enumerate(base.param_groups):
                    self._step_group((number, index), base, group, stash, scale, found_inf)
                _hooks(base, _global_optimizer_post_hooks, base._optimizer_step_post_hooks)
                base._opt_called = True  # type: ignore[attr-defined]  # a scheduler asks whether its optimizer has stepped
        if stash:  # those without a second gradient
            ops.sam_restore_([weights[key] for key in stash], list(stash.values()))
        return int(skips) if found_inf is None or found_inf.device.type == "cpu" else found_inf.sum()

    def _step_group(
        self,
        where: tuple[int, int],
        base: Any,
        group: dict[str, Any],
        stash: dict[int, Tensor],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        first: list[Tensor] = []
        second: list[Tensor] = []
        steps: list[Tensor] = []
        base._init_group(group, params, grads, first, second, [], steps)  # makes state as AdamW would
        if not params:
            return
        kept = [stash.pop(id(p), p) for p in params]
        torch._foreach_add_(steps, 1)
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        for b in self._bucketed(where, params, grads, kept, first, second):
            flags = [None if t is None else t.to(b.device) for t in (scale, found_inf)]
            ops.run(
                "sam_restore_adamw_", b, [steps[i] for i in b.streams], float(group["lr"]), betas, group["eps"],
                group["weight_decay"], group["maximize"], *flags,
            )  # fmt: skip
            b.release_gradients()
        ops.wrote([*params, *first, *second])
        if found_inf is not None and found_inf.device.type != "cpu":
            torch._foreach_sub_(steps, [found_inf.to(steps[0].device)] * len(steps))

    def _bucketed(self, where: tuple[int, int], *columns: list[Tensor]) -> list[plan.Bucket]:
        params, grads, kept, first, second = columns
        key = (*map(id, params), *map(id, kept), *map(id, first), *map(id, second))
        known, buckets = self._buckets.get(where, ((), []))
        in_step = all(g.stride() == p.stride() and g.dtype == p.dtype for g, p in zip(grads, params, strict=True))
        if key != known or not in_step:
            ops.check_lists("SAM", {"parameters": params, "gradients": grads}, written=("parameters",))
            buckets = ops.make_buckets(weights=params, grads=grads, stash=kept, first=first, second=second)
            self._buckets[where] = (key, buckets)
        for b in buckets:
            b.grads = [grads[i] for i in b.streams]
        return buckets


def _hooks(base: Optimizer, everywhere: dict[int, Any], own: dict[int, Any]) -> None:
    for hook in (*everywhere.values(), *own.values()):
        hook(base, (), {})
