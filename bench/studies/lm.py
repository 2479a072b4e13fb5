"""A pretrained language model fine-tuned on dialogues by every method: perplexity in the domain and out of it.

The learning rate and each method's strength are chosen on dialogues that are neither trained on nor reported. Out of the
domain are the texts of GAP's corpora: web pages and code.
"""

from __future__ import annotations

import argparse
import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpost.bench.studies import language, methods
from fastpost.bench.studies.choosing import Comparison, add_options
from fastpost.bench.studies.gap_sweep import read
from fastpost.bench.studies.study import Study, Timer, check_apart, data_folder, digest
from fastpost.bench.studies.tuning import Batch, linear_schedule
from fastpost.cli.models import Loaded, negative_log_likelihoods
from fastpost.gap.zero_shot import dialogue_prompt

PLACE = "dialogues"
SPLITS = ("choose", "dialogues", "web", "code")
FILES = {"web": "train_data_pile-cc.csv", "code": "train_data_github.csv"}


def options(parser: argparse.ArgumentParser) -> None:
    language.model_options(parser)
    add_options(parser, methods.LANGUAGE, rates="2e-5,5e-5,1e-4", seeds="0,1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--train-windows", type=int, default=400)
    parser.add_argument("--score-windows", type=int, default=128, help="of each split")
    parser.add_argument("--report-on", choices=SPLITS[1:], action="append", help="splits to report; never `choose`")


def windows(loaded: Loaded, texts: list[str], tokens: int, count: int) -> Tensor:
    """Windows of tokens + 1 token ids from the texts, one after the other.

    Raises:
        ValueError: too little text.
    """
    ids: list[int] = []
    for text in texts:
        if len(ids) >= count * (tokens + 1):
            break
        ids += loaded.encode(text + "\n\n")
    if len(ids) < count * (tokens + 1):
        raise ValueError(f"studies: {count} windows of {tokens + 1} tokens are wanted, the text has {len(ids)} tokens")
    return torch.tensor(ids[: count * (tokens + 1)]).view(count, tokens + 1)


def trained(
    model: Any, method: str, lr: float, strength: dict[str, float], train: Tensor, options: argparse.Namespace, seed: int
) -> tuple[Any, Timer, float]:
    """A copy of the model after `options.steps` steps of a method, with the time they took and their last loss."""
    model = copy.deepcopy(model).train()
    if "bf16" in method:
        model.to(torch.bfloat16)
    groups = [{"params": list(model.parameters()), "lr": lr}]
    torch.manual_seed(seed)
    stepper = methods.build(method, model, groups, strength, methods.autocast(options.device, "float32"))
    schedule = linear_schedule(stepper.optimizer, options.steps)
    generator, timer = torch.Generator().manual_seed(seed), Timer(device=options.device)
    order: list[int] = []
    batches: list[Batch] = []
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order += torch.randperm(len(train), generator=generator).tolist()
        ids = train[order[: options.batch_size], :-1].to(options.device)
        order = order[options.batch_size :]
        batches.append({"input_ids": ids, "labels": ids})
    loss = torch.tensor(math.nan)
    with timer.running():  # and nothing in it that waits for a GPU
        for batch in batches:
            loss = stepper.step(batch)
            schedule.step()
    return model.eval(), timer, loss.item()


class Run(Comparison):
    def __init__(self, options: argparse.Namespace, model: Any, data: dict[str, Tensor]) -> None:
        super().__init__(options, methods.LANGUAGE, [PLACE])
        self.model, self.data = model, data

    def train(self, where: str, place: str, method: str, seed: int, hyper: dict[str, Any], reports: bool) -> None:
        strength = {key: value for key, value in hyper.items() if key != "lr"}
        model, timer, loss = trained(self.model, method, hyper["lr"], strength, self.data["train"], self.options, seed)
        splits = self.options.report_on if reports else ["choose"]
        scores: dict[str, float] = {"train_loss": loss}
        examples = {}
        for split in splits:
            with torch.no_grad():
                nats = negative_log_likelihoods(model, self.data[split].to(self.options.device), batch_size=8)
            scores[split] = math.exp(nats.mean().item())
            examples[split] = [round(value, 5) for value in nats.tolist()]
        scores["score"] = -scores[splits[0]]
        kept = examples if reports else None
        self.records.add(where, method, seed, hyper, scores, steps=self.options.steps, examples=kept, **timer.spent())


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    options.report_on = options.report_on or list(SPLITS[1:])
    folder = data_folder(options, "gap")
    loaded = language.load(options)
    sets, _ = language.tasks_of(folder)
    talks = [dialogue_prompt(talk).rpartition("\n")[0] for task in sets.values() for talk in task.dialogues]
    talks = list(dict.fromkeys(talks))  # a dialogue that is there twice would be in two splits
    cut = partial(windows, loaded, tokens=options.tokens)
    thirds = {"train": talks[0::3], "choose": talks[1::3], "dialogues": talks[2::3]}
    check_apart(thirds["choose"], thirds["dialogues"], str(folder))
    data = {
        name: cut(texts, count=options.train_windows if name == "train" else options.score_windows)
        for name, texts in thirds.items()
    }
    data |= {name: cut(read(folder / file), count=options.score_windows) for name, file in FILES.items()}
    run = Run(options, loaded.model, data)
    setup = {
        "model": Path(loaded.model.config.name_or_path).name,
        "steps": options.steps,
        "batch": options.batch_size,
        "tokens": options.tokens,
        "train": options.train_windows,
        "windows": options.score_windows,
        "report": ",".join(options.report_on),
        **run.setup(),
        "data": digest(str(data[name].tolist()) for name in data),
    }
    return setup, run.blocks


STUDY = Study("lm", __doc__.splitlines()[0], options, prepare)
