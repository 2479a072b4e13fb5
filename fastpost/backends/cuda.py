"""CUDA tensors through the compiled core, on the caller's stream and device; nothing here waits for the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastpost.backends import native
from fastpost.backends.serving import (
    DTYPES,
    address,
    address_and_stride,
    addresses_and_strides,
    contiguous,
    contiguous_floats,
    number_on,
    operand_dtype,
    refusal,
    seed_on,
)
from fastpost.dispatch import strict
from fastpost.plan import Bucket
from fastpost.row_tasks import DivergenceTask, LossTask, OperandTask

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


def _sum(bucket: Bucket, plan: Any) -> tuple[Tensor, Tensor]:
    """Room for a scalar, and for its part from each chunk."""
    return torch.empty((), dtype=torch.float64, device=bucket.device), _doubles(bucket.device, max(plan.chunks, 1))


def _sums(bucket: Bucket, plan: Any) -> tuple[Tensor, Tensor]:
    """The same for the sums of a perturbation."""
    return _doubles(bucket.device, _SUMS), _doubles(bucket.device, _SUMS * max(plan.chunks, 1))


# -- params ---------------------------------------------------------------------------------------------------------------


def squared_norm(bucket: Bucket, eta: float | None) -> Tensor:
    plan = _plan(bucket)
    out, partial = _sum(bucket, plan)
    native.core().cuda.squared_norm(
        plan, eta is not None, eta or 0.0, partial.data_ptr(), out.data_ptr(), *_where(bucket.device)
    )
    return out


def squared_distance(bucket: Bucket) -> Tensor:
    plan = _plan(bucket)
    out, partial = _sum(bucket, plan)
    native.core().cuda.squared_distance(plan, partial.data_ptr(), out.data_ptr(), *_where(bucket.device))
    return out


def sam_perturb_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    plan, squared, seed = _plan(bucket), number_on(bucket.device, squared), seed_on(bucket.device, seed)
    sums, partial = _sums(bucket, plan)
    native.core().cuda.sam_perturb(
        plan, rho, eta is not None, eta or 0.0, _dtype(compute_dtype), squared.data_ptr(), address(seed), partial.data_ptr(),
        sums.data_ptr(), *_where(bucket.device),
    )  # fmt: skip
    return sums


def sam_perturb_masters_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype
) -> Tensor:
    plan, squared = _plan(bucket), number_on(bucket.device, squared)
    sums, partial = _sums(bucket, plan)
    native.core().cuda.sam_perturb_masters(
        plan, rho, eta is not None, eta or 0.0, _dtype(compute_dtype), squared.data_ptr(), partial.data_ptr(),
        sums.data_ptr(), *_where(bucket.device),
    )  # fmt: skip
    return sums


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


def negate_(bucket: Bucket) -> None:
    native.core().cuda.negate(_plan(bucket), *_where(bucket.device))


def flip_signs_(bucket: Bucket, seed: Tensor) -> None:
    seed = seed.to(bucket.device)
    native.core().cuda.flip_signs(_plan(bucket), seed.data_ptr(), *_where(bucket.device))


def negate_norm_(bucket: Bucket) -> Tensor:
    plan = _plan(bucket)
    out, partial = _sum(bucket, plan)
    native.core().cuda.negate_norm(plan, partial.data_ptr(), out.data_ptr(), *_where(bucket.device))
    return out


def negate_clip_(bucket: Bucket, squared: Tensor, max_norm: float) -> None:
    squared = number_on(bucket.device, squared)
    native.core().cuda.negate_clip(_plan(bucket), squared.data_ptr(), max_norm, *_where(bucket.device))


# -- noise ----------------------------------------------------------------------------------------------------------------


def add_noise(
    x: Tensor,
    eps: float,
    noise_type: str,
    seed: Tensor,
    rows: Tensor | None,
    scales: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    core = native.core()
    x, rows, scales = x.contiguous(), contiguous(rows), contiguous_floats(scales)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    core.cuda.add_noise(
        x.data_ptr(), out.data_ptr(), _dtype(x.dtype), _dtype(out_dtype), x.numel(), eps,
        getattr(core.NoiseType, noise_type), seed.data_ptr(), address(rows), address(scales),
        x.shape[-1] if x.ndim else 1, *_where(x.device),
    )  # fmt: skip
    return out


def embedding_noise(
    table: Tensor,
    ids: Tensor,
    eps: float,
    noise_type: str,
    seed: Tensor,
    rows: Tensor | None,
    scales: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    core = native.core()
    table = table if table.stride(-1) == 1 else table.contiguous()
    ids, rows, scales = ids.to(torch.int64).contiguous(), contiguous(rows), contiguous_floats(scales)
    clean = torch.empty((*ids.shape, table.shape[1]), dtype=table.dtype, device=table.device)
    noised = torch.empty(clean.shape, dtype=out_dtype, device=table.device)
    core.cuda.embedding_noise(
        table.data_ptr(), ids.data_ptr(), clean.data_ptr(), noised.data_ptr(), _dtype(table.dtype), _dtype(out_dtype),
        ids.numel(), *table.shape, table.stride(0), eps, getattr(core.NoiseType, noise_type), seed.data_ptr(), address(rows),
        address(scales), *_where(table.device),
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
    clean = task.clean
    native.core().cuda.operand_rows(
        *addresses_and_strides(clean, task.noised, task.first, task.second),
        _dtype(operand_dtype(clean, task.first, task.second)), *clean.shape, address(task.labels), task.ignore_index,
        address(task.kl_weights), address(task.ce_weights),
        task.smoothing, task.cap, task.teaches, task.noised_classifies, address(task.kl_out),
        address(task.ce_out), *_where(clean.device),
    )  # fmt: skip


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
