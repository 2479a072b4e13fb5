"""What eps and dropout do in R3F: the divergence and its gradient on a pretrained encoder, eps from 1e-7 to 1.

    python -m fastpost.bench.r3f_what_moves [--output docs/r3f-what-moves.png] [--csv bench/data/r3f-what-moves.csv]

Fine-tunes all-MiniLM-L6-v2 (22M parameters) for a few steps on docstrings, then takes R3F's loss on one batch: with dropout
on as released, with the same masks in both passes, and with dropout off. Writes a CSV and a plot.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from fastpost import R3F
from fastpost.bench.studies.tasks import load
from fastpost.bench.studies.tuning import Classifier

MODES = {
    "dropout 0.1, independent masks (as released)": ("on", "independent"),
    "dropout 0.1, shared masks": ("on", "shared"),
    "dropout off": ("off", "independent"),
}
RELEASED = 1e-5
COLUMNS = ("mode", "eps", "symm_kl", "kl_gradient", "task_gradient", "task_loss", "embedding_rms")


def gradient_norm(model: nn.Module, loss: Tensor) -> float:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))


def measure(model: nn.Module, batch: dict[str, Any], mode: str, eps: float, draws: int) -> dict[str, Any]:
    """Averages over draws of noise and masks: the KL, the norm of its gradient, and that of the task loss."""
    dropout, masks = MODES[mode]
    model.train(dropout == "on")
    model.training = True  # alone, this turns R3F on and no dropout, attention's included
    rows = []
    for draw in range(draws):

        def loss(weight: float, draw: int = draw) -> tuple[Any, Tensor]:
            """R3F's output, and the cross-entropy of a pass with the clean pass's masks."""
            torch.manual_seed(draw)
            out = R3F(eps, weight, dropout=masks, seed=draw, detach_noised_embedding=False)(model, **batch)
            torch.manual_seed(draw)
            return out, R3F(eps, 0.0)(model, **batch).loss

        out, task = loss(1.0)
        task_gradient = gradient_norm(model, task)
        # The KL's gradient is what is left when the task's is taken off, where rounding would hide a small one: so it is
        # weighed until it is the larger.
        weight = 1e3 / max(float(out.symm_kl), 1e-30)
        heavy, task = loss(weight)
        rows.append((float(out.symm_kl), gradient_norm(model, heavy.loss - task) / weight, task_gradient))
    symm_kl, kl_gradient, task_gradient = (sum(column) / draws for column in zip(*rows, strict=True))
    values: dict[str, Any] = {"mode": mode, "eps": eps, "symm_kl": symm_kl, "kl_gradient": kl_gradient}
    return {**values, "task_gradient": task_gradient, "task_loss": float(out.task_loss)}


def plot(rows: list[dict[str, Any]], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for mode in MODES:
        mine = [row for row in rows if row["mode"] == mode]
        eps = [row["eps"] for row in mine]
        left.plot(eps, [row["symm_kl"] for row in mine], marker="o", markersize=3.5, label=mode)
        right.plot(eps, [row["kl_gradient"] / row["task_gradient"] for row in mine], marker="o", markersize=3.5, label=mode)
    left.set_ylabel("symmetric KL, per sentence")
    right.set_ylabel("gradient of the KL / gradient of the task loss")
    right.axhline(1, color="0.6", linewidth=0.8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"eps (embedding values are about {rows[0]['embedding_rms']:.2g})")
        axes.axvline(RELEASED, color="0.6", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.25)
    left.annotate("released eps", (RELEASED, left.get_ylim()[1]), (4, -12), textcoords="offset points", color="0.35")
    left.legend(frameon=False, fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What eps and dropout do in R3F")
    parser.add_argument("--output", type=Path, default=Path("r3f-what-moves.png"), help="the plot")
    parser.add_argument("--csv", type=Path, default=Path("r3f-what-moves.csv"))
    parser.add_argument("--draws", type=int, default=3, help="of noise and masks, averaged")
    parser.add_argument("--steps", type=int, default=16, help="AdamW steps before the measurement")
    parser.add_argument("--rows", type=int, default=16)
    options = parser.parse_args(arguments)

    task = load("stdlib", None, (256, 64, 64))
    classifier = Classifier(None, len(task.labels))
    model = classifier.fresh(0).train()
    *training, batch = classifier.batches(classifier.encode(task.train, 64), options.rows, options.steps + 1, 0)
    base = torch.optim.AdamW(model.parameters(), lr=2e-4)
    for step in training:
        base.zero_grad()
        model(**step).loss.backward()
        base.step()
    base.zero_grad()
    size = float(model.get_input_embeddings()(batch["input_ids"]).detach().square().mean().sqrt())  # type: ignore[operator]
    sizes = [*(10.0**k for k in range(-7, 1)), 0.03, 0.3]
    points = [(mode, eps) for mode in MODES for eps in sorted(sizes)]
    rows = [
        {**measure(model, batch, mode, eps, options.draws), "embedding_rms": size}
        for mode, eps in track(points, description="R3F")
    ]
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.output)
    print(f"{options.csv} and {options.output} written")


if __name__ == "__main__":
    main()
