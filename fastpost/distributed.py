"""What this rank holds of a parameter: DTensor (FSDP2, tensor parallel), DDP; and what is inside a wrapped model.

Sums over the other ranks are in `ranks.py`. Nothing here knows a method; SAM and others go through it, so that no
DTensor reaches an operation.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def unwrap(model: Any, *, compiled: bool = False) -> Any:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, however they are nested.

    Args:
        compiled: look into torch.compile alone, to see what was compiled: a DDP or FSDP2 module maybe.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and not compiled and not hasattr(model, "get_input_embeddings"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def active() -> bool:
    """Whether this process is one of a job's ranks."""
    return dist.is_available() and dist.is_initialized()


def several() -> bool:
    """Whether this process is one of at least two ranks."""
    return active() and dist.get_world_size() > 1


def is_a(name: str, module: str, thing: object) -> bool:
    """Whether this is an instance of a class of torch whose module takes a second to import; if nobody has, it is none."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)


def is_sharded(tensor: object) -> TypeIs[DTensor]:
    """Whether a mesh of ranks holds this tensor (DTensor)."""
    return is_a("DTensor", "torch.distributed.tensor", tensor)


def _is_fully_sharded(module: object) -> TypeIs[FSDPModule]:
    return is_a("FSDPModule", "torch.distributed.fsdp", module)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as memory that can be read and written; a plain tensor is its own part."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def local_gradient(p: Tensor) -> Tensor | None:
    """This rank's part of the gradient of `p`, cut as `p` is; None where there is none.

    Tensor parallelism leaves the gradients of replicated weights (norms, biases) as sums still to be made over ranks
    (Partial). They are made here, once: `p.grad` is replaced by a gradient placed as `p`.
    """
    grad = p.grad
    if not is_sharded(p) or not is_sharded(grad):
        return grad
    if tuple(grad.placements) != tuple(p.placements):
        with torch.no_grad():
            grad = p.grad = grad.redistribute(p.device_mesh, p.placements)
    return local(grad)


def has_other_writers(gradient: Tensor) -> bool:
    """Whether a gradient may lie in memory that later passes write to: flattened parameters, and DDP's buckets, of which one
    may be as large as its only gradient."""
    if is_sharded(gradient) or gradient.layout != torch.strided:
        return False
    return active() or gradient.untyped_storage().nbytes() != gradient.numel() * gradient.element_size()


def local_as(p: Tensor, value: Tensor) -> Tensor:
    """This rank's part of a tensor of the whole shape of `p`, such as its momentum, cut as `p` is."""
    if not is_sharded(p) or not is_sharded(value):
        return value
    with torch.no_grad():
        return local(value.redistribute(p.device_mesh, p.placements))


def part_number(p: Tensor) -> int:
    """Which of a parameter's parts this rank holds, counted from 0: the same on ranks that hold the same part. Meshes alone
    count; `Ranks.part_number` knows the ranks that a caller names as well."""
    if not is_sharded(p):
        return 0
    coordinate = p.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the parameter's mesh"
    number = 0
    for place, size, placement in zip(coordinate, p.device_mesh.shape, p.placements, strict=True):
        if not placement.is_replicate():
            number = number * size + place
    return number


def like(p: Tensor, part: Tensor) -> Tensor:
    """`part`, shaped like this rank's part of `p`, as a tensor placed as `p` is; checkpoints need to know the placement."""
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def sum_before(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The sum of `value` over the ranks before this one; 0 where there is one process.

    Every rank of the group (None: all) has to call this. R3F's tokens are numbered from it:
    `r3f.window(token_offset=sum_before(tokens_of_this_rank))`.
    """
    if not active():
        return 0
    values: list[int] = [0] * dist.get_world_size(group)
    dist.all_gather_object(values, int(value), group=group)
    return sum(values[: dist.get_rank(group)])


def everywhere(holds: bool) -> bool:
    """Whether something holds on all ranks; every rank has to call this."""
    if not active():
        return holds
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, holds)
    return all(found)


def _sharded_groups(params: Iterable[Tensor]) -> list[tuple[nn.Module, Any, list[Any]]]:
    """The FSDP2 modules that own some of these parameters, each with a group of FSDP2's and its records of these parameters.

    `module.parameters()` cannot tell while a module is unsharded, so FSDP2's own records are asked.
    """
    states = sys.modules.get("torch.distributed._composable_state")
    if states is None or not states._module_state_mapping:  # nothing was sharded: not worth a look at each parameter
        return []
    wanted = {id(p) for p in params if is_sharded(p)}
    found = []
    for module, reference in list(states._module_state_mapping.items()) if wanted else ():
        state: Any = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.11
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            records = [] if group is None else [r for r in group.fsdp_params if id(r.sharded_param) in wanted]
            if records:
                found.append((module, group, records))
    return found


def fully_sharded(params: Iterable[Tensor]) -> list[tuple[nn.Module, Any]]:
    """The FSDP2 modules that own some of these parameters, each with one of its per-parameter records."""
    return [(module, record) for module, _, records in _sharded_groups(params) for record in records]


def _half_reduced(group: Any, records: list[Any]) -> Tensor | None:
    """What a group under HSDP has reduced over its shards only (`set_requires_all_reduce(False)`), if all of it is of these
    records."""
    found: Tensor | None = getattr(group, "_partial_reduce_output", None)
    return found if len(records) == len(group.fsdp_params) else None


def waiting_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """What FSDP2 has accumulated of these parameters' gradients without reducing it (`set_requires_gradient_sync(False)`).

    Under HSDP also what it has reduced over the shards only (`set_requires_all_reduce(False)`): one tensor for a module.

    It is in no `.grad` that a user sees; FSDP2's own records are asked.
    """
    found: list[Tensor] = []
    for _, group, records in _sharded_groups(params):
        if (half := _half_reduced(group, records)) is not None:
            found.append(half)
        for record in records:
            if record.unsharded_accumulated_grad is not None:
                found.append(record.unsharded_accumulated_grad)
            elif (whole := getattr(record, "_unsharded_param", None)) is not None and whole.grad is not None:
                found.append(local(whole.grad))
    return found


def drop_waiting_gradients(params: Iterable[Tensor]) -> None:
    """Drops `waiting_gradients`, which an optimizer's `zero_grad()` does not see. All ranks have to drop them."""
    for _, group, records in _sharded_groups(params):
        if _half_reduced(group, records) is not None:
            group._partial_reduce_output = None
        for record in records:
            record.unsharded_accumulated_grad = None
            if (whole := getattr(record, "_unsharded_param", None)) is not None:
                whole.grad = None


def reshard(params: Iterable[Tensor]) -> None:
    """Lets FSDP2 gather these parameters anew before it next computes with them.

    After a forward without backward, or with `set_reshard_after_backward(False)`, it would go on with what it gathered
    before the shards were written.
    """
    for module in {id(module): module for module, _ in fully_sharded(params)}.values():
        module.reshard()  # type: ignore[operator]


def compute_dtype(params: Iterable[Tensor]) -> torch.dtype | None:
    """The dtype that FSDP2's mixed precision casts these parameters to; the coarsest where they differ, None for none."""
    # FSDP2 settles it in the first forward pass; before that nothing has been cast.
    found = [getattr(record, "param_dtype", None) for _, record in fully_sharded(params)]
    dtypes = [dtype for dtype in found if dtype is not None]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Leaves gradients unsynchronised inside, for DDP and FSDP2 modules alike, compiled or not.

    It has to enclose the forward pass too: DDP decides there whether the coming backward synchronises.

    Raises:
        TypeError: `model` is neither.
    """
    inner = unwrap(model, compiled=True)
    if not isinstance(inner, nn.parallel.DistributedDataParallel) and not _is_fully_sharded(inner):
        raise TypeError(f"no_sync: {type(model).__name__} is neither DistributedDataParallel nor made by fully_shard")
    with gradient_sync(model, False):
        yield


@contextlib.contextmanager
def gradient_sync(model: nn.Module, sync: bool) -> Iterator[None]:
    """Whether backward passes inside make ranks share gradients, whatever was decided outside; compiled models too.

    DDP and FSDP2 modules have something to share; others are left alone. FSDP2 cannot be asked what was decided outside: it
    synchronises afterwards.
    """
    inner = unwrap(model, compiled=True)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        outside = inner.require_backward_grad_sync
        inner.require_backward_grad_sync = sync
        try:
            yield
        finally:
            inner.require_backward_grad_sync = outside
    elif _is_fully_sharded(inner):
        inner.set_requires_gradient_sync(sync)
        try:
            yield
        finally:
            inner.set_requires_gradient_sync(True)
    else:
        yield
