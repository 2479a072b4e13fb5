"""Tensors on any device that Triton compiles for."""

from __future__ import annotations

import torch


def status() -> tuple[bool, str]:
    """Availability, and the reason why not."""
    return False, "this version of fastpost holds no Triton kernels yet."


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    """Why this backend cannot serve the call, or None."""
    return "has no such operation"
