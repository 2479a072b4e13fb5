"""CUDA tensors through the compiled core: parameter lists in one launch each, on the caller's stream and device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpost.backends import native
from fastpost.backends.serving import DTYPES, refusal
from fastpost.plan import Bucket

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
    return True, torch.cuda.get_device_name()


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    """Why this backend cannot serve the call, or None."""
    wrong = None if device == "cuda" else f"serves CUDA tensors, not {device}"
    return refusal(globals(), op, wrong, dtype, walkable)


def _plan(bucket: Bucket) -> Any:
    return bucket.native(native.core(), getattr(native.core().DType, DTYPES[bucket.dtype]))


def _where(bucket: Bucket) -> tuple[int, int]:
    """Device index, and the caller's stream on that device."""
    index = bucket.device.index if bucket.device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(bucket.device).cuda_stream


def _doubles(bucket: Bucket, n: int) -> Tensor:
    return torch.empty(n, dtype=torch.float64, device=bucket.device)


def squared_norm(bucket: Bucket, eta: float | None) -> Tensor:
    plan = _plan(bucket)
    out, partial = _doubles(bucket, 1), _doubles(bucket, max(plan.chunks, 1))
    native.core().cuda.squared_norm(plan, eta is not None, eta or 0.0, partial.data_ptr(), out.data_ptr(), *_where(bucket))
    return out[0]


def sam_perturb_(bucket: Bucket, squared: Tensor, rho: float, eta: float | None, seen_dtype: torch.dtype) -> Tensor:
    plan = _plan(bucket)
    sums, partial = _doubles(bucket, _SUMS), _doubles(bucket, _SUMS * max(plan.chunks, 1))
    seen = getattr(native.core().DType, DTYPES[seen_dtype])
    native.core().cuda.sam_perturb(
        plan,
        rho,
        eta is not None,
        eta or 0.0,
        seen,
        squared.data_ptr(),
        partial.data_ptr(),
        sums.data_ptr(),
        *_where(bucket),
    )
    return sums


def sam_restore_(bucket: Bucket) -> None:
    native.core().cuda.sam_restore(_plan(bucket), *_where(bucket))


def negate_(bucket: Bucket) -> None:
    native.core().cuda.negate(_plan(bucket), *_where(bucket))


def negate_norm_(bucket: Bucket) -> Tensor:
    squared = squared_norm(bucket, None)
    negate_(bucket)
    return squared
