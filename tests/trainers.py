"""What tests of transformers' Trainer share: data, a trainer in a fixed order, SAM's step from its equations."""

from __future__ import annotations

import contextlib
import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from fastpost.integrations.transformers import PostTrainingArguments

from .by_hand import ascended, gsam, rows_of_text, stable_sam

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch, float], Tensor]
BATCH = 2
RHO, LR, CLIP, DECAY = 0.2, 1e-2, 0.5, 0.05


def rows(kind: str = "causal", number: int = 20, time: int = 9) -> list[Batch]:
    """Real text, letter by letter, with labels of which some do not count, so that micro-batches weigh differently."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i, ids in enumerate(rows_of_text(number, time)):
        if kind == "sequence":
            label = torch.randint(0, 3, (), generator=generator)
        else:
            label = torch.where(torch.arange(time) < 2 + i % 6, -100, ids)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label})
    return found


class InOrder:
    """Takes the data as they come."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def arguments(folder: Any, steps: int = 20, cls: Any = PostTrainingArguments, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "sam_rho": RHO,
    }
    return cls(str(folder), **{**settings, **options})


def trainer_of(cls: type, model: nn.Module, args: Any, data: Any = None, **options: Any) -> Any:
    ordered = type(f"InOrder{cls.__name__}", (InOrder, cls), {})
    return ordered(model, args, train_dataset=rows() if data is None else data, **options)


def stacked(part: Iterable[Batch]) -> Batch:
    part = list(part)
    return {name: torch.stack([row[name] for row in part]) for name in part[0]}


def windows(data: list[Batch], accumulation: int, steps: int, ranks: int = 1) -> list[list[list[Batch]]]:
    """The micro-batches of each step, a list per rank; batch i is of rank i % ranks; an epoch's last window is short."""
    batches = [stacked(data[i : i + BATCH]) for i in range(0, len(data), BATCH)]
    per_rank = [batches[rank::ranks] for rank in range(ranks)]
    epoch = [[mine[i : i + accumulation] for mine in per_rank] for i in range(0, len(per_rank[0]), accumulation)]
    return [epoch[step % len(epoch)] for step in range(steps)]


def causal_loss(model: nn.Module, batch: Batch, items: float) -> Tensor:
    """Cross-entropy of the next token, over the number of labels that count in the whole step."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / items


def exact(model: Any) -> Any:
    """The model with a loss in its own dtype; transformers' is float32 whatever the model is."""

    def loss_function(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **further: Any) -> Tensor:
        flat, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return nn.functional.cross_entropy(flat, labels, reduction="sum") / items

    loss_function.__name__ = "ForCausalLMLoss"  # by which R3F knows that it shifts
    model.loss_function = loss_function
    return model


def items_of(window: list[list[Batch]], shift: bool = True) -> int:
    labels = [batch["labels"][:, 1:] if shift else batch["labels"] for mine in window for batch in mine]
    return int(sum((part != -100).sum() for part in labels))


def optimizer_of(model: nn.Module, decay: float = DECAY) -> torch.optim.Optimizer:
    """The Trainer's: no decay for biases and norms."""
    free = [p for name, p in model.named_parameters() if "bias" in name or "ln_" in name or "norm" in name.lower()]
    ids = {id(p) for p in free}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return torch.optim.AdamW([{"params": rest, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}], lr=LR)


def by_hand(
    model: nn.Module,
    steps: list[list[list[Batch]]],
    loss: Loss = causal_loss,
    *,
    rho: float = RHO,
    fraction: float = 1.0,
    clip: float = CLIP,
    shift: bool = True,
) -> list[float]:
    """SAM from its equations, over whole windows of all ranks; returns the norm of each second gradient."""
    opt, norms = optimizer_of(model), []
    model.train()
    params = list(model.parameters())
    for window in steps:
        items = items_of(window, shift)
        n = len(window[0])
        ascent = [batch for mine in window for batch in mine[: math.ceil(fraction * n)]]
        g = torch.autograd.grad(sum(loss(model, batch, items) for batch in ascent), params)
        with ascended(params, g, rho):
            second = torch.autograd.grad(sum(loss(model, batch, items) for mine in window for batch in mine), params)
        for p, part in zip(params, second, strict=True):
            p.grad = part.clone()
        norms.append(float(nn.utils.clip_grad_norm_(params, clip)))
        opt.step()
    return norms


def variant_by_hand(
    model: nn.Module,
    steps: list[list[list[Batch]]],
    kind: str,
    fraction: float,
    divisor: Callable[[Batch], float] | None = None,
) -> nn.Module:
    """The model, trained by a variant whose g at w is over some micro-batches of each window: their mean over labels.

    Args:
        kind: "wsam" (gamma 0.8), "gsam" (alpha 0.4), "stablesam", "friendlysam" (sigma 0.8, decay 0.6).
        divisor: by which a micro-batch's loss is divided; None: the labels of the whole window. g then is the ascent's
            gradient over the part that its labels are of the sum of loss weights.
    """
    opt, params = optimizer_of(model), list(model.parameters())
    mean = torch.zeros(sum(p.numel() for p in params), dtype=torch.float64)

    def gradient(batches: list[Batch], by: Callable[[Batch], float]) -> Tensor:
        loss = sum(causal_loss(model, batch, by(batch)) for batch in batches)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, params)])

    for window in steps:
        everything = [batch for mine in window for batch in mine]
        ascent = [batch for mine in window for batch in mine[: math.ceil(fraction * len(mine))]]
        items = items_of(window)
        by = divisor or (lambda batch, items=items: items)
        g = gradient(ascent, by) / sum(items_of([[batch]]) / by(batch) for batch in ascent)
        mean = 0.6 * mean + 0.4 * g
        direction = g - 0.8 * mean if kind == "friendlysam" else g
        with ascended(params, _like(params, direction), RHO):
            h = gradient(everything, by)
        made = {
            "wsam": lambda g=g, h=h: g + 0.8 / (1 - 0.8) * (h - g),
            "gsam": lambda g=g, h=h: gsam(g, h, 0.4),
            "stablesam": lambda g=g, h=h: stable_sam(g, h),
            "friendlysam": lambda h=h: h,
        }[kind]()
        for p, part in zip(params, _like(params, made), strict=True):
            p.grad = part.clone()
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
    return model


VARIANTS = {
    "wsam": "wsam:gamma=0.8",
    "gsam": "gsam:alpha=0.4",
    "stablesam": "stablesam",
    "friendlysam": "friendlysam:sigma=0.8,decay=0.6",
}


def _like(params: list[Tensor], vector: Tensor) -> list[Tensor]:
    return [part.view_as(p) for p, part in zip(params, vector.split([p.numel() for p in params]), strict=True)]


Streams = Callable[[nn.Module, Batch, int, int], list[Tensor]]


def logits_alone(model: nn.Module, batch: Batch, step: int, seen: int) -> list[Tensor]:
    return [model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits]


def cross_entropy_of(streams: list[Tensor], batch: Batch, items: int) -> Tensor:
    """Of the first stream, next tokens, over the number of labels that count in the whole step."""
    labels = batch["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(streams[0][:, :-1].flatten(0, 1), labels, reduction="sum") / items


def functional_sam_by_hand(
    model: nn.Module,
    steps: list[list[list[Batch]]],
    preconditioned: bool = False,
    *,
    interval: int = 1,
    streams: Streams = logits_alone,
    loss: Callable[[list[Tensor], Batch, int], Tensor] = cross_entropy_of,
) -> nn.Module:
    """The model, trained by J(w + e)^T dL/dz(w) over windows of all ranks; e along g, or along g over the root of AdamW's
    second moment.

    Args:
        interval: e is 0 except on every `interval`-th step.
        streams: z, as tensors of logits, from the number of the step and of tokens before this batch in it.
        loss: a micro-batch's share of L, from z and the number of labels that count in the window.
    """
    opt, params = optimizer_of(model), list(model.parameters())
    for step, window in enumerate(steps):
        batches, items = [batch for mine in window for batch in mine], items_of(window)
        starts = [sum(b["input_ids"].numel() for b in batches[:k]) for k in range(len(batches))]
        kept, g = [], [torch.zeros_like(p) for p in params]
        for batch, seen in zip(batches, starts, strict=True):
            z = streams(model, batch, step, seen)
            dz = torch.autograd.grad(loss(z, batch, items), z, retain_graph=True)
            kept.append(dz)
            g = [a + b for a, b in zip(g, torch.autograd.grad(z, params, dz), strict=True)]
        if preconditioned:
            g = [part / _scale_of(opt, p) for p, part in zip(params, g, strict=True)]
        moves = step % interval == 0 and any(bool(part.any()) for part in g)
        with ascended(params, g, RHO) if moves else contextlib.nullcontext():
            z = [part for batch, seen in zip(batches, starts, strict=True) for part in streams(model, batch, step, seen)]
            second = torch.autograd.grad(z, params, [part for dz in kept for part in dz])
        for p, part in zip(params, second, strict=True):
            p.grad = part
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
    return model


def _scale_of(opt: torch.optim.Optimizer, p: Tensor) -> Tensor:
    """sqrt(v / (1 - beta2^t)) + eps of AdamW; infinite where v is 0 or not there yet."""
    state, group = opt.state[p], opt.param_groups[0]
    if not state:
        return torch.full_like(p, math.inf)
    v = state["exp_avg_sq"]
    root = (v / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
    return torch.where(v > 0, root, math.inf)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def logged(trainer: Trainer, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]
