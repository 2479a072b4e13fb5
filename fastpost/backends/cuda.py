"""CUDA tensors through the compiled core, on the caller's stream and device; nothing here waits for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpost.backends import native
from fastpost.backends.reference import sam_direction_ as sam_direction_  # torch's operations; no kernel of its own
from fastpost.backends.serving import (
    DTYPES,
    address,
    address_and_stride,
    addresses_and_strides,
    coded,
    contiguous,
    contiguous_floats,
    distillation_arguments,
    number_on,
    operand_arguments,
    operand_dtype,
    refusal,
    seed_on,
    top_k_arguments,
)
from fastpost.dispatch import strict
from fastpost.plan import AdamWPart, Bucket
from fastpost.row_tasks import DistillationTask, DivergenceTask, LossTask, NoiseTask, OperandTask, ShardTask, TopKTask

_FEW_ROWS = 1 << 16  # whose weights and sums one block makes in next to no time
_SUMS = 6  # of a perturbation, as in fastpost.ops.params.NAMES_OF_SUMS


def status() -> tuple[bool, str]:
    """Availability, and the device in use or the reason why not."""
    why = native.failure()
    if why is not None:
        return False, why
    if not hasattr(native.core(), "cuda"):
        return False, "this build holds no CUDA core (nvcc was not found when it was built, or FASTPOST_CUDA=0)."
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device."
    try:
        native.core().cuda.device_count()
    except RuntimeError as error:  # a driver older than the core's CUDA
        return False, str(error)
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return False, f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; 8.0 or newer is needed."
    if not native.core().cuda.supports(torch.cuda.current_device()):
        return False, (
            f"this build holds no code for {torch.cuda.get_device_name()} (compute capability {major}.{minor}); build with "
            f"FASTPOST_CUDA_ARCHS={major}{minor}-real, or leave it unset for all."
        )
    return True, torch.cuda.get_device_name()


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    """Why this backend cannot serve the call, or None."""
    wrong = None if device == "cuda" else f"serves CUDA tensors, not {device}"
    return refusal(globals(), op, wrong, dtype, walkable)


@functools.cache
def _dtype(dtype: torch.dtype) -> Any:
    return getattr(native.core().DType, DTYPES[dtype])


def _plan(bucket: Bucket) -> Any:
    return bucket.kept_plan or bucket.native(native.core(), _dtype(bucket.dtype))


def _where(device: torch.device) -> tuple[int, int]:
    """Device index, and the caller's stream on that device."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    # As Triton and torch's compiler ask: torch.cuda.current_stream() makes an object, which takes as long as a launch.
    return index, torch._C._cuda_getCurrentRawStream(index)


def _doubles(device: torch.device, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.float64, device=device)


class _Tickets:
    """Counters on a device that are 0 between the kernels that count with them. Each stream has one, whose kernels run one
    after another. A call that is captured has one of its own, because a graph is replayed on any stream.
    """

    count = 1024

    def __init__(self, device: torch.device) -> None:
        # From ordinary memory, so that this waits until they are there, once in a process: any stream may rely on them.
        self._memory = torch.zeros(self.count, dtype=torch.int32, device="cpu").to(device)
        self._free = iter(range(self._memory.data_ptr(), self._memory.data_ptr() + 4 * self.count, 4))
        self._of_stream: dict[int, int] = {}

    def of(self, stream: int, captured: bool) -> int:
        """The address of a counter; 0 where none is left."""
        if captured:
            return next(self._free, 0)
        found = self._of_stream.get(stream)
        if found is None:
            found = self._of_stream[stream] = next(self._free, 0)
        return found


_tickets: dict[int, _Tickets] = {}  # by device


def _is_captured() -> bool:
    return torch._C._cuda_isCurrentStreamCapturing()


def _is_watched() -> bool:
    """Whether torch objects to waiting for a device (`torch.cuda.set_sync_debug_mode`)."""
    return bool(torch.cuda.get_sync_debug_mode())


def _ticket(device: torch.device, index: int, stream: int) -> int:
    """The address of a counter for a kernel that sums; 0 where a second kernel has to add up."""
    captured = _is_captured()
    tickets = _tickets.get(index)
    if tickets is None:
        # Nothing may wait now; and what a graph allocates is not zero when it is replayed.
        if captured or _is_watched():
            return 0
        tickets = _tickets[index] = _Tickets(device)
    return tickets.of(stream, captured)


def _summed(bucket: Bucket, count: int, run: Callable[..., None], *arguments: Any) -> Tensor:
    """`count` sums over a list, by run(plan, *arguments, room, device, stream) of the core."""
    return _sums(bucket, count, run, *arguments)[0]


def _sums(bucket: Bucket, count: int, run: Callable[..., None], *arguments: Any) -> tuple[Tensor, Tensor]:
    """The same, and those of each chunk, one after another."""
    plan, where = _plan(bucket), _where(bucket.device)
    out = torch.empty(() if count == 1 else count, dtype=torch.float64, device=bucket.device)
    partial = torch.empty(count * max(plan.chunks, 1), dtype=torch.float64, device=bucket.device)
    run(plan, *arguments, (out.data_ptr(), partial.data_ptr(), _ticket(bucket.device, *where)), *where)
    return out, partial


# -- params ---------------------------------------------------------------------------------------------------------------


def squared_norm(bucket: Bucket, eta: float | None) -> Tensor:
    return _summed(bucket, 1, native.core().cuda.squared_norm, eta is not None, eta or 0.0)


def chunk_squares(bucket: Bucket) -> Tensor:
    return _sums(bucket, 1, native.core().cuda.squared_norm, False, 0.0)[1][: _plan(bucket).chunks]


def squared_distance(bucket: Bucket) -> Tensor:
    return _summed(bucket, 1, native.core().cuda.squared_distance)


def dot(bucket: Bucket) -> Tensor:
    return _summed(bucket, 1, native.core().cuda.dot)


def sam_perturb_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    squared, seed = number_on(bucket.device, squared), seed_on(bucket.device, seed)
    how = (rho, eta is not None, eta or 0.0, _dtype(compute_dtype), squared.data_ptr(), address(seed))
    return _summed(bucket, _SUMS, native.core().cuda.sam_perturb, *how)


def sam_perturb_coded_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """Waits for the device: how many elements found no room in the list is read, and memory made for them."""
    if _is_captured():
        raise RuntimeError(
            "SAM: stash='ulp' reads a count at every ascent, which a graph that is captured cannot; use stash='copy'"
        )
    core, codes = native.core().cuda, coded(bucket)
    squared, seed = number_on(bucket.device, squared), seed_on(bucket.device, seed)
    how = (rho, eta is not None, eta or 0.0, _dtype(compute_dtype), squared.data_ptr(), address(seed))
    codes.words[:1].zero_()
    sums = _summed(bucket, _SUMS, core.sam_perturb_coded, *how, codes.words.data_ptr(), codes.capacity)
    if codes.grown():
        core.sam_perturb_pending(_plan(bucket), *how, codes.words.data_ptr(), codes.capacity, *_where(bucket.device))
    return sums


def sam_decode_(bucket: Bucket) -> None:
    codes = coded(bucket)
    native.core().cuda.sam_decode(_plan(bucket), codes.words.data_ptr(), codes.capacity, *_where(bucket.device))


def sam_perturb_masters_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype
) -> Tensor:
    squared = number_on(bucket.device, squared)
    how = (rho, eta is not None, eta or 0.0, _dtype(compute_dtype), squared.data_ptr())
    return _summed(bucket, _SUMS, native.core().cuda.sam_perturb_masters, *how)


def sam_cast_(bucket: Bucket) -> None:
    native.core().cuda.sam_cast(_plan(bucket), *_where(bucket.device))


def sam_restore_(bucket: Bucket) -> None:
    native.core().cuda.sam_restore(_plan(bucket), *_where(bucket.device))


def sam_restore_adamw_(
    bucket: Bucket, steps: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    native.core().cuda.sam_restore_adamw(
        _plan(bucket), lr, *betas, eps, weight_decay, maximize, [step.data_ptr() for step in steps], address(grad_scale),
        address(found_inf), *_where(bucket.device),
    )  # fmt: skip


def sam_decode_adamw_(bucket: Bucket, parts: list[AdamWPart]) -> None:
    native.core().cuda.sam_decode_adamw(
        [
            (
                _plan(b), lr, *betas, eps, weight_decay, maximize, [address(step) for step in steps], address(scale),
                address(found_inf), coded(b).words.data_ptr(), coded(b).capacity,
            )
            for b, steps, lr, betas, eps, weight_decay, maximize, scale, found_inf in parts
        ],
        [_where(part.bucket.device) for part in parts],
    )  # fmt: skip


def negate_(bucket: Bucket) -> None:
    native.core().cuda.negate(_plan(bucket), *_where(bucket.device))


def flip_signs_(bucket: Bucket, seed: Tensor) -> None:
    seed = seed.to(bucket.device)
    native.core().cuda.flip_signs(_plan(bucket), seed.data_ptr(), *_where(bucket.device))


def negate_norm_(bucket: Bucket) -> Tensor:
    return _summed(bucket, 1, native.core().cuda.negate_norm)


def negate_clip_(bucket: Bucket, squared: Tensor, max_norm: float) -> None:
    squared = number_on(bucket.device, squared)
    native.core().cuda.negate_clip(_plan(bucket), squared.data_ptr(), max_norm, *_where(bucket.device))


# -- noise ----------------------------------------------------------------------------------------------------------------


def add_noise(x: Tensor, how: NoiseTask) -> Tensor:
    core = native.core()
    x, rows, scales = x.contiguous(), contiguous(how.rows), contiguous_floats(how.scales)
    out = torch.empty(x.shape, dtype=how.out_dtype, device=x.device)
    core.cuda.add_noise(
        x.data_ptr(), out.data_ptr(), _dtype(x.dtype), _dtype(how.out_dtype), x.numel(), how.eps,
        getattr(core.NoiseType, how.noise_type), how.seed.data_ptr(), address(rows), address(scales),
        x.shape[-1] if x.ndim else 1, *_where(x.device),
    )  # fmt: skip
    return out


def embedding_noise(table: Tensor, ids: Tensor, how: NoiseTask) -> tuple[Tensor, Tensor]:
    core = native.core()
    table = table if table.stride(-1) == 1 else table.contiguous()
    ids, rows, scales = ids.to(torch.int64).contiguous(), contiguous(how.rows), contiguous_floats(how.scales)
    clean = torch.empty((*ids.shape, table.shape[1]), dtype=table.dtype, device=table.device)
    noised = torch.empty(clean.shape, dtype=how.out_dtype, device=table.device)
    core.cuda.embedding_noise(
        table.data_ptr(), ids.data_ptr(), clean.data_ptr(), noised.data_ptr(), _dtype(table.dtype), _dtype(how.out_dtype),
        ids.numel(), *table.shape, table.stride(0), how.eps, getattr(core.NoiseType, how.noise_type), how.seed.data_ptr(),
        address(rows), address(scales), *_where(table.device),
    )  # fmt: skip
    return clean, noised


# -- divergence -----------------------------------------------------------------------------------------------------------


def divergence_rows(task: DivergenceTask) -> tuple[Tensor, Tensor]:
    clean = task.clean
    rows, cols = clean.shape
    kl, ce = (_doubles(clean.device, rows) for _ in range(2))
    blocks = addresses_and_strides(clean, task.noised, task.grad_clean, task.grad_noised)
    native.core().cuda.divergence_rows(
        *blocks, _dtype(clean.dtype), rows, cols, address(task.labels), task.ignore_index, address(task.kl_weights),
        address(task.ce_weights), kl.data_ptr(), ce.data_ptr(), *_where(clean.device),
    )  # fmt: skip
    return kl, ce


def row_losses(task: LossTask, grad_clean: Tensor | None, grad_noised: Tensor | None) -> tuple[Tensor, ...] | None:
    """As `cpu.row_losses`, in three launches; here labels that are no class and divergences that are not finite show in the
    values, as they do by the other way."""
    if native.core().needs_dispatcher(()):  # a mode or a transform is on: what is allocated here would have no address
        return None
    clean = task.clean
    rows = clean.numel() // clean.shape[-1] if clean.ndim and clean.shape[-1] else 0
    if task.jensen_shannon or strict() or not 0 < rows <= _FEW_ROWS:
        return None
    room = _doubles(clean.device, 4 * rows)
    out = tuple(torch.empty((), dtype=torch.float32, device=clean.device) for _ in range(1 if task.labels is None else 3))
    places = [t.data_ptr() for t in out] + [0] * (3 - len(out))
    items = None if task.items is None else task.items.detach().to(torch.float64)
    made = native.core().cuda.row_losses(
        *task[1:-1], grad_clean, grad_noised, address(items), room.data_ptr(), *places, *_where(clean.device)
    )  # fmt: skip
    return out if made else None


def operand_rows(task: OperandTask) -> None:
    core = native.core()
    core.cuda.operand_rows(*operand_arguments(core, task, mixture=False), *_where(task.clean.device))


def js_operand_rows(task: OperandTask) -> None:
    core = native.core()
    core.cuda.operand_rows(*operand_arguments(core, task, mixture=True), *_where(task.clean.device))


def shard_sums(shard: ShardTask, before: Tensor | None) -> Tensor:
    core, clean = native.core(), shard.task.clean
    sums = _doubles(clean.device, len(clean) * core.SHARD_SUMS)
    core.cuda.shard_sums(
        *addresses_and_strides(clean, shard.task.noised), *clean.shape, *_of_shard(shard), address(before),
        sums.data_ptr(), *_where(clean.device),
    )  # fmt: skip
    return sums


def shard_operands(shard: ShardTask, before: Tensor, sums: Tensor) -> None:
    core, task = native.core(), shard.task
    clean = task.clean
    core.cuda.shard_operands(
        *addresses_and_strides(clean, task.noised, task.first, task.second),
        _dtype(operand_dtype(clean, task.first, task.second)), *clean.shape, *_of_shard(shard), before.data_ptr(),
        sums.data_ptr(), shard.vocab.data_ptr(), task.smoothing, task.cap, task.teaches, task.kl_out.data_ptr(),
        address(task.ce_out), *_where(clean.device),
    )  # fmt: skip


def _of_shard(shard: ShardTask) -> tuple[int, int, int, int]:
    task = shard.task
    labels = None if task.ce_weights is None else task.labels
    return shard.top.data_ptr(), address(labels), address(task.kl_weights), address(task.ce_weights)


def distillation_rows(task: DistillationTask) -> None:
    core = native.core()
    core.cuda.distillation_rows(*distillation_arguments(core, task), *_where(task.student.device))


def top_k_rows(task: TopKTask) -> None:
    core = native.core()
    room = torch.empty(task.ids.shape, dtype=torch.float32, device=task.ids.device)
    core.cuda.top_k_rows(*top_k_arguments(core, task), room.data_ptr(), *_where(task.ids.device))


def scale_gradients_(first: Tensor, second: Tensor | None, factor: Tensor) -> bool:
    """As `cpu.scale_gradients_`, in one launch, which reads the factor on the device."""
    served: bool = native.core().cuda.scale_gradients(first, second, factor, *_where(first.device))
    return served


def scale_rows_(block: Tensor, factors: Tensor) -> None:
    stride = 1 if factors.numel() > 1 else 0
    native.core().cuda.scale_rows(
        *address_and_stride(block), _dtype(block.dtype), *block.shape, factors.data_ptr(), stride, *_where(block.device)
    )


def gradient_like(logits: Tensor) -> Tensor:
    """Room for a gradient, not yet written."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
