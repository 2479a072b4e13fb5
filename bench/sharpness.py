"""Does SAM make anything flatter? An encoder fine-tuned by AdamW and by SAM, measured by `fastpost.sharpness`.

    python -m fastpost.bench.sharpness --data DIR [--task cola] [--rho 0.05] [--seeds 3]

Fine-tunes all-MiniLM-L6-v2 (22M parameters) on examples of a GLUE task, by both methods from the same head on the same
batches. Measures before and after, on examples that were trained on, in eval mode. Prints tables in Markdown: each seed with
errors over batches, then means over seeds, and differences between the methods, which share a seed, with errors over seeds.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastpost
from fastpost.bench.studies.tasks import glue_task
from fastpost.bench.studies.tuning import Classification, Classifier, Hyperparameters, build, linear_schedule
from fastpost.sam import Estimate

METHODS = ("before", "adamw", "sam")
COLUMNS = {
    "loss": "loss",
    "own_gradient_norm": "norm of g",
    "own_rise": "rise along its own g",
    "full_rise": "rise along the g of all",
    "own_curvature": "curvature along its own g",
    "full_curvature": "curvature along the g of all",
    "random_rise": "rise, random",
}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def measured(model: nn.Module, subject: Classification, options: argparse.Namespace) -> fastpost.Sharpness:
    batches = subject.batches(options.batch_size, options.batches, 1_000)
    return fastpost.sharpness(model, loss_of, batches, options.measured_rho)


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Does SAM make anything flatter?")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds glue/")
    parser.add_argument("--task", default="cola")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--examples", type=int, default=384, help="to train on")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--rho", type=float, default=0.05, help="of SAM")
    parser.add_argument("--measured-rho", type=float, default=0.05, help="of the measurement")
    parser.add_argument("--batches", type=int, default=8, help="measured, of --batch-size examples")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(arguments)

    task = glue_task(options.task, options.data / "glue", (options.examples, 8, 200))
    subject = Classification(Classifier(None, len(task.labels)), task, 32)
    columns = ("", "seed", *COLUMNS.values(), "accuracy")
    print(line(*columns), line(*["---"] * len(columns)), sep="\n")
    found: dict[str, dict[str, list[float]]] = {}

    def tell(name: str, seed: int, model: nn.Module) -> None:
        numbers = measured(model, subject, options).as_dict()
        accuracy = subject.score(model, "test")
        for column in COLUMNS:
            found.setdefault(name, {}).setdefault(column, []).append(numbers[column])
        found[name].setdefault("accuracy", []).append(accuracy)
        cells = (str(Estimate(numbers[c], numbers[f"{c}_se"])) for c in COLUMNS)
        print(line(name, str(seed), *cells, f"{accuracy:.3f}"), flush=True)

    for seed in range(options.seeds):
        if "before" in options.methods:
            tell("before", seed, subject.fresh(seed))
        for method in [m for m in options.methods if m != "before"]:
            trainee = build(method, "fastpost", subject.fresh(seed), Hyperparameters(lr=options.lr, rho=options.rho))
            schedule = linear_schedule(trainee.optimizer, options.steps)
            torch.manual_seed(seed)
            for batch in subject.batches(options.batch_size, options.steps, seed):
                trainee.step(batch)
                schedule.step()
            tell(method, seed, trainee.model)

    print("\nmeans over seeds", line("", *columns[2:]), line(*["---"] * (len(columns) - 1)), sep="\n")
    for name, values in found.items():
        print(line(name, *(str(Estimate.of(v)) for v in values.values())))
    if not {"adamw", "sam"} <= found.keys():
        return
    pairs = [list(zip(found["adamw"][c], found["sam"][c], strict=True)) for c in (*COLUMNS, "accuracy")]
    print(line("sam - adamw", *(str(Estimate.of([b - a for a, b in pair])) for pair in pairs)))
    logs = [[math.log(b / a) for a, b in pair] if all(a > 0 < b for a, b in pair) else [math.nan] for pair in pairs]
    print(line("log(sam / adamw)", *(str(Estimate.of(ratios)) for ratios in logs)))


if __name__ == "__main__":
    main()
