"""Saving, resuming, schedules."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, conformance
from fastpost.conformance.subject import Subject, expect_bits, expect_close


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@conformance("resume")
def resume(adapter: Adapter) -> None:
    """Training resumed from state_dict() is the uninterrupted training, bit for bit."""
    subject = Subject(adapter, torch.optim.AdamW)
    for _ in range(3):
        subject.step()
    resumed = Subject(adapter, torch.optim.AdamW)
    resumed.model.load_state_dict(through_a_file(subject.model.state_dict()))
    adapter.load_state_dict(resumed.opt, through_a_file(adapter.state_dict(subject.opt)))
    resumed.number = subject.number
    for _ in range(3):
        expect_bits(resumed.step().after, subject.step().after, "resumed training goes elsewhere")


@conformance("schedule")
def schedule(adapter: Adapter) -> None:
    """A scheduler on the optimizer reaches the base optimizer, also after a state_dict round trip."""
    subject = Subject(adapter)
    subject.step()
    adapter.load_state_dict(subject.opt, copy.deepcopy(adapter.state_dict(subject.opt)))
    torch.optim.lr_scheduler.LambdaLR(subject.opt, lambda step: 0.0)
    seen = subject.step()
    expect_close(seen.after, seen.before, "a learning rate of 0 from a scheduler still moves the weights")


@conformance("distributed checkpoint")
def distributed_checkpoint(adapter: Adapter) -> None:
    """get/set_optimizer_state_dict of torch.distributed.checkpoint save a fresh and a used one; resumed bit for bit."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    subject = Subject(adapter, torch.optim.AdamW)
    start = subject.weights()
    get_optimizer_state_dict(subject.model, subject.opt)
    expect_bits(subject.weights(), start, "saving before the first step changes the weights")
    for _ in range(3):
        subject.step()
    saved = through_a_file(get_optimizer_state_dict(subject.model, subject.opt))
    resumed = Subject(adapter, torch.optim.AdamW)
    resumed.model.load_state_dict(subject.model.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.opt, saved)
    resumed.number = subject.number
    for _ in range(3):
        expect_bits(resumed.step().after, subject.step().after, "resumed training goes elsewhere")


@conformance("saving while perturbed")
def saving_while_perturbed(adapter: Adapter) -> None:
    """A checkpoint between the passes is refused, or gives back the unperturbed weights."""
    subject = Subject(adapter)
    start = subject.weights()
    saved: list[Any] = []
    refused: list[Exception] = []

    def second() -> Tensor:
        try:
            saved.append(copy.deepcopy((subject.model.state_dict(), adapter.state_dict(subject.opt))))
        except Exception as error:
            refused.append(error)
        return subject.backward()

    subject.step(second=second)
    if refused:
        return
    loaded = Subject(adapter)
    loaded.model.load_state_dict(saved[0][0])
    adapter.load_state_dict(loaded.opt, saved[0][1])
    try:
        expect_bits(loaded.weights(), start, "weights")
    except Failure as failure:
        raise Failure(f"a checkpoint between the passes holds the perturbed weights ({failure})") from None
