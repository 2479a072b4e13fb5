"""Numbers among an operation's arguments: refused by name before anything is computed."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

POSITIVE = 1e-30  # by less a logit cannot be divided in float32


def check_real(op: str, name: str, value: object) -> None:
    """Raises TypeError unless the value is a real number or a tensor of one."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    if not one and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, not {value!r}")


def check_whole(op: str, name: str, value: object) -> None:
    """Raises TypeError unless the value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{op}: {name} must be a whole number, not {value!r}")


def check_number(op: str, name: str, value: object, least: float = 0.0) -> None:
    """Raises unless the value is a real number or a tensor of one that wants no gradient (TypeError), finite and at least
    so large (ValueError)."""
    check_real(op, name, value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{op}: {name} is a tensor that requires a gradient, and gets none: pass float({name})")
    number = float(value)  # type: ignore[arg-type]
    if not least <= number < math.inf:
        raise ValueError(f"{op}: {name} must be finite and {'> 0' if least == POSITIVE else f'>= {least:g}'}, not {number}")
