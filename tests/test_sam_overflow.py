"""Gradients that are not finite, in either pass, with and without GradScaler."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from fastpost import SAM

from .small import BASES, X, all_bits, closure_of, loss_of, network, same_state, unchanged


@pytest.mark.parametrize("base", ["adamw", "adamw fused"])
@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
def test_a_non_finite_gradient_skips_the_step_without_a_trace(backend: str, overflowing: str, base: str) -> None:
    cls, options = BASES[base]
    model = network()
    opt = SAM(model.parameters(), cls, rho=0.1, **options)
    opt.step(closure_of(model))
    before, state = all_bits(model), copy.deepcopy(opt.state_dict())
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        loss = loss_of(model) * (math.inf if passes == (1 if overflowing == "ascent" else 2) else 1.0)
        loss.backward()
        return loss

    opt.step(closure)
    assert unchanged(model, before)
    assert same_state(state, opt.state_dict())
    assert opt.skipped_steps == 1
    opt.step(closure_of(model))
    assert opt.skipped_steps == 1
    assert not unchanged(model, before)


@pytest.mark.parametrize("overflowing", ["ascent", "descent"])
def test_a_step_after_the_block_is_guarded_too(overflowing: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    before = all_bits(model)
    (loss_of(model) * (math.inf if overflowing == "ascent" else 1.0)).backward()
    with opt.perturbed():
        (loss_of(model) * (math.inf if overflowing == "descent" else 1.0)).backward()
    opt.step()
    assert unchanged(model, before)
    assert opt.skipped_steps == 1
    # An overflow in a step that was given up does not haunt the next one.
    opt.zero_grad()
    (loss_of(model) * math.inf).backward()
    with pytest.raises(RuntimeError, match="out"), opt.perturbed():
        raise RuntimeError("out")
    opt.zero_grad()
    loss_of(model).backward()
    opt.step()
    assert opt.skipped_steps == 1
    assert not unchanged(model, before)


def test_an_all_zero_gradient_perturbs_nothing_and_is_no_overflow(backend: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    before = all_bits(model)

    def closure() -> Tensor:
        loss = sum((p * 0).sum() for p in model.parameters())
        loss.backward()
        return loss

    opt.step(closure)
    assert unchanged(model, before)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("overflowing", [None, "ascent", "descent"])
def test_the_gradscaler_recipe(overflowing: str | None) -> None:
    model, plain = network(), network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    bad = torch.full_like(X, math.inf)
    scaler.scale(loss_of(model, bad if overflowing == "ascent" else X)).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(loss_of(model, bad if overflowing == "descent" else X)).backward()
    scaler.step(opt)
    scaler.update()
    assert not opt.is_perturbed
    if overflowing:
        assert unchanged(model, all_bits(plain))
        assert scaler.get_scale() == 2.0**9
        assert opt.skipped_steps == 1
    else:
        reference = SAM(plain.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
        reference.step(closure_of(plain))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p - q).abs().max() <= 1e-6
        assert scaler.get_scale() == 2.0**10
