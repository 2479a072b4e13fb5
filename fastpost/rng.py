"""Random number states of the CPU and of accelerators, so that a second pass can draw what the first one drew.

NumPy's and Python's generators are among them: speech models draw the masks of SpecAugment from NumPy's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

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
        self._numpy, self._python = np.random.get_state(), random.getstate()
        self._others: list[tuple[torch.device, Tensor]] = []
        for device in devices:
            self._others.append((device, torch.get_device_module(device).get_rng_state(device)))

    def put(self) -> None:
        """Makes the generators go on from here."""
        torch.set_rng_state(self._cpu)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
        for device, state in self._others:
            torch.get_device_module(device).set_rng_state(state, device)


def accelerators(tensors: Iterable[Tensor]) -> list[torch.device]:
    """The devices, other than the CPU, that these tensors live on."""
    return sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)
