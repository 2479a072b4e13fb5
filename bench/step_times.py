"""Seconds per step of a method beside the plain step and beside the published loop, on the same batches."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fastpost
from fastpost import published
from fastpost.bench import measure
from fastpost.cli.train_options import PARTS
from fastpost.r3f.spectral import find_classifier

Batch = dict[str, Tensor]
Costs = dict[str, measure.Cost]
Told = Callable[[int, int], object]
PLAIN, PUBLISHED, OURS = "plain step", "published loop", "fastpost"


def time_training(method: str, model: Any, window: list[Batch], arguments: Any, rounds: int, told: Told) -> Costs:
    """Times one optimizer step on copies of the model; the global random state is afterwards what it was.

    All sides are plain loops around the same AdamW (torch's fused kernel), so that none pays for a trainer.

    Args:
        model: in the state that its copies begin with, on its device, with a plain head.
        window: the micro-batches of a step, on that device.
        arguments: PostTrainingArguments.
        rounds: timed steps of each side.
        told: called with (steps done, steps in all).
    """
    makers: dict[str, Callable[[Any], measure.Step]] = {PLAIN: lambda m: _plain(m, window, arguments, _task_loss)}
    if PARTS[method]:
        makers[PUBLISHED] = lambda m: _published(method, m, window, arguments)
        makers[OURS] = lambda m: _ours(method, m, window, arguments)

    def make(name: str) -> measure.Step:
        return makers[name](copy.deepcopy(model).train())

    with torch.random.fork_rng():
        sides = {name: lambda name=name: make(name) for name in makers}
        return measure.costs(sides, rounds, told, device=next(model.parameters()).device)


def time_ascent(model: Any, ids: Tensor, recipe: fastpost.GAP, rounds: int, told: Told) -> Costs:
    """Times runs of `recipe.n_steps` steps on one text, copying and going back with them; per step.

    Args:
        ids: (1, T) on the model's device.
    """
    n_steps = max(recipe.n_steps, 1)

    def plain() -> measure.Step:
        side = copy.deepcopy(model).eval()
        optimizer = torch.optim.Adam(side.parameters(), lr=recipe.lr, betas=recipe.betas)

        def run() -> None:
            for _ in range(n_steps):
                side(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    def theirs() -> measure.Step:
        side = copy.deepcopy(model)

        def run() -> None:
            start, _ = published.gap_ascent(side, ids, n_steps, recipe.lr, recipe.betas)
            side.load_state_dict(start)

        return run

    def ours() -> measure.Step:
        side = copy.deepcopy(model)
        bare = fastpost.GAP(n_steps, recipe.lr, recipe.betas, max_tokens=recipe.max_tokens)
        return lambda: bare(side, ids).rollback()

    makers = {PLAIN: plain, PUBLISHED: theirs, OURS: ours}
    return measure.costs(makers, rounds, told, device=ids.device, steps_per_call=n_steps)


# -- the sides --------------------------------------------------------------------------------------------------------------

Loss = Callable[[Any, Batch], Tensor]


def _task_loss(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _optimizer(model: Any, arguments: Any) -> dict[str, Any]:
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay, "fused": fused}


def _precision(model: Any, arguments: Any) -> contextlib.AbstractContextManager[Any]:
    if not arguments.bf16:  # float16 would need a GradScaler on every side
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _backward(model: Any, batches: Iterable[Batch], arguments: Any, loss_of: Loss, parts: int) -> None:
    for batch in batches:
        with _precision(model, arguments):
            loss = loss_of(model, batch) / parts
        loss.backward()


def _plain(model: Any, window: list[Batch], arguments: Any, loss_of: Loss) -> measure.Step:
    optimizer = torch.optim.AdamW(model.parameters(), **_optimizer(model, arguments))

    def step() -> None:
        _backward(model, window, arguments, loss_of, len(window))
        optimizer.step()
        optimizer.zero_grad()

    return step


def _published(method: str, model: Any, window: list[Batch], arguments: Any) -> measure.Step:
    if arguments.r3f_spectral is not None:
        published.spectral_norm_last(find_classifier(model))
    loss_of = _task_loss if "r3f" not in PARTS[method] else lambda m, batch: _published_r3f(m, batch, arguments)
    if "sam" not in PARTS[method]:
        return _plain(model, window, arguments, loss_of)
    optimizer = torch.optim.AdamW(model.parameters(), **_optimizer(model, arguments))
    sam = published.PublishedSAM(model.parameters(), optimizer, arguments.sam_rho, adaptive=arguments.sam_adaptive)
    ascent = window[: math.ceil(arguments.sam_ascent_fraction * len(window))]

    def step() -> None:
        _backward(model, ascent, arguments, loss_of, len(window))
        sam.first_step()
        optimizer.zero_grad()
        _backward(model, window, arguments, loss_of, len(window))
        sam.second_step()
        optimizer.zero_grad()

    return step


def _published_r3f(model: Any, batch: Batch, arguments: Any) -> Tensor:
    """fairseq's criterion, for classes or for tokens."""
    loss_of = published.r3f_sentence_loss if batch["labels"].ndim == 1 else published.r3f_language_model_loss
    return loss_of(model, batch, arguments.r3f_eps, arguments.r3f_lambda, arguments.noise_type)


def _ours(method: str, model: Any, window: list[Batch], arguments: Any) -> measure.Step:
    r3f = arguments.build_r3f(fused_linear=bool(arguments.r3f_fused_linear))
    if arguments.r3f_spectral is not None:
        fastpost.R4F(find_classifier(model), layers=arguments.r3f_spectral, mode=arguments.r3f_spectral_mode)
    loss_of = _task_loss if "r3f" not in PARTS[method] else lambda m, batch: r3f(m, **batch).loss
    if "sam" not in PARTS[method]:
        return _plain(model, window, arguments, loss_of)
    sam = fastpost.SAM(
        model.named_parameters(),
        torch.optim.AdamW,
        **arguments.sam_keywords(model),
        **_optimizer(model, arguments),
    )
    passes = fastpost.sam.SAMWindow(
        sam,
        lambda batch: _backward(model, [batch], arguments, loss_of, len(window)),
        per_micro_batch=arguments.sam_per_micro_batch,
    )

    def step() -> None:
        passes.run(window)
        sam.step()
        sam.zero_grad()

    return step
