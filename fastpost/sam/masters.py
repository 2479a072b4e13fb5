"""float32 masters of 16-bit weights: the base optimizer steps them, the model computes with their casts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastpost.distributed import is_sharded

SERVED = (torch.bfloat16, torch.float16)  # dtypes of parameters that have masters


class Masters:
    """Pairs of a model's 16-bit parameters and their float32 masters.

    Args:
        params: the model's parameters: tensors, named tensors or groups, as for any optimizer.
        masters: one float32 tensor per parameter, in the same order.

    Raises:
        TypeError, ValueError: counts, shapes, dtypes or devices do not fit, or a weight is not the cast of its master.
    """

    def __init__(self, params: Any, masters: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._masters = list(masters)
        self.weights = [p for group in self._groups() for p in group["params"]]
        if any(map(is_sharded, self.weights)):
            raise TypeError(
                "SAM: master_params do not serve sharded parameters (DTensor); keep float32 shards and let FSDP2 cast them: "
                "fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))"
            )
        if len(self.weights) != len(self._masters):
            raise ValueError(f"SAM: {len(self.weights)} parameters but {len(self._masters)} master_params")
        for i, (w, m) in enumerate(zip(self.weights, self._masters, strict=True)):
            if m.dtype != torch.float32 or w.dtype not in SERVED:
                raise TypeError(
                    f"SAM: master_params[{i}] has dtype {m.dtype} and its parameter {w.dtype}; masters are float32, their "
                    "parameters bfloat16 or float16"
                )
            if "meta" in (m.device.type, w.device.type):
                raise ValueError(
                    f"SAM: master_params[{i}] or its parameter is a meta tensor, which has a shape and no values; give both "
                    "their values first (to_empty() and load_state_dict())"
                )
            if m.shape != w.shape or m.stride() != w.stride() or m.device != w.device:
                raise ValueError(f"SAM: master_params[{i}] and its parameter differ in shape, layout or device")
        self._weight_of = {id(m): w for w, m in zip(self.weights, self._masters, strict=True)}
        self.master_of = {id(w): m for w, m in zip(self.weights, self._masters, strict=True)}
        self.behind = False  # whether masters may have been stepped and their weights not
        self._written: list[tuple[int, int]] | None = None  # what `note` has noted of the weights
        self.check()

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters given, as groups of plain tensors."""
        groups = self._params if self._params and isinstance(self._params[0], dict) else [{"params": self._params}]
        result = []
        for group in groups:
            given = group["params"]
            entries = [given] if isinstance(given, Tensor) else list(given)
            named = [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]
            result.append({**group, "params": [p for _, p in named], "param_names": [name for name, _ in named]})
        return result

    def for_base(self) -> list[dict[str, Any]]:
        """The groups for the base optimizer's class: masters, by the names of their parameters where there are any."""
        groups = []
        for group in self._groups():
            names = group.pop("param_names")
            masters = [self.master_of[id(p)] for p in group["params"]]
            groups.append({**group, "params": masters if None in names else list(zip(names, masters, strict=True))})
        return groups

    def belong_to(self, bases: Sequence[Optimizer]) -> None:
        """Raises ValueError unless these optimizers step the masters and nothing else."""
        theirs = {id(p) for base in bases for group in base.param_groups for p in group["params"]}
        if theirs != set(self._weight_of):
            raise ValueError("SAM: with master_params the base optimizer has to be built from the masters, all of them")

    def groups_of_weights(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups with the model's parameters in the place of their masters.

        Raises:
            ValueError: a group holds a tensor that is no master.
        """
        if any(id(m) not in self._weight_of for group in groups for m in group["params"]):
            raise ValueError(
                "SAM: the base optimizer holds a parameter that is none of master_params, so no weight is known for it; "
                "build SAM anew with the master of every parameter"
            )
        return [{**group, "params": [self._weight_of[id(m)] for m in group["params"]]} for group in groups]

    def misfit(self, w: Tensor) -> str | None:
        """What keeps a weight and its master from being a pair, in words; None where they are one."""
        m = self.master_of[id(w)]
        if m.dtype != torch.float32 or w.dtype not in SERVED:
            return f"a master has dtype {m.dtype} and its parameter {w.dtype}; masters are float32, parameters 16 bits wide"
        if m.shape != w.shape or m.device != w.device:
            return f"a master is of shape {tuple(m.shape)} on {m.device}, its parameter {tuple(w.shape)} on {w.device}"
        return None

    def refuse_misfit(self, w: Tensor) -> None:
        """Raises ValueError where a weight and its master are no pair any more."""
        why = self.misfit(w)
        if why is not None:
            raise ValueError(f"SAM: {why}. Build SAM anew for a model of another dtype or shape")

    def check(self, misfits: bool = True) -> None:
        """Raises ValueError where a weight is not, bit for bit, the cast of its master.

        Looks, which waits for the device, only if weights were written or moved by somebody else since `note`.

        Args:
            misfits: refuse weights that have become of another dtype or shape, too; False: pass over them.
        """
        if self._written == self._state_of_weights():
            return
        for i, (w, m) in enumerate(zip(self.weights, self._masters, strict=True)):
            if misfits:
                self.refuse_misfit(w)
            elif self.misfit(w):
                continue
            if not torch.equal(w.detach().view(torch.int16), m.detach().to(w.dtype).view(torch.int16)):
                raise ValueError(
                    f"SAM: parameter {i} is not the cast of master_params[{i}]; restoring would change it. Copy one into "
                    "the other before building SAM and after loading or changing the model's weights"
                )
        self.note()

    def _state_of_weights(self) -> list[tuple[int, int]]:
        return [(w._version, w.data_ptr()) for w in self.weights]

    def note(self) -> None:
        """The weights are the casts of their masters now, by this optimizer's own writing, unless there are misfits."""
        self._written = None if any(map(self.misfit, self.weights)) else self._state_of_weights()

    def forget(self) -> None:
        """The masters may have been loaded: the next `check` looks."""
        self._written = None

    def take_gradients(self) -> None:
        """The masters get the weights' gradients, in float32."""
        for w, m in zip(self.weights, self._masters, strict=True):
            m.grad = None if w.grad is None else w.grad.to(m.dtype)

    @contextlib.contextmanager
    def stepped(self) -> Iterator[None]:
        """Around the base optimizer's step, after which the weights become the casts of their masters.

        A step that is interrupted leaves `behind`, and `cast` makes up for it.
        """
        self.behind = True
        yield
        self.cast()
        for m in self._masters:
            m.grad = None

    @torch.no_grad()
    def cast(self) -> None:
        """The weights become the casts of their masters."""
        for w, m in zip(self.weights, self._masters, strict=True):
            w.copy_(m)
        self.behind = False
        self.note()

    def zero_grad(self, set_to_none: bool) -> None:
        for w in self.weights:
            if set_to_none:
                w.grad = None
            elif w.grad is not None:
                w.grad.zero_()
