"""torch.library schema and fake kernel of every operation; the implementation asks dispatch for a backend.

These are the operations as torch sees them (`torch.ops.fastpost.*`): opaque to the compiler, traceable through their fake
kernels. Arguments have been checked by the functions in `fastpost.ops` that call them; autograd lies outside, there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.compiler import is_dynamo_compiling

from fastpost.backends import native

_library = torch.library.Library("fastpost", "DEF")  # type: ignore[no-untyped-call]


def eager(args: tuple[Any, ...]) -> bool:
    """Whether a call with these arguments can do without torch: nothing compiles, transforms, traces or records it, no mode
    or profiler is on, and all tensors are plain ones.

    Args:
        args: tensors, lists of tensors and anything else.
    """
    return not is_dynamo_compiling() and native.failure() is None and not native.core().needs_dispatcher(args)


Function = TypeVar("Function", bound=Callable[..., Any])


def without_grad(function: Function) -> Function:
    """The function, called without autograd recording, as by `torch.no_grad()`, whose Python takes as long as several small
    kernels. For whatever a step calls.

    The core turns autograd off and on again, past torch's modes: neither an interrupt nor a mode's error can leave it
    off. Without the core, and in what is compiled, it is `torch.no_grad()`.
    """
    through_torch = torch.no_grad()(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling() or native.failure() is not None:
            return through_torch(*args, **kwargs)
        return native.core().without_grad(function, args, kwargs)

    return cast("Function", called)


class Operation:
    """An operation of `torch.ops.fastpost`, whose eager calls go straight to the implementation.

    torch's way there takes several times as long as a small kernel.
    """

    def __init__(self, overload: Any, implementation: Callable[..., Any]) -> None:
        self.overload = overload
        self._implementation = implementation

    def __call__(self, *args: Any) -> Any:
        return self._implementation(*args) if eager(args) else self.overload(*args)


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None) -> Operation:
    """Registers `fastpost::schema` for all devices.

    Args:
        schema: name and signature; `(a!)` marks what is written.
        implementation: runs the operation on real tensors.
        fake: shapes and dtypes only; None for operations that return nothing.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    if fake is None:
        torch.library.register_fake(f"fastpost::{name}", lambda *args, **kwargs: None, lib=_library)
    else:
        torch.library.register_fake(f"fastpost::{name}", fake, lib=_library)
    return Operation(getattr(torch.ops.fastpost, name).default, implementation)
