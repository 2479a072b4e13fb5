"""torch.library schema and fake kernel of every operation; the implementation asks dispatch for a backend.

These are the operations as torch sees them (`torch.ops.fastpost.*`): opaque to the compiler, traceable through their fake
kernels. Arguments have been checked by the functions in `fastpost.ops` that call them; autograd lies outside, there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fastpost", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any] | None) -> Any:
    """Registers `fastpost::schema` for all devices; returns the callable of torch.ops.

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
    return getattr(torch.ops.fastpost, name).default
