"""Loads the compiled core, and explains a failure when the core is first needed rather than at import."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from fastpost.errors import NativeUnavailable


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        core = importlib.import_module("fastpost._C")
        _attach(core)
        return core, None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fastpost._C":
            loadable = {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES}
            there = {path.name for path in Path(__file__).parents[1].glob("_C.*")}
            others = ", ".join(sorted(there - loadable))
            found = f" (Python {sys.version_info[0]}.{sys.version_info[1]} does not load {others})" if others else ""
            why = (
                f"fastpost's compiled core is missing{found}. It is built by `pip install .` (needs a C++17 compiler; CMake "
                "and Ninja come with the build); an editable install builds it into the package folder, and each Python "
                "version needs its own build."
            )
        else:
            why = (
                f"fastpost's compiled core was found but could not be loaded: {error}. It was most likely built for "
                "another Python, C library or machine; reinstall fastpost in this environment."
            )
        return None, why


def failure() -> str | None:
    """Why the compiled core cannot be loaded, or None when it can."""
    return _load()[1]


@functools.cache
def core() -> Any:
    """The compiled module `fastpost._C`.

    Raises:
        NativeUnavailable: the module is missing or broken; the message says what to do.
    """
    module, why = _load()
    if why is not None:
        raise NativeUnavailable(f"{why} `fastpost doctor` shows more; the reference backend works without it.")
    return module


def _attach(core: Any) -> None:
    """Tells the core what it has to know of torch."""
    import torch  # not above: why a core cannot be loaded has to be said without torch, too

    observers = (  # what only hears of calls by the dispatcher, and may have them do something else
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._is_tracing,
        torch._C._autograd._profiler_enabled,
    )
    core.attach(
        exchange=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        plain=(torch.Tensor, torch.nn.Parameter),
        observers=observers,
        grad_enabled=torch.is_grad_enabled,
        set_grad_enabled=torch._C._set_grad_enabled,
        function_modes=torch._C._len_torch_function_stack,
        past_modes=torch._C.DisableTorchFunction,
        increment_version=torch._C._increment_version,
        float64_tensor=functools.partial(torch.tensor, dtype=torch.float64),
        is_neg=torch.Tensor.is_neg,
        num_threads=torch.get_num_threads,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),  # in the order of csrc/core/dtype.h
    )
