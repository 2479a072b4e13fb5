"""What 16 bits do to SAM's perturbation and to R3F's noise, on a pretrained language model's own gradients and embeddings.

Weights are those of the model, rounded to the dtype; the batch is real dialogues. For each radius and way to perturb:
what was stored of e in each layer, by how much the loss rose, and how far the second gradient is from the one that
float32 gives for the same weights and radius.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastpost import SAM, add_noise
from fastpost.bench.studies import language
from fastpost.bench.studies.records import Records
from fastpost.bench.studies.study import Block, Study, Timer, data_folder, digest
from fastpost.gap.zero_shot import dialogue_prompt

# Ways to perturb, with the dtype of the weights.
KINDS = {
    "float32": torch.float32,
    "bfloat16, nearest": torch.bfloat16,
    "bfloat16, stochastic": torch.bfloat16,
    "bfloat16, masters": torch.bfloat16,
    "bfloat16, functional": torch.bfloat16,
    "float16, nearest": torch.float16,
}
NOISED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def options(parser: argparse.ArgumentParser) -> None:
    language.model_options(parser)
    parser.add_argument("--rho", default="0.02,0.05,0.15,0.5", help="radii, comma-separated")
    parser.add_argument("--eps", default="1e-5,1e-4,1e-3,1e-2,1e-1", help="R3F's noise, comma-separated")
    parser.add_argument("--kinds", default="; ".join(KINDS), help="ways to perturb, with semicolons between")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="of a dialogue")


def layer_of(name: str) -> str:
    """The part of the model that a weight belongs to: its layer's number, `embedding`, or `norm` for the gains of norms."""
    if "norm" in name:
        return "norm"
    numbered = re.search(r"layers\.(\d+)\.", name)
    return numbered[1] if numbered else "embedding"


@dataclass
class Products:
    """Of an intended and of a stored vector, summed up tensor by tensor in float64, so that neither is ever held whole."""

    intended: float = 0.0
    stored: float = 0.0
    both: float = 0.0

    def add(self, e: Tensor, s: Tensor) -> Products:
        e, s = e.double(), s.double()
        self.intended += float(e.square().sum())
        self.stored += float(s.square().sum())
        self.both += float((e * s).sum())
        return self

    def kept(self) -> dict[str, float]:
        """Norm of what was stored over that of e, their cosine, and the gain <stored, e> / <e, e>."""
        if self.intended == 0:
            return {"norm": math.nan, "cosine": math.nan, "gain": math.nan}
        cosine = self.both / math.sqrt(self.intended * self.stored) if self.stored else 0.0
        return {"norm": math.sqrt(self.stored / self.intended), "cosine": cosine, "gain": self.both / self.intended}


def cosine(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Of two vectors in pieces."""
    products = Products()
    for a, b in zip(one, other, strict=True):
        products.add(a, b)
    return products.kept()["cosine"]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Run:
    def __init__(self, options: argparse.Namespace, model: Any, batches: list[Tensor]) -> None:
        self.options, self.model, self.batches = options, model, batches
        self.kinds = [kind.strip() for kind in options.kinds.split(";")]
        self.radii = [float(part) for part in options.rho.split(",")]
        self.scales = [float(part) for part in options.eps.split(",")]
        self.records: Any = None

    def blocks(self, records: Records) -> Iterable[Block]:
        self.records = records
        for number in range(len(self.batches)):
            yield Block(f"noise/{number}", partial(self.has_noise, number), partial(self.noise, number))
            for dtype in dict.fromkeys(KINDS[kind] for kind in self.kinds):
                done = partial(self.has_all, dtype, number)
                yield Block(f"sam/{str(dtype).partition('.')[2]}/{number}", done, partial(self.perturb, dtype, number))

    # -- noise ------------------------------------------------------------------------------------------------------

    def has_noise(self, number: int) -> bool:
        return all(self.records.has("noise", name, number, {"eps": eps}) for eps in self.scales for name in NOISED)

    @torch.no_grad()
    def noise(self, number: int) -> None:
        """What is left of the noise after it was added to the embeddings of a real batch, in each dtype."""
        embedded = self.model.get_input_embeddings()(self.batches[number])
        for eps in self.scales:
            for name, dtype in NOISED.items():
                x = embedded.to(dtype)
                intended = add_noise(torch.zeros_like(embedded), eps, seed=number)
                stored = add_noise(x, eps, seed=number).double() - x.double()
                self.records.add("noise", name, number, {"eps": eps}, Products().add(intended, stored).kept())

    # -- perturbations ----------------------------------------------------------------------------------------------

    def of(self, dtype: torch.dtype) -> list[str]:
        return [kind for kind in self.kinds if KINDS[kind] == dtype]

    def has_all(self, dtype: torch.dtype, number: int) -> bool:
        return all(self.records.has("sam", kind, number, {"rho": rho}) for kind in self.of(dtype) for rho in self.radii)

    def perturb(self, dtype: torch.dtype, number: int) -> None:
        """Every way to perturb weights of a dtype, beside float32 from the same weights: the truth."""
        model = copy.deepcopy(self.model).to(dtype)
        exact = copy.deepcopy(model).float()
        parts = [layer_of(name) for name, _ in model.named_parameters()]
        loss, first = self.gradient(model, number)
        true_loss, true_first = self.gradient(exact, number)
        for rho in self.radii:
            true_rise, _, _, true_second = self.second(exact, "float32", true_first, rho, number, parts)
            for kind in self.of(dtype):
                timer = Timer(device=self.options.device)
                with timer.running():
                    rise, layers, seen, second = self.second(model, kind, first, rho, number, parts)
                changes = (map(_less, true_second, true_first), map(_less, second, first))
                scores = {
                    **seen,
                    "loss": loss,
                    "rise": rise - loss,
                    "true_rise": true_rise - true_loss,
                    "first_cosine": cosine(true_first, first),
                    "second_cosine": cosine(true_second, second),
                    "change_cosine": cosine(*changes),
                }
                examples = {part: {name: round(value, 4) for name, value in found.items()} for part, found in layers.items()}
                self.records.add("sam", kind, number, {"rho": rho}, scores, examples=examples, **timer.spent())
                del second

    def gradient(self, model: Any, number: int) -> tuple[float, list[Tensor]]:
        loss = loss_of(model, self.batches[number])
        return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))

    def second(
        self, model: Any, kind: str, first: list[Tensor], rho: float, number: int, parts: list[str]
    ) -> tuple[float, dict[str, dict[str, float]], dict[str, float], list[Tensor]]:
        """SAM's second pass: its loss, what was stored of e in each part, what the forward pass saw, the second gradient.

        The weights are afterwards as before.
        """
        parameters = list(model.parameters())
        way: dict[str, Any] = {
            "stochastic": {"rounding": "stochastic", "rounding_seed": number},
            "masters": {"master_params": [p.detach().float() for p in parameters]},
            "functional": {"perturb": "functional", "model": model},
        }.get(kind.partition(", ")[2], {})
        sam = SAM(parameters, torch.optim.SGD, rho=rho, lr=0.0, **way)
        before = [p.detach().clone() for p in parameters]
        length = math.sqrt(sum(float(g.double().square().sum()) for g in first))
        for p, g in zip(parameters, first, strict=True):
            p.grad = g.clone()
        with sam.perturbed():
            stored: dict[str, Products] = {}
            for part, p, b, g in zip(parts, parameters, before, first, strict=True):
                change = p.detach().double() - b.double()
                stored.setdefault(part, Products()).add(g.double() * (rho / length), change)
            loss, gradient = self.gradient(model, number)
        for p in parameters:
            p.grad = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that e is lost in rounding is what is measured
            report = sam.report
        assert report is not None
        found = report.as_dict()
        seen = {"norm": found["seen_norm"] / rho, "cosine": found["seen_cosine"], "gain": found["seen_gain"]}
        return loss, {part: products.kept() for part, products in stored.items()}, seen, gradient


def _less(one: Tensor, other: Tensor) -> Tensor:
    return one.double() - other.double()


def prepare(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    folder = data_folder(options, "gap")
    unknown = [kind for kind in map(str.strip, options.kinds.split(";")) if kind not in KINDS]
    if unknown:
        raise ValueError(f"--kinds: there is no {unknown[0]!r}; there are {'; '.join(KINDS)}")
    loaded = language.load(options)
    dialogues, _ = language.tasks_of(folder)
    texts = [dialogue_prompt(talk) for task in dialogues.values() for talk in list(task.dialogues)[: 8 * options.batches]]
    rows = [ids[: options.tokens + 1] for ids in map(loaded.encode, texts) if len(ids) > options.tokens]
    wanted = options.batches * options.batch_size
    if len(rows) < wanted:
        raise ValueError(f"{folder}: only {len(rows)} dialogues have more than {options.tokens} tokens; {wanted} are needed")
    rows = rows[:: len(rows) // wanted][:wanted]  # from all sets
    batches = list(torch.tensor(rows, device=options.device).split(options.batch_size))
    setup = {
        "model": Path(loaded.model.config.name_or_path).name, "rho": options.rho, "eps": options.eps,
        "batch": f"{options.batch_size} x {options.tokens}", "data": digest(map(str, rows)),
    }  # fmt: skip
    return setup, Run(options, loaded.model, batches).blocks


STUDY = Study("precision", __doc__.splitlines()[0], options, prepare)
