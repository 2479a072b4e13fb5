"""Triton's interpreter, made to hand a kernel its numbers as a launch on a device does: floats in float32.

Left alone it gives Python's doubles, and what a device would have rounded shows in no test.
"""

from __future__ import annotations

import os
from typing import Any


def enabled() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def activate() -> None:
    """For all kernels of this process."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._implicit_cvt

    def converted(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
        return plain(argument)

    interpreter._implicit_cvt = converted
