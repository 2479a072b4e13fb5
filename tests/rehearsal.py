"""A plugin (`pytest -p tests.rehearsal`) for FASTPOST_GPU_TESTS=cpu: which tests are run, and what a device refuses.

A module's own tests are run, and each body that it borrows once: under all its parameters it runs on the CPU anyway.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastpost import dispatch

from .gpu import DEVICE

TESTS = Path(__file__).parent
LIBRARY = (str(TESTS.parent / "fastpost"), str(TESTS.parent / "triton_kernels"))
THERE, HERE = "the device", "the host"
NUMPY, SELECT = Tensor.numpy, dispatch.select
# What reads or writes across devices, and what looks at a tensor's shape alone.
ANYWHERE = {
    "copy_",
    "cpu",
    "to",
    "__set__",
    "grad",
    "backward",
    "data_ptr",
    "register_hook",
    "type_as",
    "new_tensor",
}


def side_of(tensor: Tensor) -> str | None:
    return getattr(tensor, "_side", None)


def is_place(asked: Any) -> bool:
    return isinstance(asked, (str, torch.device))


def side_at(place: Any) -> str | None:
    """A torch.device may be either's here."""
    return THERE if place is DEVICE else HERE if isinstance(place, str) else None


def tensors_in(things: Iterable[Any]) -> Iterator[Tensor]:
    """Long lists of numbers are not walked."""
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (tuple, list)) and not (thing and isinstance(thing[0], (int, float)) and len(thing) > 9):
            yield from tensors_in(thing)


@functools.cache
def whose(file: str) -> str:
    if file.startswith(LIBRARY):
        return "library"
    return "test" if file.startswith(str(TESTS)) and file != __file__ else ""


def made_by() -> str:
    """Whose code asks for a tensor: the library's, or a test's that calls nothing of it."""
    frame = sys._getframe(1)
    while frame is not None and not whose(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
    return whose(frame.f_code.co_filename) if frame is not None else ""


class Sides(TorchFunctionMode):
    """All memory is the CPU's here; what a device would refuse of tensors that are not all its own raises nevertheless.

    A tensor is the device's if it was made with device=DEVICE or from one that is. It is the host's if a test made it
    otherwise. What the library makes may be either.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__get__", "tolist"):  # mostly no tensor comes of these
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and side_of(result) is None:
                result._side = side_of(args[0])  # type: ignore[attr-defined]
            return result
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        if name not in ANYWHERE:
            self.check(name, args, given)
        result = func(*args, **kwargs)
        if name in ("cpu", "to"):
            where = "cpu" if name == "cpu" else next((a for a in (*args[1:], kwargs.get("device")) if is_place(a)), None)
            if where is not None:
                result = result.view_as(result)  # on a GPU never the same tensor
                result._side = side_at(where)
                return result
        made = [t for t in tensors_in((result,)) if not any(t is g for g in given)]
        if given:
            sides = [side_of(t) for t in given]
            side = THERE if THERE in sides else HERE if HERE in sides else None
        elif made:
            side = side_at(kwargs["device"]) if kwargs.get("device") is not None else HERE if made_by() == "test" else None
        for t in made:
            t._side = side  # type: ignore[attr-defined]
        return result

    def check(self, name: str, args: Any, given: list[Tensor]) -> None:
        there = [t for t in given if side_of(t) is THERE]
        if not there:
            return
        here = [t for t in given if side_of(t) is HERE]
        if name == "numpy" or (name == "__array__" and Tensor.numpy is NUMPY):  # unless borrow() sees to it
            raise AssertionError("NumPy is handed a tensor on the device")
        if name in ("__getitem__", "__setitem__") and side_of(args[0]) is THERE:
            indices = list(tensors_in((args[1],)))
            if name == "__getitem__" or not indices:
                return
            here = [t for t in here if any(t is value for value in args[2:])]
        if any(t.ndim for t in here):
            raise AssertionError(f"{name} of tensors on the device and on the host")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen, kept = set(), []
    for item in items:
        function = item.function  # type: ignore[attr-defined]
        name = (item.path, function)
        if function.__module__ == item.module.__name__ or name not in seen:  # type: ignore[attr-defined]
            kept.append(item)
        seen.add(name)
    items[:] = kept


def checked_select(*asked: Any) -> Callable[[Any], object]:
    """Tasks reach kernels as addresses, past every mode."""
    function, sides = SELECT(*asked), Sides()

    def call(task: Any) -> object:
        sides.check("a task", (), list(tensors_in(task)))
        return function(task)

    return call


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if "compile" in item.name or "opcheck" in item.name:  # torch.compile would see the mode
        return (yield)
    with pytest.MonkeyPatch.context() as patch, Sides():
        for name, module in list(sys.modules.items()):
            if name.startswith("tests.") and getattr(module, "select", None) is SELECT:
                patch.setattr(module, "select", checked_select)
        return (yield)
