"""The random state of a forward pass, so that a second pass can draw the same numbers (dropout masks)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RngState:
    """State of torch's CPU generator and of the default generator of every other device in use."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def capture(cls, devices: Iterable[torch.device]) -> RngState:
        others = {d for d in devices if d.type not in ("cpu", "meta")}
        states = {d: torch.get_device_module(d.type).get_rng_state(d) for d in others}
        return cls(torch.get_rng_state(), states)

    def replay(self) -> None:
        """Puts every generator back to where it was captured."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device.type).set_rng_state(state, device)
