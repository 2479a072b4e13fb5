"""The optimizers that SAM wraps: built from a class, taken as they are, or several as one."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def build_bases(params: Any, base_optimizer: Any, kwargs: dict[str, Any]) -> list[Optimizer]:
    if isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer):
        if params is None:
            raise TypeError("SAM: params are needed to build the base optimizer from its class")
        return [base_optimizer(params, **kwargs)]
    bases = list(base_optimizer) if isinstance(base_optimizer, (list, tuple)) else [base_optimizer]
    if not bases or not all(isinstance(base, Optimizer) for base in bases):
        raise TypeError(
            f"SAM: base_optimizer must be an optimizer class, an instance or a list of instances, not {base_optimizer!r}"
        )
    if any(getattr(base, "is_perturbed", None) is not None for base in bases):
        raise TypeError("SAM: base_optimizer is a SAM itself")
    if kwargs:
        raise TypeError(f"SAM: {', '.join(kwargs)} would configure a base optimizer that is built already")
    if params is not None:
        raise TypeError("SAM: pass None for params when base_optimizer is an instance; it has its own")
    return bases


class MergedState(MutableMapping[Tensor, Any]):
    """The states of several base optimizers as one mapping; each entry lives in its owner's."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self._bases = bases
        self._owner = {id(p): base for base in bases for group in base.param_groups for p in group["params"]}

    def __getitem__(self, p: Tensor) -> Any:
        return self._owner[id(p)].state[p]

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._owner[id(p)].state[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._owner[id(p)].state[p]

    def __iter__(self) -> Iterator[Tensor]:
        return (p for base in self._bases for p in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)
