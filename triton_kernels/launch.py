"""What all launches share: grids that hold any size, and numbers that one float32 does not hold."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_MOST_PROGRAMS = 1 << 21  # of a launch: AMD's count threads in 32 bits, of which a program has up to 1,024


def launches(programs: int) -> Iterator[tuple[int, int]]:
    """Any number of programs along a grid's first dimension: for each launch how many come before it, and its own."""
    for before in range(0, programs, _MOST_PROGRAMS):
        yield before, min(_MOST_PROGRAMS, programs - before)


def in_two_floats(x: float) -> tuple[float, float]:
    """A number as the sum of two that float32 holds, to 2^-48 of it: a launch hands its numbers over in float32."""
    (high,) = struct.unpack("f", struct.pack("f", x))
    (low,) = struct.unpack("f", struct.pack("f", x - high))
    return high, low
