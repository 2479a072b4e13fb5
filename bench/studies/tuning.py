"""Fine-tuning a model by each method: through fastpost, and through the published loop in plain torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastpost
from fastpost import published
from fastpost.bench.studies.small_lm import Corpus, perplexity
from fastpost.bench.studies.tasks import Example, Task
from fastpost.cli.models import PACKAGED_MODEL, Loaded, loading, negative_log_likelihoods, packaged_model
from fastpost.modes import evaluating
from fastpost.r3f.spectral import find_classifier

CLASSIFIERS = ("adamw", "sam", "asam", "r3f", "r4f")

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
    fused_linear: bool = False  # fastpost's R3F without the logits of a language model


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
        head = find_classifier(model)
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
            fastpost.R4F(find_classifier(model), layers="last")
        else:
            published.spectral_norm_last(find_classifier(model))
    parameters = list(model.parameters())
    if method in ("sam", "asam") and side == "fastpost":
        rho = hyper.asam_rho if method == "asam" else hyper.rho
        sam = fastpost.SAM(parameters, base, rho=rho, adaptive=method == "asam", **keywords)

        def sam_step(batch: Batch) -> Tensor:
            def closure() -> Tensor:
                loss: Tensor = model(**batch).loss
                loss.backward()
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
            loss.backward()
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
        is_classifier = batch["labels"].ndim == 1
        theirs = published.r3f_sentence_loss if is_classifier else published.r3f_language_model_loss
        return theirs(model, batch, hyper.eps, hyper.r3f_lambda, hyper.noise_type)

    if method in ("r3f", "r4f"):
        r3f = fastpost.R3F(hyper.eps, hyper.r3f_lambda, hyper.noise_type, fused_linear=hyper.fused_linear)

    def plain_step(batch: Batch) -> Tensor:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Trainee(model, optimizer, plain_step)


@torch.no_grad()
def accuracy(classifier: Classifier, model: Any, rows: list[dict[str, Any]], batch_size: int = 64) -> float:
    """Share of rows whose label the model names, in eval mode; the mode is put back."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    right = 0
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))  # little padding
    for start in range(0, len(by_length), batch_size):
        batch = {name: value.to(device) for name, value in classifier.collate(by_length[start : start + batch_size]).items()}
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    model.train(was_training)
    return right / len(rows)


class Classification:
    """A task for a classifier: equal models, batches and scores. Better is more."""

    metric = "accuracy"

    def __init__(self, classifier: Classifier, task: Task, max_length: int, device: str = "cpu") -> None:
        self.classifier, self.device = classifier, device
        self.name, self.parameters = classifier.name, classifier.parameters
        splits = {"train": task.train, "validation": task.validation, "test": task.test}
        self.rows = {split: classifier.encode(examples, max_length) for split, examples in splits.items()}

    def fresh(self, seed: int) -> nn.Module:
        return self.classifier.fresh(seed).to(self.device)

    def batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        for batch in self.classifier.batches(self.rows["train"], batch_size, steps, seed):
            yield {name: value.to(self.device) for name, value in batch.items()}

    def score(self, model: nn.Module, split: str) -> float:
        return accuracy(self.classifier, model, self.rows[split])


class Language:
    """Text for a causal language model: equal models, random windows, perplexities. Better is less.

    Args:
        loaded: the pretrained model.
        corpus: its text, in token ids.
        context: tokens of a window to learn from.
    """

    metric = "perplexity"

    def __init__(self, name: str, loaded: Loaded, corpus: Corpus, context: int, device: str = "cpu") -> None:
        self.name, self.model, self.corpus, self.context, self.device = name, loaded.model, corpus, context, device
        self.parameters = sum(p.numel() for p in loaded.model.parameters())
        self.windows = {"validation": corpus.validation.to(device), "test": corpus.test.to(device)}

    def fresh(self, seed: int) -> nn.Module:
        model: Any = copy.deepcopy(self.model)
        torch.manual_seed(seed)
        return model.to(self.device).train()

    def batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            starts = torch.randint(len(self.corpus.train) - self.context, (batch_size, 1), generator=generator)
            ids = self.corpus.train[starts + torch.arange(self.context)].to(self.device)
            yield {"input_ids": ids, "labels": ids}

    def score(self, model: nn.Module, split: str) -> float:
        with evaluating(model):
            return perplexity(negative_log_likelihoods(model, self.windows[split], 8))[0]


@dataclass
class Outcome:
    """One run: scores of the state chosen on validation, and SAM's last report."""

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
    subject: Classification | Language,
    hyper: Hyperparameters,
    *,
    steps: int,
    batch_size: int,
    evaluations: int,
    progress: Callable[[int, int], object],
) -> Outcome:
    """Fine-tunes through fastpost and reports the test score of the state that does best on validation.

    Args:
        evaluations: how often validation is asked, evenly spaced over the steps, the last time at the end.
        progress: called with (step, steps).
    """
    trainee = build(method, "fastpost", subject.fresh(seed), hyper)
    schedule = linear_schedule(trainee.optimizer, steps)
    ask = {steps * (i + 1) // evaluations for i in range(evaluations)}
    sign = 1 if subject.metric == "accuracy" else -1
    best, best_step = -math.inf, 0
    held: list[Tensor] = []
    for step, batch in enumerate(subject.batches(batch_size, steps, seed), start=1):
        trainee.step(batch)
        schedule.step()
        progress(step, steps)
        if step in ask:
            score = sign * subject.score(trainee.model, "validation")
            if score > best:
                best, best_step = score, step
                held = [] if step == steps else [p.detach().clone() for p in trainee.model.parameters()]
    with torch.no_grad():
        for p, kept in zip(trainee.model.parameters(), held, strict=False):  # nothing is held when the last state is best
            p.copy_(kept)
    report = trainee.sam.report if trainee.sam is not None else None
    found = report.as_dict() if report is not None else None
    return Outcome(sign * best, subject.score(trainee.model, "test"), best_step, found)
