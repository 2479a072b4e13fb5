"""Which backend serves a call, and how to choose one by hand."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fastpost.errors import BackendUnavailable, unknown

NAMES = ("reference", "cpu", "cuda", "triton")
# The first backend that serves the call wins; reference serves everything and closes each line.
_DEFAULT_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_forced: str | None = None


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used on this machine: `reason` says why not, or what it runs on."""

    available: bool
    reason: str


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"fastpost.backends.{name}")


@functools.cache
def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with its availability on this machine. Probes the hardware on the first call only."""
    return {name: BackendStatus(*_module(name).status()) for name in NAMES}


class use_backend:
    """Serves all following calls through one backend, or those inside a `with` block.

    A forced backend that cannot serve a call raises instead of handing it on. `use_backend(None)` returns to the
    default. The environment variable FASTPOST_BACKEND sets the choice a process starts with.

    Args:
        name: "reference", "cpu", "cuda", "triton", or None for the default choice per call.

    Raises:
        ValueError: no such backend.
        BackendUnavailable: the backend cannot be used on this machine.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _require(name)
        self._previous = forced()
        _forced = name or ""

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._previous or ""


def _require(name: str) -> None:
    if name not in NAMES:
        raise unknown("backend", name, NAMES)
    status = backends()[name]
    if not status.available:
        usable = ", ".join(n for n, s in backends().items() if s.available)
        raise BackendUnavailable(f"backend {name!r} is not available: {status.reason} Available: {usable}.")


def forced() -> str | None:
    """The backend that was chosen by hand, or None."""
    global _forced
    if _forced is None:  # not chosen in this process yet
        name = os.environ.get("FASTPOST_BACKEND", "")
        if name:
            _require(name)
        _forced = name
    return _forced or None


def strict() -> bool:
    """Whether FASTPOST_CHECKS=1 asks for checks of values that wait for the device, to find a bad label or index."""
    return os.environ.get("FASTPOST_CHECKS") == "1"


def select(op: str, device: torch.device, dtype: torch.dtype, *, walkable: bool = True) -> Callable[..., Any]:
    """The function that runs `op` on tensors of this device and dtype.

    Args:
        op: name of the operation, as in `fastpost.backends.reference`.
        device: where the tensors live.
        dtype: their element type.
        walkable: False when their memory cannot be walked by address (odd strides, mixed dtypes): only `reference`
            serves those.

    Raises:
        BackendUnavailable: a backend was forced that cannot serve the call.
    """
    return _select(op, device, dtype, walkable, forced() if _forced is None else _forced or None)


# By device, not by its type: asking a device for its type takes longer than all the rest of a call.
@functools.cache
def _select(op: str, where: torch.device, dtype: torch.dtype, walkable: bool, forced: str | None) -> Callable[..., Any]:
    device = where.type
    name, refusals, missing = _choose(op, device, dtype, walkable, forced)
    if name is None:
        raise BackendUnavailable(
            f"{op} on {device} tensors of {str(dtype).removeprefix('torch.')} cannot be served: {'; '.join(refusals)}. "
            "use_backend(None) lets fastpost choose; use_backend('reference') serves everything."
        )
    if name == "reference" and missing:
        reasons = "; ".join(missing)
        warnings.warn(f"fastpost serves {device} tensors by its slow reference backend. {reasons}", stacklevel=4)
    backend = _module(name)  # Triton's launches on the current device, and wraps what is for another
    function: Callable[..., Any] = getattr(backend, op)
    return backend.on_device(function, where) if hasattr(backend, "on_device") else function


def serving(op: str, device: torch.device, dtype: torch.dtype, *, walkable: bool = True) -> str | None:
    """The backend that `select` would choose, for those who only ask: nothing is said or raised; None where none serves."""
    return _serving(op, device, dtype, walkable, forced())


@functools.cache
def _serving(op: str, where: torch.device, dtype: torch.dtype, walkable: bool, forced: str | None) -> str | None:
    return _choose(op, where.type, dtype, walkable, forced)[0]


def _choose(
    op: str, device: str, dtype: torch.dtype, walkable: bool, forced: str | None
) -> tuple[str | None, list[str], list[str]]:
    """The backend that serves, or None; why those before it do not; and which of these reasons are that it is missing."""
    refusals: list[str] = []
    missing: list[str] = []
    for name in (forced,) if forced else _DEFAULT_ORDER.get(device, ("triton", "reference")):
        if not backends()[name].available:
            refusals.append(f"{name}: {backends()[name].reason}")
            missing.append(refusals[-1])
            continue
        why = _module(name).refuses(op, device, dtype, walkable)
        if why is None:
            return name, refusals, missing
        refusals.append(f"{name}: {why}")
    return None, refusals, missing


def shortcut(op: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """What the backend that comes first offers under `op`, beside the operations that all of them have; None: nothing."""
    return _shortcut(op, device, dtype, forced())


@functools.cache
def _shortcut(op: str, where: torch.device, dtype: torch.dtype, forced: str | None) -> Callable[..., Any] | None:
    device = where.type
    for name in (forced,) if forced else _DEFAULT_ORDER.get(device, ()):
        if backends()[name].available:
            function: Callable[..., Any] | None = getattr(_module(name), op, None)
            return None if function is None or _module(name).refuses(op, device, dtype, True) else function
    return None
