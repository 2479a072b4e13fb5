"""Loss scaling with torch.amp.GradScaler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, conformance
from fastpost.conformance.subject import Seen, Subject, batch, differentiate, expect_bits, expect_close, loss_of

SCALE = 1024.0


def _scaled(subject: Subject, scaler: torch.amp.GradScaler, bad: str = "") -> Seen:
    def backward(which: str) -> Tensor:
        loss = loss_of(subject.model, batch(subject.number))
        differentiate(scaler.scale(loss))
        if which == bad:
            grad = subject.params()[0].grad
            assert grad is not None
            grad[0, 0] = math.inf
        return loss.detach()

    return subject.step(
        lambda: backward("first"),
        lambda: backward("second"),
        drive=lambda opt, first, second: subject.adapter.scaled_step(opt, scaler, first, second),
    )


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)


@conformance("GradScaler")
def grad_scaler(adapter: Adapter) -> None:
    """Scaled losses make the step of unscaled ones."""
    subject, plain = Subject(adapter), Subject(adapter)  # SGD: Adam would not feel a scale left on
    scaler = _scaler()
    for _ in range(3):
        a, b = _scaled(subject, scaler), plain.step()
        expect_close(a.perturbed, b.perturbed, "the scale changes the perturbation")
        expect_close(a.after, b.after, "the scale changes the step")
    if scaler.get_scale() != SCALE:
        raise Failure(f"the scale went from {SCALE:g} to {scaler.get_scale():g} without an overflow")


def _overflow(adapter: Adapter, bad: str) -> None:
    subject = Subject(adapter, torch.optim.AdamW)
    scaler = _scaler()
    _scaled(subject, scaler)
    seen = _scaled(subject, scaler, bad)
    expect_bits(seen.after, seen.before, f"an overflow in the {bad} pass changes the weights")
    if scaler.get_scale() != SCALE / 2:
        raise Failure(f"an overflow in the {bad} pass leaves the scale at {scaler.get_scale():g}")
    seen = _scaled(subject, scaler)
    if any(not torch.isfinite(w).all() for w in seen.after.values()):
        raise Failure(f"the step after an overflow in the {bad} pass gives NaN")


@conformance("GradScaler, first pass")
def overflow_in_first_pass(adapter: Adapter) -> None:
    """An overflow in the first pass alone skips the step and shrinks the scale."""
    _overflow(adapter, "first")


@conformance("GradScaler, second pass")
def overflow_in_second_pass(adapter: Adapter) -> None:
    """An overflow in the second pass skips the step and shrinks the scale."""
    _overflow(adapter, "second")
