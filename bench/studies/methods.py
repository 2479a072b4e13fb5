"""Training steps of every method that the studies compare, all around the same AdamW."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpost import R3F, R4F, SAM, add_noise, symmetric_kl
from fastpost.bench.studies.tuning import Batch
from fastpost.r3f.relatives import NEFTune, RDrop
from fastpost.r3f.spectral import find_classifier
from fastpost.sam import TRAM, SAMWindow

PLAIN = "adamw"
WEIGHT_DECAY = 0.01
# What distinguishes a method's runs besides the learning rate; first the value that its paper uses. R3F and R4F: noise and
# weight of the KL, where 0.1 and 0.1 are those of 2310.03646; TRAM: the noise that its radius is measured with.
STRENGTHS: dict[str, tuple[dict[str, float], ...]] = {
    PLAIN: ({},),
    "sam": ({"rho": 0.05}, {"rho": 0.15}, {"rho": 0.02}),
    "asam": ({"rho": 0.5}, {"rho": 0.2}, {"rho": 1.0}),
    "sam_lm": ({"rho": 0.15}, {"rho": 0.05}, {"rho": 0.3}),
    "r3f": ({"eps": 1e-5, "lam": 1.0}, {"eps": 0.1, "lam": 0.1}, {"eps": 1e-5, "lam": 5.0}),
    "r4f": ({"eps": 1e-5, "lam": 1.0}, {"eps": 0.1, "lam": 0.1}, {"eps": 1e-5, "lam": 5.0}),
    "rdrop": ({"alpha": 1.0}, {"alpha": 5.0}, {"alpha": 0.3}),
    "tram": ({"eps": 0.1}, {"eps": 0.01}, {"eps": 1.0}),
}
# For language models, whose weights may be 16-bit; "bf16" in a name says that they are.
LANGUAGE: dict[str, tuple[dict[str, float], ...]] = {
    PLAIN: ({},),
    "sam": ({"rho": 0.05}, {"rho": 0.15}, {"rho": 0.02}),
    "sam_bf16_nearest": ({"rho": 0.05}, {"rho": 0.15}, {"rho": 0.02}),
    "sam_bf16_stochastic": ({"rho": 0.05}, {"rho": 0.15}, {"rho": 0.02}),
    "sam_bf16_masters": ({"rho": 0.05}, {"rho": 0.15}, {"rho": 0.02}),
    "sam_bf16_functional": ({"rho": 0.05}, {"rho": 0.15}, {"rho": 0.02}),
    "adamw_bf16": ({},),
    "r3f": ({"eps": 0.1, "lam": 0.1}, {"eps": 0.01, "lam": 1.0}, {"eps": 1e-5, "lam": 1.0}),
    "r3f_fused": ({"eps": 0.1, "lam": 0.1}, {"eps": 0.01, "lam": 1.0}, {"eps": 1e-5, "lam": 1.0}),
    "neftune": ({"alpha": 5.0}, {"alpha": 1.0}, {"alpha": 15.0}),
}
SAM_LM_PARTS = 4  # micro-batches of a SAM-LM step, of which the first is the ascent's

Precision = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class Stepper:
    """A model with what trains it; `step(batch)` makes one update and returns its first loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Batch], Tensor]
    sam: SAM | None = None


def grouped(model: Any, lr: float, head_rate: float) -> list[dict[str, Any]]:
    """Two parameter groups: what was pretrained, and the head with the pooler before it, which start from nothing."""
    new = [find_classifier(model), getattr(model.base_model, "pooler", None)]
    head = {id(p): p for module in new if module is not None for p in module.parameters()}
    body = [p for p in model.parameters() if id(p) not in head]
    return [{"params": body, "lr": lr}, {"params": list(head.values()), "lr": lr * head_rate}]


def build(
    method: str, model: Any, groups: list[dict[str, Any]], strength: dict[str, float], precision: Precision
) -> Stepper:
    """A method's training step.

    Args:
        method: one of STRENGTHS or LANGUAGE.
        model: a transformers model whose batches hold labels; of the dtype that the method's name says.
        groups: AdamW's parameter groups with their learning rates.
        strength: the method's own constants.
        precision: opens the context that forward passes run in.
    """
    adamw: Any = torch.optim.AdamW
    keywords = {"weight_decay": WEIGHT_DECAY, "fused": True}
    if method == "r4f":
        R4F(find_classifier(model), layers="last")
    if method.startswith(("sam", "asam", "tram")):
        adaptive = method in ("asam", "tram")
        more: dict[str, Any] = {"variant": TRAM(), "rho": 1.0} if method == "tram" else {"rho": strength["rho"]}
        if method == "sam_lm":
            more["ascent_fraction"] = 1 / SAM_LM_PARTS
        elif method == "sam_bf16_stochastic":
            more["rounding"] = "stochastic"
        elif method == "sam_bf16_functional":
            more.update(perturb="functional", model=model)
        elif method == "sam_bf16_masters":
            more["master_params"] = [p.detach().float() for group in groups for p in group["params"]]
        sam = SAM(groups, adamw, adaptive=adaptive, eta=0.01 if adaptive else 0.0, **more, **keywords)
        return Stepper(model, sam, _sam_step(method, model, sam, strength, precision), sam)
    optimizer = adamw(groups, **keywords)
    loss_of = _loss(method, strength)

    def step(batch: Batch) -> Tensor:
        with precision():
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Stepper(model, optimizer, step)


def _loss(method: str, strength: dict[str, float]) -> Callable[[Any, Batch], Tensor]:
    if method in (PLAIN, "adamw_bf16"):
        return lambda model, batch: model(**batch).loss
    if method in ("r3f", "r4f", "r3f_fused"):
        fused = method == "r3f_fused"
        regularised: Any = R3F(eps=strength["eps"], r3f_lambda=strength["lam"], fused_linear=fused)
    elif method == "rdrop":
        regularised = RDrop(strength["alpha"])
    elif method == "neftune":
        regularised = NEFTune(strength["alpha"])
    else:
        raise ValueError(f"studies: no method is called {method!r}")
    return lambda model, batch: regularised(model, **batch).loss


def _sam_step(
    method: str, model: Any, sam: SAM, strength: dict[str, float], precision: Precision
) -> Callable[[Batch], Tensor]:
    if method == "sam_lm":
        window = SAMWindow(sam, lambda part: _of_part(model, part, precision))

        def windowed(batch: Batch) -> Tensor:
            losses = window.run(_split(batch))
            sam.step()
            return torch.stack(losses).sum()

        return windowed

    def step(batch: Batch) -> Tensor:
        def closure() -> Tensor:
            with precision():
                out = model(**batch)
            if method == "tram" and not sam.is_perturbed:
                sam.variant.observe(_moved(model, batch, out.logits, strength["eps"], precision))
            out.loss.backward()
            return out.loss

        loss: Tensor = sam.step(closure)
        return loss.detach()

    return step


def _split(batch: Batch) -> list[tuple[Batch, float]]:
    """Micro-batches, which are views, with their shares of the batch."""
    rows = len(batch["labels"])
    pieces = [value.tensor_split(min(SAM_LM_PARTS, rows)) for value in batch.values()]
    parts = [dict(zip(batch, values, strict=True)) for values in zip(*pieces, strict=True)]
    return [(part, len(part["labels"]) / rows) for part in parts]


def _of_part(model: Any, part: tuple[Batch, float], precision: Precision) -> Tensor:
    batch, share = part
    with precision():
        loss = model(**batch).loss * share
    loss.backward()
    return loss.detach()


@torch.no_grad()
def _moved(model: Any, batch: Batch, logits: Tensor, eps: float, precision: Precision) -> Tensor:
    """TRAM's divergence: symmetric KL between the predictions on clean and on noised embeddings (2310.03646, d_x)."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "input_ids")}
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with precision():
        noised = model(inputs_embeds=add_noise(embedded, eps), **inputs).logits
    return symmetric_kl(logits.detach().float(), noised.float(), reduction="mean")


def autocast(device: str, dtype: str) -> Precision:
    """A function that opens autocast to `dtype`, or nothing where that is "float32"; weights stay float32."""
    if dtype == "float32":
        return contextlib.nullcontext
    kind = device.partition(":")[0]
    return lambda: torch.autocast(kind, getattr(torch, dtype))
