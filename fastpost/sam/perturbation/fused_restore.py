"""The way back from w + e in one pass with AdamW's step, from the stash."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastpost import plan
from fastpost.distributed import is_sharded
from fastpost.ops import params as ops
from fastpost.sam.buckets import ParameterBucket
from fastpost.sam.perturbation.stored import Perturbation

Flags = tuple["Tensor | None", "Tensor | None"]  # GradScaler's scale, and what it has found in the gradients


def check_fused_restore(bases: Sequence[Optimizer]) -> None:
    """Raises TypeError or ValueError where a base optimizer's step cannot be made from the stash."""
    for base in bases:
        if type(base) is not torch.optim.AdamW:
            raise TypeError(
                f"SAM: fused_restore=True makes AdamW's step itself; the base optimizer is {type(base).__name__}. Use "
                "torch.optim.AdamW, or leave fused_restore off"
            )
        for group in base.param_groups:
            why_not = _refuses_options(group)
            if why_not is not None:
                raise ValueError(f"SAM: fused_restore=True cannot serve {why_not}")
            for p in group["params"]:
                if is_sharded(p):
                    raise TypeError("SAM: fused_restore=True does not serve sharded parameters (DTensor); leave it off")
                if not p.is_cpu and not (group["fused"] or group["capturable"]):
                    raise ValueError(
                        f"SAM: fused_restore=True on {p.device.type} needs AdamW(fused=True) or capturable=True, which keep "
                        "the step count on the device"
                    )


def _refuses_options(group: dict[str, Any]) -> str | None:
    for option in ("amsgrad", "differentiable"):
        if group[option]:
            return f"AdamW({option}=True)"
    if isinstance(group["lr"], Tensor) and not group["lr"].is_cpu:
        return "lr from the device; give it as a number or a CPU tensor"
    return None


def _refuses_tensors(group: dict[str, Any], state: Mapping[Tensor, Any]) -> str | None:
    """Why gradients and moments, as they are now, cannot be walked in step with their weights.

    Raises:
        ValueError: AdamW cannot step with them either.
    """
    params = [p for p in group["params"] if p.grad is not None]
    known = [p for p in params if state.get(p)]
    columns = {"gradients": (params, [p.grad for p in params])}
    for name in ("exp_avg", "exp_avg_sq"):
        columns[name] = (known, [state[p].get(name) for p in known])
    for name, (owners, tensors) in columns.items():
        if not all(isinstance(t, Tensor) and t.layout == torch.strided and t.is_floating_point() for t in tensors):
            return f"{name} that are sparse, complex or missing"
        for what in ("dtype", "shape", "device"):
            theirs, own = (list(map(attrgetter(what), column)) for column in (tensors, owners))
            if theirs != own:
                there, here = next((t, w) for t, w in zip(theirs, own, strict=True) if t != w)
                raise ValueError(
                    f"SAM: {name} hold a tensor of {what} {there} for a weight of {what} {here}; after a model changed its "
                    "dtype or device, opt.load_state_dict(opt.state_dict()) converts the state"
                )
        if list(map(Tensor.stride, tensors)) != list(map(Tensor.stride, owners)):
            return f"{name} of another memory format than their weights"
    for p in known:
        step, there = state[p].get("step"), (torch.float32, p.device)
        if not isinstance(step, Tensor) or step.numel() != 1 or (not p.is_cpu and (step.dtype, step.device) != there):
            return "step counts that are not a float32 on the weights' device"
    return None


class FusedRestore:
    """Steps torch.optim.AdamW from the stash of a perturbation; state, hooks and formulas stay AdamW's own.

    Codes are gone once w + e is. So all buckets of codes are stepped in one call, and that after all others.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], tuple[tuple[object, ...], list[plan.Bucket]]] = {}
        self._warned: set[str] = set()

    def serves(self, bases: Sequence[Optimizer], perturbation: Perturbation) -> bool:
        """Whether the coming step can be made in one pass; says, once for each reason, why it is restore and step instead.

        What `check_fused_restore` has seen may have changed since: states are loaded, groups added, models converted.

        Raises:
            ValueError: gradients or moments have a dtype, shape or device that AdamW cannot step with.
        """
        coded = _coded(perturbation.written())
        if any(codes.origins is not None or codes.waits is not None for codes in map(attrgetter("bucket.codes"), coded)):
            return False  # an interrupt came while w was put back
        why_not = self._refusal(bases) or _refuses_codes(bases, coded)
        if why_not is not None and why_not not in self._warned:
            self._warned.add(why_not)
            warnings.warn(
                f"SAM: fused_restore=True cannot serve {why_not}; w is restored first, and AdamW makes its own step: the "
                "same, in more passes over memory",
                stacklevel=5,  # who calls step()
            )
        return why_not is None

    def _refusal(self, bases: Sequence[Optimizer]) -> str | None:
        for base in bases:
            for group in base.param_groups:
                why_not = _refuses_options(group) or _refuses_tensors(group, base.state)
                if why_not is not None:
                    return why_not
        return None

    def step(
        self, bases: Sequence[Optimizer], perturbation: Perturbation, scale: Tensor | None, found_inf: Tensor | None
    ) -> int | Tensor:
        """Writes every weight: stepped where it has a gradient, restored where it has none or a gradient is not finite.

        Args:
            bases: AdamW optimizers that are served.
            perturbation: whose weights are w + e.
            scale, found_inf: as GradScaler hands them over. Gradients are divided by the scale on their way and stay scaled.

        Returns:
            How many steps were skipped.
        """
        with perturbation.settled() as perturbed:
            if found_inf is not None and found_inf.is_cpu and bool(found_inf):
                for b in perturbed:
                    perturbation.put_back(b)
                return 1
            self._step(bases, perturbation, perturbed, (scale, found_inf))
        return 0 if found_inf is None or found_inf.is_cpu else found_inf.sum()

    def _step(
        self, bases: Sequence[Any], perturbation: Perturbation, perturbed: list[ParameterBucket], flags: Flags
    ) -> None:
        copied = {
            id(w): s for b in perturbed if b.bucket.codes is None for w, s in zip(b.params, b.bucket.stash, strict=True)
        }
        weights = {id(w): w for b in perturbed for w in b.params}
        coded = _coded(perturbed)
        parts: list[plan.AdamWPart] = []
        counts: list[Tensor] = []
        for number, base in enumerate(bases):
            if _hooks(base, _global_optimizer_pre_hooks, base._optimizer_step_pre_hooks):
                why_not = self._refusal([base])
                if why_not is not None:
                    raise RuntimeError(f"SAM: a hook before the step has left AdamW with {why_not}")
                if (coded or parts) and not perturbation.check_weights():
                    raise RuntimeError("SAM: a hook before the step has moved weights of which w is told from w + e")
            for index, group in enumerate(base.param_groups):
                counts += self._step_group((number, index), base, group, copied, coded, parts, flags)
        for b in coded:  # those without a second gradient
            perturbation.put_back(b)
        if copied:
            ops.sam_restore_([weights[key] for key in copied], list(copied.values()))
        if parts:
            self._step_coded(perturbation, parts)
        found_inf = flags[1]
        if found_inf is not None and not found_inf.is_cpu and counts:
            torch._foreach_sub_(counts, [found_inf.to(count.device) for count in counts])
        for base in bases:
            _hooks(base, _global_optimizer_post_hooks, base._optimizer_step_post_hooks)
            base._opt_called = True  # a scheduler asks whether its optimizer has stepped

    def _step_group(
        self,
        where: tuple[int, int],
        base: Any,
        group: dict[str, Any],
        copied: dict[int, Tensor],
        coded: list[ParameterBucket],
        parts: list[plan.AdamWPart],
        flags: Flags,
    ) -> list[Tensor]:
        """Steps the tensors of a group that codes do not keep; takes its buckets of codes from `coded` and adds a part for
        each. Returns the step counts."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        first: list[Tensor] = []
        second: list[Tensor] = []
        steps: list[Tensor] = []
        base._init_group(group, params, grads, first, second, [], steps)  # makes state as AdamW would
        if not params:
            return []
        torch._foreach_add_(steps, 1)
        betas = (float(group["betas"][0]), float(group["betas"][1]))
        how = (float(group["lr"]), betas, group["eps"], group["weight_decay"], group["maximize"])
        rows = {id(p): row for row, p in enumerate(params)}
        for b in [b for b in coded if any(id(p) in rows for p in b.params)]:
            coded.remove(b)
            parts.append(_part(b, [rows.pop(id(p), None) for p in b.params], grads, first, second, steps, how, flags))
        chosen = list(rows.values())
        if chosen:
            columns = [[column[row] for row in chosen] for column in (params, grads, first, second)]
            kept = [copied.pop(id(p), p) for p in columns[0]]
            for bucket in self._bucketed(where, *columns[:2], kept, *columns[2:]):
                counts = [steps[chosen[i]] for i in bucket.streams]
                ops.run("sam_restore_adamw_", bucket, counts, *how, *_on(bucket, flags))
                bucket.release_gradients()
            ops.mark_modified([t for column in (columns[0], *columns[2:]) for t in column])
        return steps

    def _step_coded(self, perturbation: Perturbation, parts: list[plan.AdamWPart]) -> None:
        buckets = [part.bucket for part in parts]
        try:
            perturbation.settles_with(buckets[-1])
            ops.run("sam_decode_adamw_", buckets[0], parts)
            ops.mark_modified([t for b in buckets for column in (b.weights, b.first, b.second) for t in column])
        finally:
            for b in buckets:
                b.release_gradients()
                b.release_moments()

    def _bucketed(self, where: tuple[int, int], *columns: list[Tensor]) -> list[plan.Bucket]:
        params, grads, kept, first, second = columns
        ids = (id(t) for column in (params, kept, first, second) for t in column)
        key = (*ids, *map(attrgetter("dtype", "shape", "device"), params), *map(Tensor.stride, params))
        known, buckets = self._buckets.get(where, ((), []))
        if key != known:
            names = ("parameters", "gradients", "stash", "exp_avg", "exp_avg_sq")
            ops.check_lists("SAM", dict(zip(names, columns, strict=True)), written=("parameters", "exp_avg", "exp_avg_sq"))
            buckets = ops.make_buckets(weights=params, grads=grads, stash=kept, first=first, second=second)
            self._buckets[where] = (key, buckets)
        for b in buckets:  # new lists: moments may have been given other memory, and are pointed at anew
            b.grads, b.first, b.second = ([column[i] for i in b.streams] for column in (grads, first, second))
        return buckets


def _hooks(base: Optimizer, everywhere: dict[int, Any], own: dict[int, Any]) -> bool:
    hooks = (*everywhere.values(), *own.values())
    for hook in hooks:
        hook(base, (), {})
    return bool(hooks)


def _coded(perturbed: Sequence[ParameterBucket]) -> list[ParameterBucket]:
    return [b for b in perturbed if b.bucket.codes is not None]


def _on(bucket: plan.Bucket, flags: Flags) -> list[Tensor | None]:
    return [None if t is None else t.to(bucket.device) for t in flags]


def _part(
    b: ParameterBucket,
    rows: Sequence[int | None],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    steps: list[Tensor],
    how: tuple[float, tuple[float, float], float, float, bool],
    flags: Flags,
) -> plan.AdamWPart:
    """A bucket with its columns filled from these rows; None: a tensor without a second gradient, where anything will do."""

    def column(tensors: list[Tensor]) -> list[Tensor]:
        return [w if row is None else tensors[row] for w, row in zip(b.bucket.weights, rows, strict=True)]

    found = list(map(Tensor.resolve_neg, column(grads)))
    if not b.point(found):
        b.bucket.unfollow()
        b.bucket.grads = found
    b.bucket.first, b.bucket.second = column(first), column(second)
    counts = [None if row is None else steps[row] for row in rows]
    return plan.AdamWPart(b.bucket, counts, *how, *_on(b.bucket, flags))


def _refuses_codes(bases: Sequence[Optimizer], coded: Sequence[ParameterBucket]) -> str | None:
    """Why buckets of codes cannot all be stepped in one call."""
    if not coded:
        return None
    if not ops.served_alike(("sam_decode_", "sam_decode_adamw_"), [b.bucket for b in coded]):
        return "weights of stash='ulp' that no one backend decodes and steps"
    groups = [group for base in bases for group in base.param_groups]
    owner = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
    if any(len({owner.get(id(p)) for p in b.params}) > 1 for b in coded):
        return "parameters of stash='ulp' that have gone from group to group"
    return None
