"""Where the GPU tests run, and how the CPU tests' bodies are made to run there.

FASTPOST_GPU_TESTS=cpu rehearses them on a machine without a GPU: the same code on CPU tensors, with the CPU's backends,
streams and graphs left out. It finds what is misspelt, nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpost
from fastpost.errors import BackendUnavailable
from fastpost.ops import params

from . import emulation
from .conftest import CPU_BACKENDS
from .memory import cpu_peak_bytes

DEVICE = os.environ.get("FASTPOST_GPU_TESTS", "cuda")
ON_GPU = DEVICE != "cpu"
BACKENDS = ("cuda", "triton") if ON_GPU else CPU_BACKENDS
needs_gpu = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no CUDA device")
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
_RANDOM = ("rand", "randint", "randn", "randperm")


def _drawn(factory: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Random numbers from the CPU's generator, so that a test has the same ones everywhere, on the device."""
    made = factory(*args, **kwargs)
    return made if "device" in kwargs else made.detach().to(DEVICE).requires_grad_(made.requires_grad)


class _OnDevice:
    """A module whose factories make their tensors on the device."""

    def __init__(self, module: ModuleType, factories: tuple[str, ...]) -> None:
        self._module, self._factories = module, factories

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name in _RANDOM and self._module is torch:
            return functools.partial(_drawn, value)
        return functools.partial(value, device=DEVICE) if name in self._factories else value


def borrow(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Lets a CPU test module make its tensors on the device; what it hands to NumPy comes home first.

    The library itself sees torch as it is.
    """
    monkeypatch.setattr(module, "torch", _OnDevice(torch, _FACTORIES))
    if hasattr(module, "nn"):
        monkeypatch.setattr(module, "nn", _OnDevice(torch.nn, ("Embedding",)))
    plain = Tensor.numpy
    monkeypatch.setattr(Tensor, "numpy", lambda self, *args, **kwargs: plain(self.cpu(), *args, **kwargs))


def every(body: Callable[..., None], **given: Any) -> None:
    """A borrowed test under all of its parameters that agree with `given`, from the same seed each; tells of all that fail.

    For tests whose cases are many and short. A rehearsal runs the first one, and with CUDA_EMULATION=1 all.
    """
    axes = []
    for mark in getattr(body, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
            axes.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in values])
    cases: list[dict[str, Any]] = [functools.reduce(operator.or_, parts, {}) for parts in itertools.product(*axes)]
    cases = [case for case in cases if all(case.get(name, value) == value for name, value in given.items())]
    assert cases, f"{body.__name__} has no such case"
    ran, wrong, skipped = 0, [], set()
    for case in cases if ON_GPU or emulation.enabled() else cases[:1]:
        torch.manual_seed(1234)
        try:
            body(**given | case)
        except pytest.skip.Exception as skip:
            skipped.add(str(skip))
            continue
        except AssertionError as error:
            wrong.append(f"{case}: {str(error).strip() or type(error).__name__}")
        ran += 1
    if not ran:
        pytest.skip("; ".join(sorted(skipped)))
    assert not wrong, f"{len(wrong)} of {ran} fail:\n" + "\n".join(wrong)


def at_home(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def there(*tensors: Tensor) -> list[Tensor]:
    """Copies on the device; on the CPU copies too."""
    return [t.detach().clone().to(DEVICE) for t in tensors]


@functools.cache
def _first_sums() -> None:
    """Makes what a process keeps from its first sum on: counters on the device, whose copy waits for it."""
    for name in BACKENDS:
        with contextlib.suppress(BackendUnavailable), fastpost.use_backend(name):
            params.squared_norm([torch.ones(1, device=DEVICE)])


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Whatever waits for the device in here raises."""
    _first_sums()
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def late_stream() -> Iterator[None]:
    """A stream of its own that starts its work late, so that whoever runs on another stream reads too early."""
    if not ON_GPU:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        yield
    stream.synchronize()


class Captured:
    """A CUDA graph of `work`, made after warm-up runs of it; `result` is what it returned, filled by replay()."""

    def __init__(self, work: Callable[[], Any], warm_up: int = 3) -> None:
        self._work, self.result = work, None
        if not ON_GPU:
            for _ in range(warm_up):
                work()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_up):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.result = work()

    def replay(self) -> Any:
        if ON_GPU:
            self._graph.replay()
        else:
            self.result = self._work()
        return self.result


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes allocated at most while `work` runs, beside what was there."""
    if not ON_GPU:
        return cpu_peak_bytes(work)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
