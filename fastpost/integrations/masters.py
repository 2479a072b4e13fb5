"""float32 masters in the optimizer of a trainer, in the place of its model's 16-bit weights."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpost.sam.perturbation.masters import SERVED

NAME = "sam_master"  # under which a master lies in the optimizer's state, to be saved with it


class Masters:
    """Puts a float32 copy of each weight into the optimizer's groups; what the optimizer steps and saves are the copies.

    The weights follow after each step, which `ExternalSAM` sees to. A master is saved in its own state, so that a resumed
    run goes on with the same bits; without one it begins from its weight.

    Args:
        optimizer: over the model's 16-bit weights, before its first step. Its groups stay the same dictionaries.

    Attributes:
        weights, masters: in the order of the groups.

    Raises:
        ValueError: the optimizer has made steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if optimizer.state:
            raise ValueError(
                "sam_masters: the optimizer has made steps with the weights themselves; set trainer.optimizer to None, so "
                "that the trainer makes another, or leave sam_masters as it was"
            )
        self.optimizer = optimizer
        self.weights: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.masters = [nn.Parameter(w.detach().float()) for w in self.weights]
        of = {id(w): m for w, m in zip(self.weights, self.masters, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [of[id(w)] for w in group["params"]]
        mine = weakref.ref(self)

        def keep(optimizer: Any, *_: Any) -> None:
            if (here := mine()) is not None:
                here.keep()

        def take(optimizer: Any) -> None:
            if (here := mine()) is not None:
                here.take()

        optimizer.register_step_post_hook(keep)
        optimizer.register_load_state_dict_post_hook(take)

    def keep(self) -> None:
        """After a step: masters are in the state, beside what the optimizer has made there."""
        for m in self.masters:
            if m in self.optimizer.state or m.grad is not None:  # plain SGD keeps nothing of its own
                self.optimizer.state[m][NAME] = m.data

    @torch.no_grad()
    def take(self) -> None:
        """After loading a state: masters are those in it."""
        for m in self.masters:
            saved = self.optimizer.state[m].get(NAME) if m in self.optimizer.state else None
            if saved is not None:
                m.copy_(saved)
                self.optimizer.state[m][NAME] = m.data

    @torch.no_grad()
    def follow(self) -> None:
        """Masters of weights that somebody else has written begin from these."""
        for w, m in zip(self.weights, self.masters, strict=True):
            if not torch.equal(m.to(w.dtype).view(torch.int16), w.detach().view(torch.int16)):
                m.copy_(w)


def check_weights(model: nn.Module) -> None:
    """Raises ValueError unless all weights that are trained have 16 bits."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype not in SERVED:
            raise ValueError(
                f"sam_masters: {name} is {p.dtype}, and masters are of 16-bit weights; load the model in bfloat16, or leave "
                "sam_masters out: float32 weights are masters themselves where bf16=True computes with their casts"
            )
