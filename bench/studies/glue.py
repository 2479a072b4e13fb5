"""All methods on GLUE tasks: a pretrained encoder fine-tuned on few examples, beside AdamW at equal steps.

For each task and share of its training data, the learning rate is chosen for AdamW and then a strength for every other
method, by the score on a split of the training data. What is reported is GLUE's dev split, by other seeds, and decides
nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from fastpost.bench.studies import methods
from fastpost.bench.studies.arguments import names_of
from fastpost.bench.studies.choosing import Comparison, add_options
from fastpost.bench.studies.records import Records
from fastpost.bench.studies.study import Block, Study, Timer, check_apart, data_folder, digest
from fastpost.bench.studies.tasks import Example, Task, glue_task
from fastpost.bench.studies.tuning import Classifier, Padded, drawn, linear_schedule

TASKS = ("rte", "mrpc", "cola")
SPLITS = ("validation", "dev")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--shares", default="5,10,20,100", help="percent of the training data, comma-separated")
    add_options(parser, methods.STRENGTHS, rates="1e-4,2e-4,4e-4", seeds="0,1,2,3,4")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--head-rate", type=float, default=10.0, help="the new head's learning rate over the encoder's")
    parser.add_argument("--max-length", type=int, default=96, help="tokens of an example")
    parser.add_argument("--validation", type=int, default=256, help="examples cut from the training data to choose by")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of forward passes")
    parser.add_argument("--model", help="folder or hub name of an encoder; default: all-MiniLM-L6-v2 from its package")
    parser.add_argument("--choose-on", choices=SPLITS, default="validation")
    parser.add_argument("--report-on", choices=SPLITS, default="dev", help="never the same")


def score(task: str, labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """GLUE's metrics; `score` is the task's own: Matthews' correlation for CoLA, accuracy for the others."""
    found = {"accuracy": float(accuracy_score(labels, predictions))}
    if task == "cola":
        found["matthews"] = float(matthews_corrcoef(labels, predictions))
    if task == "mrpc":
        found["f1"] = float(f1_score(labels, predictions))
    return {**found, "score": found.get("matthews", found["accuracy"])}


@dataclass
class Data:
    """A task in token ids: all that may be trained on, what chooses, and what is reported."""

    task: Task
    classifier: Classifier
    train: list[dict[str, Any]]
    choose: list[dict[str, Any]]
    report: list[dict[str, Any]]
    device: str

    @cached_property
    def padded(self) -> dict[str, Padded]:
        """The three on the device."""
        parts = {"train": self.train, "choose": self.choose, "report": self.report}
        return {name: Padded(self.classifier, rows, self.device) for name, rows in parts.items()}


def text_of(example: Example) -> str:
    return f"{example.text}\t{example.pair or ''}"


def load(name: str, options: argparse.Namespace) -> Data:
    """Reads a task; training examples whose text is also reported on are left out.

    Raises:
        ValueError: settings would be chosen on what is reported.
    """
    folder = data_folder(options, "glue")
    task = glue_task(name, folder, (0, options.validation, 0))
    splits = {"validation": task.validation, "dev": task.test}
    choose, report = splits[options.choose_on], splits[options.report_on]
    reported = {text_of(example) for example in report}
    if choose is not report:  # GLUE's own splits share a few sentences
        choose = [example for example in choose if text_of(example) not in reported]
        if len(choose) < len(splits[options.choose_on]) / 2:
            raise ValueError(f"{folder}, {name}: most of what is to choose settings is also in what is to be reported on")
    check_apart([text_of(e) for e in choose], list(reported), f"{folder}, {name}")
    train = [example for example in task.train if text_of(example) not in reported]
    classifier = Classifier(options.model, len(task.labels))
    encode = partial(classifier.encode, max_length=options.max_length)
    return Data(task, classifier, encode(train), encode(choose), encode(report), options.device)


class Run(Comparison):
    def __init__(self, options: argparse.Namespace, data: dict[str, Data]) -> None:
        shares = [float(part) for part in options.shares.split(",")]
        if not all(0 < share <= 100 for share in shares):
            raise ValueError(f"--shares {options.shares}: percents lie above 0 and up to 100")
        super().__init__(options, methods.STRENGTHS, [f"{name}/{share:g}" for name in data for share in shares])
        self.data = data
        self.precision = methods.autocast(options.device, options.dtype)

    def blocks(self, records: Records) -> Iterable[Block]:
        for name, data in self.data.items():
            where = f"majority/{name}"
            yield Block(where, partial(records.has, where, "majority", 0, {}), partial(self.guess, records, name, data))
        yield from super().blocks(records)

    def guess(self, records: Records, name: str, data: Data) -> None:
        """The score of always naming the most frequent label of the training data."""
        trained = [row["labels"] for row in data.train]
        label = max(sorted(set(trained)), key=trained.count)
        labels = [row["labels"] for row in data.report]
        records.add(f"majority/{name}", "majority", 0, {}, score(name, labels, [label] * len(labels)))

    def train(self, where: str, place: str, method: str, seed: int, hyper: dict[str, Any], reports: bool) -> None:
        name, _, share = place.partition("/")
        o, data = self.options, self.data[name]
        count = max(round(len(data.train) * float(share) / 100), o.batch_size)
        count = min(count, len(data.train))  # the same examples for all; seeds order them and draw head and dropout
        steps = max(round(-(-count // o.batch_size) * o.epochs), 1)
        model = data.classifier.fresh(seed).to(o.device)
        strength = {key: value for key, value in hyper.items() if key != "lr"}
        groups = methods.grouped(model, hyper["lr"], o.head_rate)
        stepper = methods.build(method, model, groups, strength, self.precision)
        schedule = linear_schedule(stepper.optimizer, steps)
        timer, losses = Timer(device=o.device), []
        batches = [data.padded["train"].batch(chosen) for chosen in drawn(count, o.batch_size, steps, seed)]
        with timer.running():  # and nothing in it that waits for a GPU
            for batch in batches:
                losses.append(stepper.step(batch))
                schedule.step()
        asked = data.report if reports else data.choose
        predictions = self.predict(model, data.padded["report" if reports else "choose"])
        labels = [row["labels"] for row in asked]
        last = torch.stack(losses[-5:]).mean().item()
        scores = {**score(name, labels, predictions), "train_loss": round(last, 4)}
        if stepper.sam is not None:
            scores["skipped"] = float(stepper.sam.skipped_steps)
        examples = None
        if reports:
            examples = {"labels": "".join(map(str, labels)), "predictions": "".join(map(str, predictions))}
        self.records.add(where, method, seed, hyper, scores, steps=steps, examples=examples, **timer.spent())

    @torch.no_grad()
    def predict(self, model: Any, rows: Padded, batch_size: int = 32) -> list[int]:
        """The label of every row, in order."""
        model.eval()
        order = sorted(range(len(rows.lengths)), key=rows.lengths.__getitem__)
        named = []
        for start in range(0, len(order), batch_size):
            batch = rows.batch(order[start : start + batch_size])
            batch.pop("labels")
            with self.precision():
                named.append(model(**batch).logits.argmax(-1))
        found = [0] * len(order)
        for i, label in zip(order, torch.cat(named).tolist(), strict=True):
            found[i] = label
        return found


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    if options.choose_on == options.report_on:
        raise ValueError(
            f"--choose-on {options.choose_on} --report-on {options.report_on}: hyper-parameters that were chosen on some "
            "examples cannot be reported on them; choose on validation, which is cut from the training data"
        )
    data = {name: load(name, options) for name in names_of(options.tasks, "tasks", TASKS)}
    run = Run(options, data)
    setup = {
        "model": next(iter(data.values())).classifier.name,
        "epochs": options.epochs,
        "batch": options.batch_size,
        "head_rate": options.head_rate,
        "max_length": options.max_length,
        "dtype": options.dtype,
        "choose": f"{options.validation} of {options.choose_on}",
        "report": options.report_on,
        **run.setup(),
        "schedule": "linear, a tenth of warm-up",
        "data": digest(text_of(e) for d in data.values() for e in (*d.task.train, *d.task.validation, *d.task.test)),
    }
    return setup, run.blocks


STUDY = Study("glue", __doc__.splitlines()[0], options, prepare)
