"""Properties by name: what each promises, in one line, and what checks it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Failure(Exception):
    """The property does not hold; the message says what was measured."""


class NotApplicable(Exception):
    """The property has no meaning for this optimizer; the message says why."""


@dataclass(frozen=True)
class Property:
    """One promise.

    Attributes:
        name: how it is asked for.
        promise: one line.
        check: returns where the promise holds, raises `Failure` where it does not. Takes the adapter, and in properties of
            several processes the `World`.
        processes: how many processes it takes.
    """

    name: str
    promise: str
    check: Callable[..., None]
    processes: int = 1


_PROPERTIES: dict[str, Property] = {}


def conformance(name: str, processes: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a check; the first line of its docstring is the promise."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        if name in _PROPERTIES:
            raise ValueError(f"two properties are called {name!r}")
        promise = (check.__doc__ or "").strip().splitlines()[0].rstrip(".")
        _PROPERTIES[name] = Property(name, promise, check, processes)
        return check

    return register


def properties() -> dict[str, Property]:
    """All properties, in the order in which the suite runs them."""
    for module in ("equations", "exactness", "faults", "scaling", "checkpoints", "sharding"):
        importlib.import_module(f"fastpost.conformance.{module}")
    return dict(_PROPERTIES)


def judge(check: Callable[..., None], *args: Any) -> tuple[str, str]:
    """Status and detail of one check."""
    try:
        check(*args)
    except Failure as failure:
        return "fail", str(failure)
    except NotApplicable as reason:
        return "not applicable", str(reason)
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        return "error", f"{type(error).__name__}: {first}"[:300]
    return "pass", ""
