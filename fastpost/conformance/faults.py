"""What goes wrong in a training run, and what is left of the weights then."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Failure, conformance
from fastpost.conformance.subject import Subject, Twin, differing, expect_bits, expect_close


@conformance("None in second pass")
def none_in_second_pass(adapter: Adapter) -> None:
    """A parameter without a gradient in the second pass comes back all the same."""
    subject = Subject(adapter)
    twin = Twin(subject)
    for leave_out in (False, True, True, False):
        seen = subject.step(second=partial(subject.backward, right=not leave_out))
        name = "right.weight"
        moved = bool(differing({name: seen.before[name]}, {name: seen.perturbed[name]}))
        if leave_out and moved and not differing({name: seen.after[name]}, {name: seen.perturbed[name]}):
            raise Failure("a parameter without second gradient stays perturbed for good")
        expect_close(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's from w")


@conformance("None in first pass")
def none_in_first_pass(adapter: Adapter) -> None:
    """A parameter without a gradient in the first pass is not moved by an older one, and steps with its second."""
    subject = Subject(adapter)
    twin = Twin(subject)
    for leave_out in (True, False, True, True):
        seen = subject.step(first=partial(subject.backward, right=not leave_out))
        name = "right.weight"
        if leave_out and differing({name: seen.perturbed[name]}, {name: seen.before[name]}):
            raise Failure("a parameter without first gradient was perturbed")
        expect_close(seen.after, twin.step(seen.second_grads), "another step than the base optimizer's from w")


def spoiled(subject: Subject, value: float) -> Callable[[], Tensor]:
    """A pass whose gradient has one element that is not finite."""

    def backward() -> Tensor:
        loss = subject.backward()
        grad = subject.params()[0].grad
        assert grad is not None
        grad[0, 0] = value
        return loss

    return backward


@conformance("inf: weights return")
def inf_weights_return(adapter: Adapter) -> None:
    """After an inf or NaN in the first pass and a finite second gradient, no weight is NaN."""
    for value in (math.inf, math.nan):
        subject = Subject(adapter)

        def finite(subject: Subject = subject) -> Tensor:
            for p in subject.params():
                p.grad = torch.ones_like(p)
            return torch.zeros(())

        twin = Twin(subject)
        seen = subject.step(first=spoiled(subject, value), second=finite)
        stepped = twin.step(seen.second_grads)
        lost = sum(int((~torch.isfinite(w)).sum()) for w in seen.after.values())
        if lost:
            raise Failure(f"{value} in the first gradient: {lost} weights are not finite any more")
        if differing(seen.after, seen.before):  # not skipped
            expect_close(
                seen.after, stepped, f"{value} in the first gradient: another step than the base optimizer's from w"
            )


def _skips(adapter: Adapter, which: str) -> None:
    for value in (math.inf, math.nan):
        subject, untouched = Subject(adapter, torch.optim.AdamW), Subject(adapter, torch.optim.AdamW)
        subject.step()
        untouched.step()
        bad = spoiled(subject, value)
        seen = subject.step(bad if which == "first" else None, bad if which == "second" else None)
        expect_bits(seen.after, seen.before, f"{value} in the {which} pass changes the weights")
        untouched.number += 1
        expect_bits(subject.step().after, untouched.step().after, f"{value} in the {which} pass leaves a trace in the state")


@conformance("inf in first pass")
def inf_in_first_pass(adapter: Adapter) -> None:
    """An inf or NaN in the first pass skips the step: weights and moments keep their bits."""
    _skips(adapter, "first")


@conformance("inf in second pass")
def inf_in_second_pass(adapter: Adapter) -> None:
    """An inf or NaN in the second pass skips the step: weights and moments keep their bits."""
    _skips(adapter, "second")


@conformance("exception")
def exception(adapter: Adapter) -> None:
    """When the second pass raises (or Ctrl-C is pressed), the weights come back, and training can go on."""
    for kind in (RuntimeError, KeyboardInterrupt):
        subject, untouched = Subject(adapter), Subject(adapter)
        start = subject.weights()

        def stop(kind: type[BaseException] = kind) -> Tensor:
            raise kind("out of memory")

        try:
            subject.step(second=stop, drive=adapter.guarded_step)
        except (RuntimeError, KeyboardInterrupt) as error:
            if str(error) != "out of memory":
                raise
        else:
            raise Failure("the exception of the second pass was swallowed")
        expect_close(subject.weights(), start, f"{kind.__name__} in the second pass leaves the weights perturbed")
        expect_close(subject.step().after, untouched.step().after, "the next step is another one")
