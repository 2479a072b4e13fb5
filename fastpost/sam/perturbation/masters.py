"""float32 masters of 16-bit weights: the base optimizer steps them, the model computes with their casts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastpost.distributed import is_sharded
from fastpost.ops import params as ops
from fastpost.sam.buckets import Change, ParameterBucket, ShardReducer
from fastpost.sam.perturbation.stored import Perturbation, PerturbParams
from fastpost.sam.step import PerturbationSums

SERVED = (torch.bfloat16, torch.float16)  # dtypes of parameters that have masters


class MasterPerturbation(Perturbation):
    """w = cast(m + e), and back to cast(m): nothing is stashed.

    Like every rounding to 16 bits it keeps little of e where e is small against the weights' last place; m + e is formed in
    float32, so that what is kept is right on average.

    Args:
        params: the model's parameters: tensors, named tensors or groups, as for any optimizer.
        masters: one float32 tensor per parameter, in the same order.

    Raises:
        TypeError, ValueError: counts, shapes, dtypes or devices do not fit, or a weight is not the cast of its master.
    """

    def __init__(self, reducer: ShardReducer, params: Any, masters: Iterable[Tensor]) -> None:
        super().__init__(reducer, None)
        self._given = list(params)
        self._masters = list(masters)
        self._weights = [p for group in self._given_groups() for p in group["params"]]
        if any(map(is_sharded, self._weights)):
            raise TypeError(
                "SAM: master_params do not serve sharded parameters (DTensor); keep float32 shards and let FSDP2 cast them: "
                "fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))"
            )
        if len(self._weights) != len(self._masters):
            raise ValueError(f"SAM: {len(self._weights)} parameters but {len(self._masters)} master_params")
        for i, (w, m) in enumerate(self._pairs()):
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
        self._behind = False  # whether masters may have been stepped and their weights not
        self._index()
        self._refuse_other_casts()

    def _index(self) -> None:
        self._weight_of = {id(m): w for w, m in self._pairs()}
        self._master_of = {id(w): m for w, m in self._pairs()}
        self._written: list[tuple[int, int]] | None = None  # what `_note` has noted of the weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index()  # copies have other weights and masters

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._weights, self._masters, strict=True)

    def _given_groups(self) -> list[dict[str, Any]]:
        """The parameters given, as groups of plain tensors."""
        groups = self._given if self._given and isinstance(self._given[0], dict) else [{"params": self._given}]
        result = []
        for group in groups:
            given = group["params"]
            entries = [given] if isinstance(given, Tensor) else list(given)
            named = [entry if isinstance(entry, tuple) else (None, entry) for entry in entries]
            result.append({**group, "params": [p for _, p in named], "param_names": [name for name, _ in named]})
        return result

    # -- the base optimizer, which holds the masters ----------------------------------------------------------------------

    def for_base(self) -> list[dict[str, Any]]:
        """The groups for the base optimizer's class: masters, by the names of their parameters where there are any."""
        groups = []
        for group in self._given_groups():
            names = group.pop("param_names")
            masters = [self._master_of[id(p)] for p in group["params"]]
            groups.append({**group, "params": masters if None in names else list(zip(names, masters, strict=True))})
        return groups

    def belong_to(self, bases: Sequence[Optimizer]) -> None:
        """Raises ValueError unless these optimizers step the masters and nothing else."""
        theirs = {id(p) for base in bases for group in base.param_groups for p in group["params"]}
        if theirs != set(self._weight_of):
            raise ValueError("SAM: with master_params the base optimizer has to be built from the masters, all of them")

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if any(id(m) not in self._weight_of for group in groups for m in group["params"]):
            raise ValueError(
                "SAM: the base optimizer holds a parameter that is none of master_params, so no weight is known for it; "
                "build SAM anew with the masters of all parameters"
            )
        return [{**group, "params": [self._weight_of[id(m)] for m in group["params"]]} for group in groups]

    def take_gradients(self, scaled: bool) -> None:
        if scaled:
            raise RuntimeError("SAM: GradScaler finds no gradients on master_params; bfloat16 needs no loss scaling")
        self._refuse_other_casts(misfits=False)
        for w, m in self._pairs():
            m.grad = None if w.grad is None else w.grad.to(m.dtype)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """After the step the weights become the casts of their masters; one that is interrupted leaves that to `undo`."""
        self._behind = True
        yield
        self._cast()
        for m in self._masters:
            m.grad = None

    def state_loaded(self) -> None:
        self._written = None  # the masters may have been loaded: the next check looks

    # -- pairs ------------------------------------------------------------------------------------------------------------

    def _misfit(self, w: Tensor) -> str | None:
        """What keeps a weight and its master from being a pair, in words; None where they are one."""
        m = self._master_of[id(w)]
        if m.dtype != torch.float32 or w.dtype not in SERVED:
            return f"a master has dtype {m.dtype} and its parameter {w.dtype}; masters are float32, parameters 16 bits wide"
        if m.shape != w.shape or m.device != w.device:
            return f"a master is of shape {tuple(m.shape)} on {m.device}, its parameter {tuple(w.shape)} on {w.device}"
        return None

    def _refuse_misfit(self, w: Tensor) -> None:
        why = self._misfit(w)
        if why is not None:
            raise ValueError(f"SAM: {why}. Build SAM anew for a model of another dtype or shape")

    def _refuse_other_casts(self, misfits: bool = True) -> None:
        """Raises ValueError where a weight is not, bit for bit, the cast of its master.

        Looks, which waits for the device, only if weights were written or moved by somebody else since `_note`.

        Args:
            misfits: refuse weights that have become of another dtype or shape, too; False: pass over them.
        """
        if self._written == self._state_of_weights():
            return
        for i, (w, m) in enumerate(self._pairs()):
            if misfits:
                self._refuse_misfit(w)
            elif self._misfit(w):
                continue
            if not torch.equal(w.detach().view(torch.int16), m.detach().to(w.dtype).view(torch.int16)):
                raise ValueError(
                    f"SAM: parameter {i} is not the cast of master_params[{i}]; restoring would change it. Copy one into "
                    "the other before building SAM and after loading or changing the model's weights"
                )
        self._note()

    def _state_of_weights(self) -> list[tuple[int, int]]:
        return [(w._version, w.data_ptr()) for w in self._weights]

    def _note(self) -> None:
        """The weights are the casts of their masters now, by this optimizer's own writing, unless there are misfits."""
        self._written = None if any(map(self._misfit, self._weights)) else self._state_of_weights()

    @ops.without_grad
    def _cast(self) -> None:
        """The weights become the casts of their masters."""
        for w, m in self._pairs():
            w.copy_(m)
        self._behind = False
        self._note()

    # -- there and back ---------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        return self._behind or super().active

    def apply(
        self, buckets: Sequence[ParameterBucket], settings: Sequence[PerturbParams], squared: Tensor
    ) -> PerturbationSums:
        self._refuse_other_casts()
        for p in (p for b in buckets for p in b.params):
            self._refuse_misfit(p)
        return super().apply(buckets, settings, squared)

    def _prepare(self, b: ParameterBucket, setting: PerturbParams, squared: Tensor) -> Iterable[Any]:
        self._point(b)
        return ("sam_perturb_masters_", squared, *setting)

    def undo(self, convert: bool = False) -> None:
        super().undo(convert)
        if self._behind:
            self._cast()

    def writes(self, b: ParameterBucket) -> bool:
        return True  # a cast of the masters is w, whether or not w + e has been written

    def origins(self, b: ParameterBucket, changed: dict[int, Change]) -> Sequence[Tensor | None]:
        return [self._master_of[id(p)].detach().to(b.layout.dtype) for p in b.params]

    def put_back(self, b: ParameterBucket) -> None:
        if any(self._misfit(p) for p in b.params):
            self._cast()
            return
        self._point(b)
        ops.run("sam_cast_", b.bucket)
        ops.mark_modified(b.bucket.weights)

    def _close(self) -> None:
        super()._close()
        self._note()

    def _point(self, b: ParameterBucket) -> None:
        """The column of origins: here they lie in float32, and are never written. Masters may have been moved."""
        b.bucket.stash = [self._master_of[id(p)].detach() for p in b.params]
        pairs = zip(b.bucket.weights, b.bucket.stash, strict=True)
        b.bucket.walkable = b.walkable and all(w.stride() == m.stride() for w, m in pairs)
