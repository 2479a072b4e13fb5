"""The optimizers that SAM wraps: built from a class, taken as they are, or several as one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastpost.distributed import local

if TYPE_CHECKING:
    from fastpost.sam.masters import Masters

RADIUS_KEYS = ("rho", "adaptive", "eta")  # what SAM keeps in each group


def build_bases(params: Any, base_optimizer: Any, kwargs: dict[str, Any], masters: Masters | None = None) -> list[Optimizer]:
    """The wrapped optimizers.

    Raises:
        TypeError, ValueError: what was given is no optimizer, does not fit together, or cannot be wrapped.
    """
    if isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer):
        if params is None:
            raise TypeError("SAM: params are needed to build the base optimizer from its class")
        _check_servable([], base_optimizer)
        base = base_optimizer(params if masters is None else masters.for_base(), **kwargs)
        _check_servable([base], base_optimizer)
        return [base]
    bases = list(base_optimizer) if isinstance(base_optimizer, (list, tuple)) else [base_optimizer]
    if not bases or not all(isinstance(base, Optimizer) for base in bases):
        raise TypeError(
            f"SAM: base_optimizer must be an optimizer class, an instance or a list of instances, not {base_optimizer!r}"
        )
    if any(getattr(base, "is_perturbed", None) is not None for base in bases):
        raise TypeError("SAM: base_optimizer is a SAM itself; pass the optimizer that it wraps")
    if kwargs:
        raise TypeError(f"SAM: {', '.join(kwargs)} would configure a base optimizer that is built already")
    if masters is not None:
        masters.belong_to(bases)
    elif params is not None:
        raise TypeError("SAM: pass None for params when base_optimizer is an instance; it has its own")
    for base in bases:
        _check_servable([base], type(base))
    return bases


def _check_servable(bases: list[Optimizer], cls: type[Optimizer]) -> None:
    """Refuses what SAM cannot wrap, saying what to use instead."""
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"SAM: {cls.__name__} needs a closure for its own search, and SAM's two passes leave it none. Use an optimizer "
            "whose step() goes without one, such as SGD or AdamW"
        )
    if cls.__name__ == "ZeroRedundancyOptimizer" or cls.__module__.split(".")[0] == "deepspeed":
        raise TypeError(
            f"SAM: {cls.__name__} (ZeRO) keeps gradients or steps where SAM cannot reach them; shard with FSDP2 "
            "(fully_shard), or use DDP"
        )
    for base in bases:
        own = [key for key in RADIUS_KEYS if key in base.defaults]
        if own:
            raise TypeError(
                f"SAM: {cls.__name__} has an option {own[0]!r} of its own, which would be taken for SAM's in its "
                "groups; use another base optimizer, such as SGD or AdamW"
            )
        for p in (p for group in base.param_groups for p in group["params"]):
            if getattr(p, "_fsdp_flattened", False):
                raise TypeError("SAM: FSDP1 keeps parameters in flat buffers of its own; use FSDP2 (fully_shard) instead")
            if hasattr(p, "ds_id"):
                raise TypeError("SAM: DeepSpeed's ZeRO has partitioned these parameters; use FSDP2 (fully_shard) instead")


class MergedState(MutableMapping[Tensor, Any]):
    """The states of several base optimizers as one mapping; each entry lives in its owner's."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self._bases = bases
        self._owner = {id(p): base for base in bases for group in base.param_groups for p in group["params"]}

    def __getitem__(self, p: Tensor) -> Any:
        return self._owner[id(p)].state[p]

    def __contains__(self, p: object) -> bool:
        return id(p) in self._owner and p in self._owner[id(p)].state  # without making an entry, as reading would

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._owner[id(p)].state[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._owner[id(p)].state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for base in self._bases for p in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)


def step_bases(bases: Sequence[Optimizer], scale: Tensor | None, found_inf: Tensor | None) -> int | Tensor:
    """Lets every base optimizer step, unless a gradient is not finite; returns how many steps were skipped.

    Args:
        bases: the wrapped optimizers.
        scale: GradScaler's factor, still on the gradients; None where there is none or it has come off.
        found_inf: 0 or 1, float32; None where nobody has looked. Base optimizers that take it decide on the device; for
            others it is read here.
    """
    if found_inf is None:
        for base in bases:
            base.step()
        return 0
    takes_it = all(getattr(base, "_step_supports_amp_scaling", False) for base in bases)
    if found_inf.device.type != "cpu" and takes_it:
        for base in bases:
            base.grad_scale, base.found_inf = scale, found_inf  # type: ignore[attr-defined]
            try:
                base.step()
            finally:
                del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
        return found_inf.sum()
    if found_inf.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "SAM: in a CUDA graph nobody can read whether a gradient overflowed; use a base optimizer that decides on the "
            "device, such as AdamW(fused=True, capturable=True)"
        )
    if bool(found_inf):
        return 1
    for base in bases:
        if scale is not None:
            grads = [local(p.grad) for group in base.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(grads, scale)
        base.step()
    return 0
