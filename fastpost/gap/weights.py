"""Copies of a model's weights that can be put back bit for bit, and how far the weights have gone from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpost import distributed, plan
from fastpost.ops import params as ops


class _Held(NamedTuple):
    """A weight that is copied, what this rank holds of it, the copy, and all names that the model has for it."""

    weight: Tensor
    part: Tensor
    copy: Tensor
    names: tuple[str, ...]


class Snapshot:
    """One copy of a list of weights, in one buffer per (device, dtype), taken when constructed.

    Args:
        weights: dense floating-point tensors, each memory once; devices and dtypes may mix. Of a sharded one (DTensor) this
            rank's part counts.
        model: holds them as parameters. `follow` then finds what has taken their place in it.

    Raises:
        TypeError, ValueError: as `fastpost.ops.params.check_lists`.
    """

    def __init__(self, weights: Sequence[Tensor], model: nn.Module | None = None) -> None:
        tensors = [_part(p) for p in weights]
        ops.check_lists("GAP", {"weights": tensors}, written=("weights",))
        whole = {id(part): p for part, p in zip(tensors, weights, strict=True)}
        names = {} if model is None else _names_of(model)
        self._model = model
        self._held: list[_Held] = []
        self._buffers: list[Tensor] = []  # held beside their views, so that spans know the padding to be theirs
        for bucket in ops.make_buckets(weights=tensors):
            buffer, views = plan.flat_like(bucket.weights)
            for part, copy in zip(bucket.weights, views, strict=True):
                p = whole[id(part)]
                self._held.append(_Held(p, part, copy, names.get(id(p), ())))
            self._buffers.append(buffer)
        self.save()

    @property
    def weights(self) -> list[Tensor]:
        """What is copied, restored and measured: as given, or as `follow` has found it."""
        return [held.weight for held in self._held]

    @property
    def _tensors(self) -> list[Tensor]:
        return [held.part for held in self._held]

    @property
    def _copies(self) -> list[Tensor]:
        return [held.copy for held in self._held]

    @torch.no_grad()
    def save(self) -> None:
        """Takes the tensors' present bits."""
        ops.sam_restore_(self._copies, self._tensors)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the saved bits back, into the same storage or into that of the parameters which the model has instead now.

        Raises:
            ValueError: as `follow`; nothing is written.
        """
        self.follow()
        ops.sam_restore_(self._tensors, self._copies)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def follow(self) -> None:
        """Turns to the parameters that the model has now under the names of those that were copied.

        They are others after `load_state_dict(assign=True)` and the like. A weight that was tied and is so no more has its
        copy under each of its names. One that has another name now, as under an adapter, is found if it is the same tensor.

        Raises:
            ValueError: a weight has changed its dtype, shape, device or sharding since it was copied, or the model has none
                in its place. Nothing is changed.
        """
        here = {} if self._model is None else dict(self._model.named_parameters(remove_duplicate=False))
        if all(here.get(name) is held.weight for held in self._held for name in held.names):  # as nearly always
            for held in self._held:
                _check_like(held.weight, held)
            self._held = [held._replace(part=_part(held.weight)) for held in self._held]
            return
        known = {id(p) for p in here.values()}
        found: dict[int, _Held] = {}
        for held in self._held:
            places: dict[int, tuple[Tensor, list[str]]] = {}  # the parameters that have its names now
            for name in held.names:
                if name in here:
                    places.setdefault(memory(here[name]), (here[name], []))[1].append(name)
            if id(held.weight) in known or not held.names:
                places.setdefault(memory(held.weight), (held.weight, []))
            if not places:
                raise ValueError(
                    f"GAP: the model has no parameter {held.names[0]!r} any more, of which there is a copy; give the model "
                    "the parameters back that it had, and call this again"
                )
            lost = [name for name in held.names if name not in here]
            for number, (where, (now, names)) in enumerate(places.items()):
                _check_like(now, held)
                names = names if number else names + lost
                if where in found:  # tied again
                    found[where] = found[where]._replace(names=(*found[where].names, *names))
                else:  # `save` writes into each copy
                    found[where] = _Held(now, _part(now), held.copy.clone() if number else held.copy, tuple(names))
        ops.check_lists("GAP", {"weights": [new.part for new in found.values()]}, written=("weights",))
        self._held = list(found.values())

    def by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """The copies by the names that their tensors have in a model; those that it does not hold are left out.

        Raises:
            ValueError: as `follow`.
        """
        self.follow()
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(held.weight)]: held.copy for held in self._held if id(held.weight) in names}

    @torch.no_grad()
    def squared_distance(self) -> Tensor:
        """Sum of (now - saved)^2 over all tensors: float64, on the first one's device."""
        return ops.squared_distance(self._tensors, self._copies)

    @torch.no_grad()
    def distances(self, model: nn.Module, group_of: Callable[[str], str]) -> dict[str, float]:
        """The same of each group of a model's tensors; `group_of` says a tensor's group by the tensor's name."""
        names = {id(p): name for name, p in model.named_parameters()}
        groups: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for held in self._held:
            if id(held.weight) in names:
                group = groups.setdefault(group_of(names[id(held.weight)]), ([], []))
                group[0].append(held.part)
                group[1].append(held.copy)
        squares = [ops.squared_distance(*group) for group in groups.values()]  # all queued before the first is waited for
        return {name: float(square.sqrt()) for name, square in zip(groups, squares, strict=True)}

    @torch.no_grad()
    def moved(self, gradients: Mapping[int, Tensor]) -> Tensor:
        """Of the elements with a nonzero gradient, how many have a stored value that is not the saved one, and how many
        there are: (2,), int64; on the tensors' device, or on the CPU where they have several.

        Elements without a gradient say nothing about rounding: Adam leaves them where they are in any precision.

        Args:
            gradients: by the ids of the tensors.
        """
        counts: list[tuple[Tensor, Tensor]] = []
        for now, then in zip(self._tensors, self._copies, strict=True):
            if (g := gradients.get(id(now))) is not None:
                for a, b, c in zip(_pieces(now), _pieces(then), _pieces(g), strict=True):
                    pushed = c != 0
                    counts.append((_count((a != b) & pushed), _count(pushed)))
        if not counts:
            return torch.zeros(2, dtype=torch.int64)
        several = len({moved.device for moved, _ in counts}) > 1
        return torch.stack([n.cpu() if several else n for pair in counts for n in pair]).view(-1, 2).sum(0)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, whole or not at all; its folder is made.

    Raises:
        ModuleNotFoundError: safetensors is not installed. OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=metadata)
        new.replace(path)
    except SafetensorError as error:  # a disk that is full
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        new.unlink(missing_ok=True)


def _part(p: Tensor) -> Tensor:
    """What this rank holds of a weight, as memory; of a plain one the weight itself."""
    return distributed.local(p).detach() if distributed.is_sharded(p) else p


def memory(p: Tensor) -> int:
    """The same for parameters that share their memory: as those of tied layers do once each has been assigned its own."""
    part = _part(p)
    return part.data_ptr() or id(p)


def _names_of(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each parameter, by its id."""
    found: dict[int, tuple[str, ...]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        found[id(p)] = (*found.get(id(p), ()), name)
    return found


def _check_like(now: Tensor, held: _Held) -> None:
    """Raises ValueError unless the saved bits can be written to this rank's part of `now`."""
    if distributed.is_sharded(now) != distributed.is_sharded(held.weight):
        then, since = ("whole", "sharded") if distributed.is_sharded(now) else ("sharded", "whole")
        raise ValueError(
            f"GAP: a weight was {then} when copied and is {since} now, so that its bits cannot be put back; call this while "
            f"it is {then}"
        )
    part, copy = _part(now), held.copy
    if (part.dtype, part.shape, part.device) != (copy.dtype, copy.shape, copy.device):
        raise ValueError(
            f"GAP: a weight was {copy.dtype} of shape {tuple(copy.shape)} on {copy.device} when copied and is "
            f"{part.dtype} of shape {tuple(part.shape)} on {part.device} now, so that its bits cannot be put back; "
            "convert the model back (model.to(...)) and call this again"
        )


def _count(mask: Tensor) -> Tensor:
    """How many are True; elsewhere than on a CPU `count_nonzero` compares once more before it adds."""
    return mask.count_nonzero() if mask.device.type == "cpu" else mask.sum()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor in pieces: on a CPU such as fit a cache, so that a difference need not travel to memory and back; elsewhere
    large ones, so that there are few launches."""
    size = 1 << 18 if tensor.device.type == "cpu" else 1 << 24
    return torch.split(tensor.reshape(-1), size)
