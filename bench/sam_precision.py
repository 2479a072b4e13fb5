"""What 16 bits do to SAM: perturbation, loss rise and second gradient on a pretrained encoder, against float64.

    python -m fastpost.bench.sam_precision [--rho 0.005 0.05 0.15] [--regime bf16 fp16 ...] [--steps 23]

Fine-tunes all-MiniLM-L6-v2 (22M parameters) for a few steps on docstrings in float32, rounds its weights to the regime's
dtype, and takes both of SAM's passes on one batch. The truth comes from the same (rounded) weights in float64. Prints a
table in Markdown; float16 is slow on CPUs that do not compute in it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.bench.studies.tasks import load
from fastpost.bench.studies.tuning import Classifier

Context = Callable[[], contextlib.AbstractContextManager[Any]]
REGIMES: dict[str, tuple[str, torch.dtype, torch.dtype | None]] = {
    "bf16": ("bfloat16 weights", torch.bfloat16, None),
    "fp16": ("float16 weights", torch.float16, None),
    "bf16-autocast": ("float32 weights, bfloat16 autocast", torch.float32, torch.bfloat16),
    "fp16-autocast": ("float32 weights, float16 autocast", torch.float32, torch.float16),
}


class Passes(NamedTuple):
    """Both passes of a step: losses, gradients (flat, float64), and what the report says."""

    loss: float
    gradient: Tensor
    perturbed_loss: float
    perturbed_gradient: Tensor
    report: dict[str, float]


def both_passes(encoder: nn.Module, batch: Any, rho: float, autocast: torch.dtype | None, **options: Any) -> Passes:
    def loss_of() -> Tensor:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            logits = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return nn.functional.cross_entropy(logits.double(), batch["labels"])

    opt = SAM(encoder.parameters(), torch.optim.SGD, rho=rho, lr=0.0, compute_dtype=autocast, **options)
    encoder.zero_grad()
    loss = loss_of()
    loss.backward()
    gradient = _flat(encoder)
    with opt.perturbed():
        perturbed = loss_of()
        perturbed.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it
        report = opt.report
    assert report is not None
    return Passes(loss.item(), gradient, perturbed.item(), _flat(encoder), report.as_dict())


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _error(got: Tensor, truth: Tensor) -> float:
    return ((got - truth).norm() / truth.norm()).item()


def row(name: str, kind: str, rho: float, got: Passes, truth: Passes) -> str:
    r = got.report
    rise = (got.perturbed_loss - got.loss) / (truth.perturbed_loss - truth.loss)
    cells = [
        name, kind, f"{rho:g}", f"{r['stored_norm'] / rho:.2f} / {r['stored_cosine']:.2f}",
        f"{r['seen_norm'] / rho:.2f} / {r['seen_cosine']:.2f}", f"{r['seen_gain']:.2f}", f"{rise:.2f}",
        f"{_error(got.gradient, truth.gradient):.4f}", f"{_error(got.perturbed_gradient, truth.perturbed_gradient):.4f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def kinds(model: nn.Module, masters: list[Tensor], narrow: bool) -> dict[str, dict[str, Any]]:
    """Ways to perturb, with their options."""
    functional = {"functional": {"perturb": "functional", "model": model}}
    if not narrow:
        return {"stored": {}, **functional}
    return {"nearest": {}, "stochastic": {"rounding": "stochastic"}, "masters": {"master_params": masters}, **functional}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What 16 bits do to SAM")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.005, 0.05, 0.15])
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--steps", type=int, default=23, help="AdamW steps before the measurement")
    options = parser.parse_args(arguments)

    task = load("stdlib", None, (256, 64, 64))
    classifier = Classifier(None, len(task.labels))
    tuned = classifier.fresh(0).eval()
    *training, batch = classifier.batches(classifier.encode(task.train, 64), 32, options.steps + 1, 0)
    base = torch.optim.AdamW(tuned.parameters(), lr=2e-4)
    for step in training:
        base.zero_grad()
        tuned(**step).loss.backward()
        base.step()

    print(f"{classifier.parameters:,} parameters, loss {tuned(**batch).loss.item():.3f}\n")
    columns = (
        "computation", "perturbation", "rho", "stored: norm / rho, cosine", "seen: norm / rho, cosine", "gain",
        "loss rise / true", "error of g(w)", "error of g(w + e)",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    masters = [p.detach().clone() for p in tuned.parameters()]
    for regime in options.regime:
        name, dtype, autocast = REGIMES[regime]
        model = copy.deepcopy(tuned).to(dtype)
        exact = copy.deepcopy(model).double()
        for rho in options.rho:
            truth = both_passes(exact, batch, rho, None)
            for kind, more in kinds(model, masters, dtype != torch.float32).items():
                print(row(name, kind, rho, both_passes(model, batch, rho, autocast, **more), truth), flush=True)


if __name__ == "__main__":
    main()
