"""CUDA tensors through the compiled core."""

from __future__ import annotations

import torch

from fastpost.backends import native


def status() -> tuple[bool, str]:
    """Availability, and the reason why not."""
    why = native.failure()
    if why is not None:
        return False, why
    if not hasattr(native.core(), "cuda"):
        return False, "this build holds no CUDA core (nvcc was not found when it was built, or FASTPOST_CUDA=0)."
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device."
    return True, torch.cuda.get_device_name()


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    """Why this backend cannot serve the call, or None."""
    if op not in globals():
        return "has no such operation"
    if device != "cuda":
        return f"serves CUDA tensors, not {device}"
    return None
