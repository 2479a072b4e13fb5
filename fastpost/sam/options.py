"""Options of SAM that can be judged before anything is built."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastpost.errors import unknown


def check_fraction(who: str, fraction: float) -> None:
    """Raises ValueError unless the fraction lies in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{who}: ascent_fraction must lie in (0, 1], not {fraction}")


def check_dropout_rng(mode: str) -> None:
    """Raises ValueError for a mode that does not exist."""
    if mode not in ("same", "independent"):
        raise unknown("dropout_rng", mode, ("same", "independent"))


def check_options(
    ascent_fraction: float, dropout_rng: str, interval: int, compute_dtype: torch.dtype | None, sync_ascent: bool | None
) -> None:
    """Raises ValueError or TypeError for a value outside its range."""
    check_fraction("SAM", ascent_fraction)
    check_dropout_rng(dropout_rng)
    if int(interval) != interval or interval < 1:
        raise ValueError(f"SAM: interval must be a whole number >= 1, not {interval}")
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise TypeError(f"SAM: compute_dtype must be a floating-point dtype, not {compute_dtype}")
    if sync_ascent is not None and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"SAM: sync_ascent={sync_ascent} says how ranks share the ascent, but no process group is initialised; call "
            "torch.distributed.init_process_group() first, or leave it None in a single process"
        )
