"""What all tests share: seeds, the backends of this machine, memory that shows what was never written."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched at run time

from tests import emulation, interpreter

if emulation.enabled():
    emulation.activate()  # before anything loads the real core
elif "FASTPOST_TEST_CORE" in os.environ:  # see sanitized.py
    emulation.load(Path(os.environ["FASTPOST_TEST_CORE"]))
if interpreter.enabled():
    interpreter.activate()

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

import fastpost

# In CI the same examples every time: a rare one is a find for whoever runs the tests, not a reason for a red build.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

# Triton's interpreter is chosen when its kernels are first imported, so it takes a run of its own (see the Makefile).
# The same holds for the CUDA core that is compiled for the CPU (see emulation.py).
if os.environ.get("TRITON_INTERPRET") == "1":
    CPU_BACKENDS: tuple[str, ...] = ("triton",)
elif emulation.enabled():
    CPU_BACKENDS = ("cuda",)
else:
    CPU_BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The files that take longest come first, so that several processes end at the same time.
LONGEST = (
    "build_matrix", "sam_interrupts", "train_cli", "gpurun", "vectorised", "bench", "train_cli_options", "conformance",
    "trainer_distributed", "train_cli_resume", "compare", "triton_compiled", "studies", "torch_library", "bench_curves",
    "sam_sharded", "sam_stages", "r3f_sharded", "build",
)  # fmt: skip


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The raw bits, so that NaN payloads and signed zeros count."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(width).clone()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(bits(a), bits(b)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per backend that serves CPU tensors."""
    with fastpost.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty hands out NaN, so that an element that no kernel writes shows."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = plain(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the code under test would spawn, each with imports of its own, come from the tests' server instead."""
    from tests import distributed

    context = distributed.server()

    def get_context(method: str | None = None) -> Any:
        assert method == "spawn", f"{method!r} is no fresh process, which those of the tests' server stand in for"
        return context

    monkeypatch.setattr(multiprocessing, "get_context", get_context)


@pytest.fixture
def gigabytes(request: pytest.FixtureRequest) -> Iterator[float]:
    """So much device memory (the parameter, indirect), for one test at a time, given back afterwards.

    Skips where the device has not that much left.
    """
    if not torch.cuda.is_available() or os.environ.get("FASTPOST_GPU_TESTS") == "cpu":
        pytest.skip("needs gigabytes of device memory")
    with FileLock(Path(tempfile.gettempdir()) / "fastpost-gpu-tests.lock"):  # between the processes of one run
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < request.param:
            pytest.skip(f"needs {request.param} GB of device memory, of which {free:.0f} are free")
        yield request.param
        gc.collect()
        torch.cuda.empty_cache()


class Seen(TorchDispatchMode):
    """The operations that the dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def reset_accelerate() -> None:
    """Accelerate keeps what it knows of the machine and of accumulation in its classes; this makes it forget."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


@pytest.fixture
def accelerate_alone() -> Iterator[None]:
    """Nothing of Accelerate's state comes from an earlier test or goes to a later one."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models with a tokenizer; see train_cli."""
    from tests.train_cli import build_models

    return build_models(tmp_path_factory)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Text in the forms that `fastpost train` reads; see train_cli."""
    from tests.train_cli import write_files

    return write_files(tmp_path_factory)
