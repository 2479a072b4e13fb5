"""Sums and verdicts over the ranks that hold other parts of the parameters: those of DTensor's meshes, and those that a
caller names, as where pipeline stages or experts are plain tensors.

Nothing here knows a method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.distributed import active, is_a, is_sharded, part_number

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Members = tuple[int, ...]  # the global ranks of a process group
Sharing = tuple[Members, ...]  # the groups over which a parameter is cut, outermost first

Group: TypeAlias = "dist.ProcessGroup | DeviceMesh"
GroupOf: TypeAlias = "Callable[[str | None, Tensor], Group | Sequence[Group] | None]"
NormGroup: TypeAlias = "Group | GroupOf | None"


class _Known(NamedTuple):
    group: Any
    device_type: str


class Ranks:
    """Sums and verdicts over the ranks that share parameters.

    Process groups are told apart by their members: several meshes over the same ranks cost one reduction. All ranks of a
    group make the same reductions in the same order, also where one has nothing to add: the order is that of all parameters
    that `know` has seen, whether or not they have gradients now.

    Args:
        norm_group: the ranks that hold other parameters of the model: a process group, or a mesh of any number of
            dimensions, for all parameters; or a function of (name, parameter) that returns the one of each, several
            (outermost first), or None. The name is None where parameters have none.

    Attributes:
        others: whether a parameter that `know` has seen is cut over several ranks.

    Raises:
        ValueError: no process group is initialised, or this rank is outside of the group.
        TypeError: it is neither a process group nor a mesh nor a function.
    """

    def __init__(self, norm_group: NormGroup = None) -> None:
        self._given = norm_group
        self._meshes: dict[Members, _Known] = {}
        self._named: dict[Members, _Known] = {}
        self._outer: dict[int, Sharing] = {}  # by the parameter's id: the groups that the caller has named
        self._known: tuple[Sharing, ...] = ()
        self._key: tuple[tuple[int, bool], ...] = ()
        self._everybodys: Sharing | None = None
        self.others = False
        if norm_group is None:
            return
        if not active():
            raise ValueError(
                "norm_group says which ranks hold other parameters, but no process group is initialised; call "
                "torch.distributed.init_process_group() first, or leave norm_group out in a single process"
            )
        if is_a("DeviceMesh", "torch.distributed.device_mesh", norm_group) or not callable(norm_group):
            self._everybodys = self._register(norm_group)

    @property
    def named(self) -> bool:
        """Whether the caller has named ranks that hold other parameters."""
        return self._given is not None

    def know(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Learns who holds the parameters of these groups (an optimizer's).

        Raises:
            ValueError: as `sharing`; or ranks would be summed over twice.
        """
        if not active():
            return
        found = [
            (name, p)
            for group in groups
            for name, p in zip(group.get("param_names") or [None] * len(group["params"]), group["params"], strict=True)
        ]
        key = tuple((id(p), p.requires_grad) for _, p in found)
        if key == self._key:
            return
        self._outer = {id(p): self._named_for(name, p) for name, p in found} if self.named else {}
        sharings = [(self.sharing(p), p) for _, p in found]
        # A stage that is frozen as a whole adds nothing to a sum, but other stages wait for it there.
        taking_part = (sharing if p.requires_grad else self.outer(p) for sharing, p in sharings)
        self._known = tuple(dict.fromkeys(filter(None, taking_part)))
        self.others = bool(self._known)
        self._key = key

    def outer(self, p: Tensor) -> Sharing:
        """The groups that the caller has named for `p`, outermost first."""
        if not self.named:
            return ()
        found = self._outer.get(id(p))
        return self._named_for(None, p) if found is None else found

    def sharing(self, p: Tensor) -> Sharing:
        """The groups over which `p` is cut: those named for it, and the mesh dimensions that shard it, not those that
        replicate it.

        Raises:
            ValueError: `p` is a DTensor with a Partial placement, which holds no weights.
        """
        if not is_sharded(p):
            return self.outer(p)
        cut = []
        for dimension, placement in enumerate(p.placements):
            if placement.is_partial():
                raise ValueError(f"a parameter placed as {p.placements} holds terms of a sum, not weights; redistribute it")
            group = p.device_mesh.get_group(dimension)
            members = tuple(dist.get_process_group_ranks(group))
            if len(members) > 1:
                self._meshes.setdefault(members, _Known(group, p.device_mesh.device_type))
                if not placement.is_replicate():
                    cut.append(members)
        return (*self.outer(p), *cut)

    def part_number(self, p: Tensor) -> int:
        """Which of its parts this rank holds, as `distributed.part_number`; ranks of a named group hold different ones."""
        number, parts = 0, 1
        for members in self.outer(p):
            number = number * len(members) + members.index(dist.get_rank())
        if is_sharded(p):
            for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
                parts *= 1 if placement.is_replicate() else size
        return number * parts + part_number(p)

    def sum(self, parts: Mapping[Sharing, Tensor], shape: Sequence[int] = ()) -> Tensor:
        """The sum of all parts, each over its groups: one reduction of one scalar or vector per group.

        Parts that are cut over more dimensions are summed over their innermost first and then join the others, so FSDP2 with
        tensor parallelism takes two reductions in all.

        Args:
            parts: from `sharing` to this rank's sum. What `know` has seen and this lacks counts as zeros; without `know`,
                the same keys in the same order on all ranks.
            shape: of a part, where there is none to see it by.
        """
        zeros = torch.zeros(tuple(shape), dtype=torch.float64) if not parts else torch.zeros_like(next(iter(parts.values())))
        open_parts = {sharing: parts.get(sharing, zeros) for sharing in (*self._known, *parts)}
        while any(open_parts):
            deepest = max(open_parts, key=len)
            part = self._reduce(open_parts.pop(deepest), deepest[-1], dist.ReduceOp.SUM)
            rest = deepest[:-1]
            known = open_parts.get(rest)
            open_parts[rest] = part if known is None else known + part.to(known.device)
        return open_parts.get((), zeros)

    def any(self, flag: Tensor) -> Tensor:
        """The largest flag of all ranks that hold, share or repeat a parameter seen by `know` or `sharing`."""
        return self._everywhere(flag, dist.ReduceOp.MAX)

    def pool(self, values: Tensor) -> Tensor:
        """The sum of all ranks' vectors, of the same ranks as `any`, each as often as another: their ratios are right."""
        return self._everywhere(values, dist.ReduceOp.SUM)

    def gathered(self, mine: Callable[[Members], Any]) -> Iterable[tuple[Members, list[Any]]]:
        """For each named group, what its ranks have returned for it, in their order."""
        for members in self._outward():
            if members in self._named:
                found: list[Any] = [None] * len(members)
                dist.all_gather_object(found, mine(members), group=self._named[members].group)
                yield members, found

    def _outward(self) -> list[Members]:
        """All groups in the order in which what one rank has reaches all: those of meshes, then named ones from inside."""
        return [*self._meshes, *(members for members in reversed(self._named) if members not in self._meshes)]

    def _everywhere(self, value: Tensor, op: Any) -> Tensor:
        for members in self._outward():
            value = self._reduce(value, members, op)
        return value

    def _reduce(self, value: Tensor, members: Members, op: Any) -> Tensor:
        group, device_type = self._meshes.get(members) or self._named[members]
        # With CPU offload the sums lie on the CPU, where a group that has only NCCL cannot reduce them.
        serves = f"{value.device.type}:" in dist.get_backend_config(group)
        sent = value.detach().clone() if serves else value.detach().to(device_type)
        dist.all_reduce(sent, op=op, group=group)
        return sent.to(value.device)

    # -- groups that a caller names -----------------------------------------------------------------------------------------

    def _register(self, given: Any) -> Sharing:
        found = []
        for group, device_type in _groups_in(given):
            members = tuple(dist.get_process_group_ranks(group))
            if len(members) > 1:
                self._named.setdefault(members, _Known(group, device_type))
                found.append(members)
        return tuple(found)

    def _named_for(self, name: str | None, p: Tensor) -> Sharing:
        if self._everybodys is None:
            given = self._given(name, p)  # type: ignore[operator, misc]  # a function, as __init__ has seen
            outer = () if given is None else self._register(given)
        else:
            outer = self._everybodys
        meshes = []
        if is_sharded(p):
            meshes = [tuple(dist.get_process_group_ranks(p.device_mesh.get_group(i))) for i in range(p.device_mesh.ndim)]
        for i, members in enumerate(outer):
            for j, others in enumerate((*outer[i + 1 :], *meshes)):
                twice = sorted(set(members) & set(others))
                if len(twice) > 1:
                    mesh = ", over which its own mesh (DTensor) spreads it already" if j >= len(outer) - i - 1 else ""
                    raise ValueError(
                        f"norm_group: ranks {twice} would be summed over twice for {name or 'a parameter'} of shape "
                        f"{tuple(p.shape)}{mesh}; name only the ranks that hold other parameters, such as the pipeline's, "
                        "and leave meshes of DTensors out"
                    )
        return outer

    def __deepcopy__(self, memo: Any) -> Ranks:
        return Ranks(self._given)  # within this process the groups are the same

    def __getstate__(self) -> dict[str, Any]:
        if self.named:
            raise TypeError(
                "norm_group: process groups belong to this process, so an optimizer that has some cannot be pickled; save "
                "its state_dict() and build it anew"
            )
        return Ranks().__dict__  # process groups belong to this process


def _groups_in(given: Any) -> list[_Known]:
    """The process groups that a caller has named, one for each dimension of a mesh, with devices that they serve."""
    if isinstance(given, (list, tuple)):
        return [found for one in given for found in _groups_in(one)]
    outside = "norm_group: this rank is not in the group given; name the group that holds it, on every rank its own"
    if is_a("DeviceMesh", "torch.distributed.device_mesh", given):
        if given.get_coordinate() is None:
            raise ValueError(outside)
        return [_Known(given.get_group(i), given.device_type) for i in range(given.ndim)]
    if given is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group() returns to ranks that it leaves out
        raise ValueError(outside)
    if not isinstance(given, dist.ProcessGroup):
        raise TypeError(
            "norm_group must be a process group, a DeviceMesh, or a function of (name, parameter) that returns one, several "
            f"or None; not {given!r}"
        )
    try:
        inside = dist.get_rank(given) >= 0
        device_type = str(dist.get_backend_config(given)).split(":", maxsplit=1)[0]
    except (KeyError, ValueError) as error:
        raise ValueError("norm_group: this process group is not registered (any more); build it anew") from error
    if not inside:
        raise ValueError(outside)
    return [_Known(given, device_type)]
