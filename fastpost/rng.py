"""Random number states of the CPU and of accelerators, so that a second pass can draw what the first one drew.

NumPy's and Python's generators are among them: speech models draw the masks of SpecAugment from NumPy's.
"""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """The states of the default generators of torch, NumPy and Python at the time of construction.

    Args:
        devices: accelerator devices to include beside the CPU.
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._cpu = torch.get_rng_state()
        self._numpy, self._python = _numpy_state(), random.getstate()
        self._others: list[tuple[torch.device, Tensor]] = []
        for device in devices:
            self._others.append((device, torch.get_device_module(device).get_rng_state(device)))

    def put(self) -> None:
        """Makes the generators go on from here."""
        torch.set_rng_state(self._cpu)
        _set_numpy_state(self._numpy)
        random.setstate(self._python)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


# NumPy takes as long to read or write its state as a small network to compute. So what was read last is kept, with the
# words of the generator as they lie in memory: while these are the same, nothing was drawn. A second normal that NumPy has
# made and not handed out yet lies elsewhere, and drawing it leaves the words alone; a state that has one is not kept.
_last_read: tuple[bytes, Any] | None = None
_WORDS = 4 * 624  # bytes of the Mersenne Twister's words; its position among them follows, 4 bytes


def _numpy_words() -> bytes | None:
    """The words and the position of NumPy's global generator; None where it is no Mersenne Twister."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _WORDS + 4)


def _numpy_state() -> Any:
    global _last_read
    words, last = _numpy_words(), _last_read
    if words is None:
        return np.random.get_state(legacy=False)
    if last is not None and last[0] == words:
        return last[1]
    state: Any = np.random.get_state()
    _, key, position, has_normal, _ = state
    known = key.tobytes() + int(position).to_bytes(4, sys.byteorder) == words  # as this NumPy lays them out
    _last_read = (words, state) if known and not has_normal else None
    return state


def _set_numpy_state(state: Any) -> None:
    global _last_read
    last = _last_read
    if last is None or last[1] is not state or last[0] != _numpy_words():  # else nothing was drawn since
        np.random.set_state(state)
        _last_read = None


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices, other than the CPU, that these tensors live on."""
    return sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)
