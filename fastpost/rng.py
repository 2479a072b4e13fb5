"""Random number states of the CPU and of accelerators, so that a second pass can draw what the first one drew; and seeds.

NumPy's and Python's generators are among them: speech models draw the masks of SpecAugment from NumPy's.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_of(seed: int, step: int, part: int = 0) -> int:
    """The seed of one step's random numbers, or of a part of them (a layer), in [0, 2^64).

    Seeds near each other, such as 0, 1 and 2 of repeated runs, have no step in common, as they would with `seed + step`.

    Args:
        seed: of the run; that of step 0, part 0.
        step: from 0. part: from 0.
    """
    # NumPy's integers would overflow.
    return (int(seed) + int(step) * 0x9E3779B97F4A7C15 + int(part) * 0xD1B54A32D192ED03) % 2**64


def stream_seed(*numbers: int) -> int:
    """A seed below 2^63 for the stream that any numbers name, in this order: a hash, for torch's generators.

    (`seed_of` keeps the seed of step 0, and is for counter-based kernels.)
    """
    name = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


class RandomState:
    """The states of the default generators of torch, NumPy and Python at the time of construction.

    Args:
        devices: accelerator devices to include beside the CPU.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._twisters = [(twister, twister.state()) for twister in (_numpy, _python)]
        self._others: list[tuple[torch.device, Tensor]] = []
        for device in devices:
            self._others.append((device, torch.get_device_module(device).get_rng_state(device)))

    def put(self) -> None:
        """Makes the generators go on from here."""
        torch.set_rng_state(self._cpu)
        for twister, state in self._twisters:
            twister.put(state)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


class _Twister:
    """A global Mersenne Twister of NumPy or Python.

    Reading or writing its state takes them as long as a small network computes. So what was read last is kept, with the
    words of the generator as they lie in memory: while these are the same, nothing was drawn.

    Args:
        words: returns these words and the position among them; None where they do not say all, as where a second normal
            waits to be handed out, or where nobody knows where they lie.
        read: returns the state, and what `words` has to return for it. Where it returns anything else nothing is kept.
        write: makes a state the generator's.
    """

    def __init__(
        self,
        words: Callable[[], bytes | None],
        read: Callable[[], tuple[Any, bytes | None]],
        write: Callable[[Any], None],
    ) -> None:
        self._words, self._read, self._write = words, read, write
        self._last: tuple[bytes, Any] | None = None

    def state(self) -> Any:
        words, last = self._words(), self._last
        if words is not None and last is not None and last[0] == words:
            return last[1]
        state, expected = self._read()
        self._last = None if words is None or words != expected else (words, state)
        return state

    def put(self, state: Any) -> None:
        last = self._last
        if last is None or last[1] is not state or last[0] != self._words():  # else nothing was drawn since
            self._last = None
            self._write(state)


_WORDS = 4 * 624  # bytes of a Mersenne Twister's words


def _numpy_words() -> bytes | None:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _WORDS + 4)  # the position follows


def _read_numpy() -> tuple[Any, bytes | None]:
    if _numpy_words() is None:
        return np.random.get_state(legacy=False), None
    state: Any = np.random.get_state()
    _, key, position, has_normal, _ = state
    return state, None if has_normal else key.tobytes() + int(position).to_bytes(4, sys.byteorder)


def _python_words() -> bytes | None:
    generator: Any = getattr(random.getstate, "__self__", None)
    if (
        sys.implementation.name != "cpython"
        or type(generator) is not random.Random
        or vars(generator)["gauss_next"] is not None
    ):
        return None
    return ctypes.string_at(id(generator) + object.__basicsize__, 4 + _WORDS)  # after the header; the position is first


def _read_python() -> tuple[Any, bytes | None]:
    state: Any = random.getstate()
    *words, position = state[1]
    return state, struct.pack(f"=i{len(words)}I", position, *words)


_numpy = _Twister(_numpy_words, _read_numpy, lambda state: np.random.set_state(state))
_python = _Twister(_python_words, _read_python, lambda state: random.setstate(state))


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices, other than the CPU, that these tensors live on."""
    found = {t.device for t in tensors}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)
