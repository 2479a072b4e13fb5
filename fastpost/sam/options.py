"""Options of SAM and what they mean: valid values, and SAM's keys in groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from fastpost.errors import unknown
from fastpost.ops import params as ops

NORM_IN = ("step", "backward")


def check_fraction(who: str, fraction: float) -> None:
    """Raises ValueError unless the fraction lies in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"{who}: ascent_fraction must lie in (0, 1], not {fraction}")


def check_dropout_rng(mode: str) -> None:
    """Raises ValueError for a mode that does not exist."""
    if mode not in ("same", "independent"):
        raise unknown("dropout_rng", mode, ("same", "independent"))


def check_options(
    ascent_fraction: float,
    dropout_rng: str,
    interval: int,
    compute_dtype: torch.dtype | None,
    sync_ascent: bool | None,
    norm: str,
) -> None:
    """Raises ValueError or TypeError for a value outside its range."""
    check_fraction("SAM", ascent_fraction)
    check_dropout_rng(dropout_rng)
    if norm not in NORM_IN:
        raise unknown("norm", norm, NORM_IN)
    if int(interval) != interval or interval < 1:
        raise ValueError(f"SAM: interval must be a whole number >= 1, not {interval}")
    if compute_dtype is not None:
        ops.check_compute_dtype("SAM", compute_dtype, ())  # of the weights only buckets know
    if sync_ascent is not None and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"SAM: sync_ascent={sync_ascent} says how ranks share the ascent, but no process group is initialised; call "
            "torch.distributed.init_process_group() first, or leave it None in a single process"
        )


# -- in the optimizer's groups --------------------------------------------------------------------------------------------

# What SAM keeps in each group: the radius, and the number of steps, so that `interval` and random rounding resume.
RADIUS_KEYS = ("rho", "adaptive", "eta")
STEPS_KEY = "sam_steps"
GROUP_KEYS = (*RADIUS_KEYS, STEPS_KEY)


def fill_groups(groups: Iterable[dict[str, Any]], rho: float | None, adaptive: bool, eta: float, sam_steps: int = 0) -> None:
    """Gives groups the keys of SAM that they lack.

    Raises:
        ValueError: a group has an eta of its own and is not adaptive.
    """
    for group in groups:
        if STEPS_KEY not in group:  # a new one, not one that was saved
            refuse_unused_eta(group, adaptive)
        for key, value in zip(GROUP_KEYS, (rho, adaptive, eta, sam_steps), strict=True):
            group.setdefault(key, value)


def refuse_unused_eta(group: dict[str, Any], adaptive: bool) -> None:
    """Raises ValueError where a new group has an eta of its own and is not adaptive."""
    eta = group.get("eta")
    if isinstance(eta, int | float) and eta > 0 and not group.get("adaptive", adaptive):
        raise ValueError(
            f"SAM: a group's eta={eta} is ASAM's constant, and the group is not adaptive; give it adaptive=True"
        )


def check_group(group: dict[str, Any]) -> None:
    """Raises TypeError or ValueError where a group holds nonsense under one of SAM's keys."""
    if "norm_group" in group:
        raise ValueError(
            "SAM: norm_group is no option of a parameter group, for groups are saved and process groups cannot be; give "
            "SAM(norm_group=) a function of (name, parameter) that returns the group of each"
        )
    ops.check_radius("SAM", group["rho"], group["eta"])
    adaptive, steps = group["adaptive"], group["sam_steps"]
    if type(adaptive) is bool and type(steps) is int and steps >= 0:
        return  # as nearly always
    try:
        known = adaptive in (True, False)
    except (RuntimeError, ValueError):  # a tensor or an array of several
        known = False
    if not known:
        raise TypeError(f"SAM: adaptive must be True or False, not {adaptive!r}")
    ops.check_number("SAM", "sam_steps", steps)
    if int(steps) != steps:
        raise ValueError(f"SAM: sam_steps counts steps, so it must be a whole number, not {steps}")
