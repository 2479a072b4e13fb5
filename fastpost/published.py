"""The published formulas and loops as they stand, in plain torch: what fastpost is compared with.

Written from the papers' equations and the behaviour of the implementations named, never optimised and never used by fastpost
itself. Benches, studies, tests and the conformance suite share them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def fairseq_symmetric_kl(noised_logits: Tensor, logits: Tensor) -> Tensor:
    """KL in both directions as fairseq's R3F criteria write it: two kl_div over float32 softmaxes, summed over every
    element, divided by the first dimension.

    Args:
        noised_logits, logits: (rows, classes) or (batch, time, classes).
    """
    noised_log, clean_log = (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (noised_logits, logits))
    noised_p, clean_p = (F.softmax(x, dim=-1, dtype=torch.float32) for x in (noised_logits, logits))
    forward = F.kl_div(noised_log, clean_p, reduction="sum")
    backward = F.kl_div(clean_log, noised_p, reduction="sum")
    return (forward + backward) / noised_logits.size(0)


def r3f_sentence_loss(
    model: Any, batch: dict[str, Tensor], eps: float, r3f_lambda: float, noise_type: str = "uniform"
) -> Tensor:
    """One loss as fairseq's `sentence_prediction_r3f` puts it together, for a transformers classifier.

    The embeddings are looked up on their own, detached and noised; then both passes run, and the sums over the batch of
    cross-entropy and KL are divided by its size.

    Args:
        model: returns `.logits` (batch, classes); takes `input_ids` or `inputs_embeds`.
        batch: `input_ids`, `labels` (batch,) and what else the model takes.
        eps, r3f_lambda, noise_type: as in `fastpost.R3F`.
    """
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    noised_embeddings = distributions_noise(embeddings.detach().clone(), eps, noise_type)
    logits = model(input_ids=batch["input_ids"], **inputs).logits
    noised_logits = model(inputs_embeds=noised_embeddings, **inputs).logits
    size = batch["labels"].numel()
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    task = F.nll_loss(log_probabilities, batch["labels"], reduction="sum")
    loss: Tensor = (task + r3f_lambda * size * fairseq_symmetric_kl(noised_logits, logits)) / size
    return loss


def r3f_language_model_loss(
    model: Any, batch: dict[str, Tensor], eps: float, r3f_lambda: float, noise_type: str = "uniform"
) -> Tensor:
    """One loss as fairseq's `label_smoothed_cross_entropy_r3f` puts it together, for a causal language model.

    Args:
        model: returns `.logits` (batch, time, vocabulary).
        batch: `input_ids` and `labels`, both (batch, time) without padding.
        eps, r3f_lambda, noise_type: as in `fastpost.R3F`.
    """
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    noised = distributions_noise(embeddings.detach().clone(), eps, noise_type)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    noised_logits = model(inputs_embeds=noised).logits[:, :-1].flatten(0, 1)
    task = F.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    loss: Tensor = task + r3f_lambda * fairseq_symmetric_kl(noised_logits, logits)
    return loss


def spectral_norm_last(head: nn.Module) -> None:
    """R4F as released: torch's power-iteration spectral norm, one step per training forward, on the head's last layer."""
    last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
    nn.utils.spectral_norm(last)


def gap_ascent(
    model: Any, input_ids: Tensor, n_steps: int, lr: float = 5e-5, betas: tuple[float, float] = (0.9, 0.98)
) -> tuple[dict[str, Tensor], list[float]]:
    """GAP as released, without its evaluations: a copy of the state to come back to, then Adam on the loss times -1.

    Args:
        model: a transformers causal language model; left in eval mode (the release loads it with dropout 0).
        input_ids: (1, T) without padding.

    Returns:
        The copied state_dict, and the text's loss before each step.
    """
    start = copy.deepcopy(model.state_dict())
    model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=betas)
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = model(input_ids=input_ids, labels=input_ids).loss
        (loss * -1).backward()
        losses.append(loss.item())
        optimizer.step()
    return start, losses
