"""SAM with one backward pass: the way uphill is estimated from losses at w + mu z and w - mu z."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost import distributed
from fastpost.ops import noise
from fastpost.ops import params as ops
from fastpost.rng import RandomState
from fastpost.sam.step import Gradients
from fastpost.sam.variants import Variant, VariantContext

if TYPE_CHECKING:
    from fastpost.sam.optimizer import SAM


class ZerothOrderSAM(Variant):
    """SAM along a zeroth-order estimate of the gradient, as in AdaZo-SAM (2502.19571): one backward pass a step.

    The direction is d = 1/q sum_j (L(w + mu z_j) - L(w - mu z_j)) / (2 mu) z_j with normal z_j, and e = rho d / |d|; the
    gradient is taken at w + e. Use it where 2 q forward passes cost less than a forward and a backward pass. With few
    probes d is mostly random: with one, e is +-rho z / |z|, to the side on which the loss is larger. AdaZo-SAM is this with
    Adam as the base optimizer; the low-rank part of the paper, LORENZA, is not here::

        zeroth = ZerothOrderSAM()
        opt = SAM(model.parameters(), torch.optim.AdamW, variant=zeroth)
        zeroth.estimate(opt, lambda: loss_of(model, batch))
        opt.step(closure)                              # runs once, at w + e

    Args:
        probes: q, >= 1.
        mu: how far a probe goes, > 0, in the units of a single weight. Weights of 16 bits round it: take more than an ulp.
        seed: key of z, together with the number of the step; the same on all ranks.

    Pipeline stages and experts in plain tensors (`norm_group`) are refused.
    """

    ascent_pass = False
    serves_norm_group = False  # losses are the mean over all ranks, and a stage may have none; z is the same on all stages

    def __init__(self, probes: int = 1, mu: float = 1e-3, seed: int = 0) -> None:
        if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
            raise ValueError(f"ZerothOrderSAM: probes must be a whole number >= 1, not {probes!r}")
        ops.check_real("ZerothOrderSAM", "mu", mu)
        if not (math.isfinite(mu) and mu > 0):
            raise ValueError(f"ZerothOrderSAM: mu must be finite and > 0, not {mu!r}")
        ops.check_whole("ZerothOrderSAM", "seed", seed)
        self.probes, self.mu, self.seed = probes, mu, int(seed)
        self._step = 0
        self._slopes: Tensor | None = None  # (probes,), float64

    @torch.no_grad()
    def estimate(self, optimizer: SAM, loss: Callable[[], Tensor]) -> None:
        """Computes the losses at all probes, before the pass of each step; where the step has no ascent, nothing.

        w comes back bit for bit, and the generators of random numbers go on from where they were, so that all probes and the
        pass after them draw the same dropout masks. Meanwhile one copy of the weights is held. Parameters out of SAM's
        scope move as well. Norm layers with running statistics: call it inside `frozen_norm_stats(model)`.

        Args:
            optimizer: the SAM whose variant this is.
            loss: computes the scalar loss of the step's batch (of a window: over all of it), without backward. It is called
                twice per probe, without gradients. Over the ranks of the default process group it is averaged, unless
                `sync_ascent=False`.

        Raises:
            TypeError: not a SAM, or `loss` is no function or returns something else than a scalar tensor.
            ValueError: the SAM has another variant.
            RuntimeError: the weights are perturbed.
        """
        self._check_optimizer(optimizer)
        if not callable(loss):
            raise TypeError(f"ZerothOrderSAM: loss must be a function that returns a scalar tensor, not {loss!r}")
        if optimizer.is_perturbed:
            raise RuntimeError("ZerothOrderSAM: estimate() while perturbed; it comes before first_step(), at w")
        self.forget()
        if not optimizer.ascends:
            return
        self._step = int(optimizer.param_groups[0]["sam_steps"])
        tensors = list(_moved(optimizer.tensors()))
        kept = [distributed.local(p).clone() for _, p in tensors]
        random = RandomState(optimizer.accelerators())
        slopes = []
        try:
            for probe in range(self.probes):
                values = []
                for sign in (1, -1):
                    for (index, p), w in zip(tensors, kept, strict=True):
                        part = distributed.local(p)
                        start = w if sign > 0 else -w  # w - mu z is -(-w + mu z), to the last bit
                        moved = noise.add_noise(start, self.mu, "normal", seed=self._key(p, index, probe))
                        torch.mul(moved, sign, out=part)
                    _written(p for _, p in tensors)
                    random.put()
                    values.append(_scalar(loss()))
                slopes.append((values[0] - values[1]) / (2 * self.mu))
        finally:
            for (_, p), w in zip(tensors, kept, strict=True):
                distributed.local(p).copy_(w)
            _written(p for _, p in tensors)
            random.put()
        stacked = torch.stack(slopes)
        if distributed.active() and optimizer.sync_ascent is not False:
            dist.all_reduce(stacked)
            stacked /= dist.get_world_size()
        self._slopes = stacked

    def _check_optimizer(self, optimizer: object) -> None:
        from fastpost.sam.optimizer import SAM  # which imports variants

        if not isinstance(optimizer, SAM):
            raise TypeError(
                f"ZerothOrderSAM: estimate() takes the fastpost.SAM whose variant it is, not {type(optimizer).__name__}; "
                "of a wrapper such as Accelerate's give its .optimizer"
            )
        if optimizer.variant is not self:
            raise ValueError(
                f"ZerothOrderSAM: this is not the optimizer's variant, which is a {type(optimizer.variant).__name__}; "
                "build it as SAM(..., variant=zeroth), and of a copy of the optimizer call estimate() of its own variant"
            )

    def direction(self, context: VariantContext, gradients: Gradients) -> Gradients:
        if self._slopes is None:
            raise RuntimeError("SAM: ZerothOrderSAM has no direction: call estimate(optimizer, loss) before each step")
        result: Gradients = {}
        for index, p in _moved(context.tensors()):
            part = distributed.local(p)
            none = torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
            d = torch.zeros_like(none)
            for probe in range(self.probes):
                z = noise.add_noise(none, 1.0, "normal", seed=self._key(p, index, probe))
                d.addcmul_(z, (self._slopes[probe] / self.probes).to(z))
            result[p] = d.to(p.dtype)
        return result

    def forget(self) -> None:
        self._slopes = None

    def _key(self, p: Tensor, index: int, probe: int) -> int:
        """Of z for this rank's part of a parameter; replicas draw the same, parts of one tensor draw their own."""
        key = self.seed
        for number in (self._step, probe, index, distributed.part_number(p)):
            key = (key * 0x5851F42D4C957F2D + number + 1) % 2**63
        return key


def _moved(tensors: Iterable[Tensor]) -> Iterable[tuple[int, Tensor]]:
    """The tensors that probes move, numbered."""
    return ((i, p) for i, p in enumerate(tensors) if p.requires_grad and p.is_floating_point())


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"ZerothOrderSAM: loss must return a scalar tensor, not {found}")
    return value.detach().double().reshape(())


def _written(tensors: Iterable[Tensor]) -> None:
    if distributed.active():
        distributed.reshard(tensors)
    torch.clear_autocast_cache()
