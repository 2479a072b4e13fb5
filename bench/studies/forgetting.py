"""What is left of a model's zero-shot scores after fine-tuning with AdamW or SAM, and after 4 bits (2605.02105).

The model is fine-tuned on code, with the settings given; nothing is chosen. Dialogues and PubMedQA are scored before,
after, and after the weights of all linear layers were rounded to 4 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpost.bench.studies import language, methods
from fastpost.bench.studies.arguments import names_of, seeds_of
from fastpost.bench.studies.gap_sweep import read
from fastpost.bench.studies.lm import trained, windows
from fastpost.bench.studies.records import Records
from fastpost.bench.studies.study import Block, Study, data_folder, digest

GROUP = 32  # weights that share a scale, as in GGUF's Q4


def options(parser: argparse.ArgumentParser) -> None:
    language.model_options(parser)
    parser.add_argument("--methods", default="adamw,sam")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--train-windows", type=int, default=200)
    parser.add_argument("--report-dialogues", type=int, default=80, help="of each of four sets")
    parser.add_argument("--report-questions", type=int, default=160)
    parser.add_argument("--dialogue-tokens", type=int, default=256)
    parser.add_argument("--question-tokens", type=int, default=512)


@torch.no_grad()
def rounded_to_4_bits_(model: nn.Module) -> None:
    """Rounds the weights of all linear layers, in groups of GROUP along the inputs, to 16 levels between their extremes."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.shape[1] % GROUP == 0:
            groups = module.weight.view(-1, GROUP)
            low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
            step = ((high - low) / 15).clamp(min=torch.finfo(groups.dtype).tiny)
            groups.copy_(low + step * ((groups - low) / step).round())


class Run:
    def __init__(self, options: argparse.Namespace, model: Any, train: Tensor, part: language.Part) -> None:
        self.options, self.model, self.train, self.part = options, model, train, part
        self.methods = names_of(options.methods, "methods", list(methods.LANGUAGE))
        self.seeds = seeds_of(options.seeds)
        self.records: Any = None

    def blocks(self, records: Records) -> Iterable[Block]:
        self.records = records
        yield Block("untouched", partial(self.has, "untouched", "untouched", 0), self.untouched)
        for seed in self.seeds:
            for method in self.methods:
                name = f"{method}/{seed}"
                yield Block(name, partial(self.has, "tuned", method, seed), partial(self.tune, method, seed))

    def has(self, block: str, method: str, seed: int) -> bool:
        return all(self.records.has(block, method, seed, {"bits": bits}) for bits in (32, 4))

    def untouched(self) -> None:
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.score("untouched", "untouched", 0, self.model)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(kept[name])

    def tune(self, method: str, seed: int) -> None:
        strength = {"rho": self.options.rho} if "sam" in method else methods.LANGUAGE[method][0]
        model, timer, loss = trained(self.model, method, self.options.lr, strength, self.train, self.options, seed)
        self.score("tuned", method, seed, model, {"train_loss": loss}, steps=self.options.steps, **timer.spent())

    def score(
        self, block: str, method: str, seed: int, model: Any, more: dict[str, float] | None = None, **spent: Any
    ) -> None:
        """Both rows of a model; it is left in 4 bits."""
        for bits in (32, 4):
            if bits == 4:
                rounded_to_4_bits_(model)
            scores, examples = self.part.scores(model)
            self.records.add(block, method, seed, {"bits": bits}, {**scores, **(more or {})}, examples=examples, **spent)


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    folder = data_folder(options, "gap")
    loaded = language.load(options)
    report = language.Sizes(
        options.report_dialogues, options.report_questions, options.dialogue_tokens, options.question_tokens, answers=0
    )
    _, part = language.parts(folder, loaded, "even", "odd", language.Sizes(1, 1, 8, 8, 0), report)
    train = windows(loaded, read(folder / "train_data_github.csv"), options.tokens, options.train_windows)
    run = Run(options, loaded.model, train, part)
    setup = {
        "model": Path(loaded.model.config.name_or_path).name, "lr": options.lr, "rho": options.rho,
        "steps": options.steps, "batch": options.batch_size, "tokens": options.tokens, "train": options.train_windows,
        "report": f"{len(part.dialogues)} dialogues, {len(part.questions)} questions",
        "data": digest([*part.texts, str(train.tolist())]),
    }  # fmt: skip
    return setup, run.blocks


STUDY = Study("forgetting", __doc__.splitlines()[0], options, prepare)
