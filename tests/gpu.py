"""Where the GPU tests run, and how the CPU tests' bodies are made to run there.

FASTPOST_GPU_TESTS=cpu rehearses them on a machine without a GPU: the same code on CPU tensors, with the CPU's backends,
streams and graphs left out. It finds what is misspelt, nothing more.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import CPU_BACKENDS
from .memory import cpu_peak_bytes

DEVICE = os.environ.get("FASTPOST_GPU_TESTS", "cuda")
ON_GPU = DEVICE != "cpu"
BACKENDS = ("cuda", "triton") if ON_GPU else CPU_BACKENDS
needs_gpu = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="torch sees no CUDA device")
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "tensor", "zeros")


class _OnDevice:
    """A module whose factories make their tensors on the device."""

    def __init__(self, module: ModuleType, factories: tuple[str, ...]) -> None:
        self._module, self._factories = module, factories

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
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


def at_home(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def there(*tensors: Tensor) -> list[Tensor]:
    """Copies on the device; on the CPU copies too."""
    return [t.detach().clone().to(DEVICE) for t in tensors]


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Whatever waits for the device in here raises."""
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """As a plugin (`pytest -p tests.gpu`): only a module's own tests, without the bodies that it borrows."""
    items[:] = [item for item in items if item.function.__module__ == item.module.__name__]  # type: ignore[attr-defined]
