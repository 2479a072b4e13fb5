"""The suite as one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Property, properties
from fastpost.conformance.results import Result, print_table
from fastpost.conformance.runner import Verdict, in_processes, in_this_process, why_not_elsewhere


def sam_conformance(
    make_optimizer: Callable[..., Any] | Adapter,
    *,
    distributed: bool = True,
    isolate: bool = False,
    only: Iterable[str] | None = None,
    time_limit: float = 60.0,
    table: bool = True,
) -> list[Result]:
    """Checks what users rely on in a SAM-like optimizer, and prints a table.

    Args:
        make_optimizer: called as (params, base_optimizer_class, rho=..., **base_kwargs), with SGD or AdamW as the class; or
            an `Adapter`, where it is built or driven in another way. Weights are float32 or bfloat16, on the CPU.
        distributed: also the properties of several processes (gloo, on this machine). They start new Python processes, so a
            script that calls this needs ``if __name__ == "__main__":``.
        isolate: run the other properties in a process of their own, too, so that even a crash is only a failed property.
        only: names of the properties to run; None is all.
        time_limit: seconds after which a property counts as an error.
        table: print the table.

    Returns:
        One `Result` per property, in the order of the table.

    Raises:
        ValueError: a name in `only` that is no property, a time limit that is not positive and finite, or isolate=True with
            an optimizer that cannot be sent to another process.
        TypeError: make_optimizer cannot be called.
    """
    adapter = make_optimizer if isinstance(make_optimizer, Adapter) else Adapter(make_optimizer)
    wanted = chosen(adapter, only, time_limit)
    verdicts: dict[str, Verdict] = {}
    elsewhere = why_not_elsewhere(adapter)
    alone: list[Property] = []
    together: list[Property] = []
    for prop in wanted:
        if prop.name in adapter.not_applicable:
            verdicts[prop.name] = "not applicable", adapter.not_applicable[prop.name]
        elif prop.processes == 1:
            alone.append(prop)
        elif not distributed:
            verdicts[prop.name] = "not applicable", "left out: distributed=False"
        elif elsewhere is not None:
            verdicts[prop.name] = "not applicable", elsewhere
        else:
            together.append(prop)
    if isolate and elsewhere is not None:
        raise ValueError(f"isolate=True: {elsewhere}")
    verdicts.update((in_processes if isolate else in_this_process)(adapter, alone, time_limit))
    verdicts.update(in_processes(adapter, together, time_limit))
    results = [Result(prop.name, *verdicts[prop.name], prop.promise) for prop in wanted]
    if table:
        print_table(adapter.name, results)
    return results


def chosen(adapter: Adapter, only: Iterable[str] | None, time_limit: float) -> list[Property]:
    """The properties to run.

    Raises:
        ValueError: a name that is no property, or a time limit that is not positive and finite.
    """
    known = properties()
    wanted = list(known) if only is None else list(only)
    for name in (*wanted, *adapter.not_applicable):
        if name not in known:
            raise ValueError(f"no property is called {name!r}; there are: {', '.join(known)}")
    if not 0 < time_limit < math.inf:
        raise ValueError(f"time_limit={time_limit:g}: use a positive number of seconds")
    return [known[name] for name in wanted]
