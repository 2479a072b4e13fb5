"""The published formulas and loops as they stand, in plain torch: what fastpost is compared with.

Written from the papers' equations and the behaviour of the implementations named, never optimised and never used by fastpost
itself. Benches, tests and `fastpost compare` share them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class PublishedSAM:
    """The loop that most PyTorch projects carry a copy of (davda54/sam's form of 2010.01412 and 2102.11600).

    One small operation after another per tensor; restoring assigns `p.data`, so parameters change their address at
    every step.

    Args:
        params: parameters with gradients.
        base_optimizer: steps with the second gradient.
        rho: radius.
        adaptive: ASAM without eta.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: torch.optim.Optimizer | None,
        rho: float = 0.05,
        adaptive: bool = False,
    ) -> None:
        self.params = list(params)
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.adaptive = adaptive
        self._kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        norms = [((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.params if p.grad is not None]
        scale = self.rho / (torch.stack(norms).norm(p=2) + 1e-12)
        for p in self.params:
            if p.grad is None:
                continue
            self._kept[p] = p.data.clone()
            p.add_((p.square() if self.adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def restore(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self._kept[p]

    def second_step(self) -> None:
        self.restore()
        if self.base_optimizer is not None:
            self.base_optimizer.step()


@torch.no_grad()
def foreach_sam_perturb(params: list[Tensor], grads: list[Tensor], stash: list[Tensor], rho: float) -> None:
    """SAM's ascent from torch's own multi-tensor operations, into stashes allocated beforehand."""
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    torch._foreach_copy_(stash, params)
    scale: Tensor = rho / (norm + 1e-12)
    torch._foreach_add_(params, torch._foreach_mul(grads, scale))


@torch.no_grad()
def foreach_sam_restore(params: list[Tensor], stash: list[Tensor]) -> None:
    """The way back from `foreach_sam_perturb`."""
    torch._foreach_copy_(params, stash)


def distributions_noise(x: Tensor, eps: float, noise_type: str) -> Tensor:
    """R3F's noise as released (fairseq): sampled by torch.distributions on the CPU, then moved and added."""
    if noise_type == "uniform":
        sampler: torch.distributions.Distribution = torch.distributions.Uniform(low=-eps, high=eps)
    else:
        sampler = torch.distributions.Normal(loc=0.0, scale=eps)
    return x + sampler.sample(sample_shape=x.shape).to(x)
