"""Decoupled WSAM against its equation in float64: the base optimizer on g, then a step along g' - g."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import WSAM, DecoupledWSAM, ExternalSAM, SAMWindow

from .conftest import same_bits
from .small import X, all_bits, closure_of, loss_of, network, unchanged
from .test_sam_variants import BATCHES, LR, RHO, Problem, by_closure, by_window, loss_on, weights

GAMMA = 0.8
WEIGHT = GAMMA / (1 - GAMMA)


def by_equation(problem: Problem, base: type, clip: float | None = None, **options: Any):
    w = problem.w.clone().requires_grad_()
    opt = base([w], lr=LR, **options)
    for x in BATCHES:
        g = problem.gradient(w.detach(), x)
        h = problem.gradient(w.detach() + RHO * g / g.norm(), x)
        factor = 1.0 if clip is None else min(1.0, clip / float(g.norm()))
        w.grad = g * factor
        opt.step()
        up = -1 if options.get("maximize") else 1
        with torch.no_grad():
            w -= up * LR * WEIGHT * factor * (h - g)
        yield w.detach().clone()


def made(model: nn.Module, base: type, **options: Any) -> SAM:
    wsam = DecoupledWSAM(GAMMA)
    opt = SAM(model.parameters(), base, rho=RHO, lr=LR, variant=wsam, **options)
    wsam.attach(opt)
    return opt


@pytest.mark.parametrize("form", [by_closure, by_window])
@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.AdamW, {"fused": True})],
)
def test_the_equation(base: type, options: dict[str, Any], form) -> None:
    problem = Problem()
    model, coupled = copy.deepcopy(problem.model), copy.deepcopy(problem.model)
    opt = made(model, base, **options)
    other = SAM(coupled.parameters(), base, rho=RHO, lr=LR, variant=WSAM(GAMMA), **options)
    for x, expected in zip(BATCHES, by_equation(problem, base, **options), strict=True):
        form(model, opt, x)
        form(coupled, other, x)
        assert float((weights(model) - expected).abs().max()) <= 1e-11
    assert float((weights(model) - weights(coupled)).abs().max()) > 1e-3


def test_for_plain_sgd_it_is_the_coupled_form() -> None:
    problem = Problem()
    model, coupled = copy.deepcopy(problem.model), copy.deepcopy(problem.model)
    opts = made(model, torch.optim.SGD), SAM(coupled.parameters(), torch.optim.SGD, rho=RHO, lr=LR, variant=WSAM(GAMMA))
    for x in BATCHES:
        by_closure(model, opts[0], x)
        by_closure(coupled, opts[1], x)
        assert float((weights(model) - weights(coupled)).abs().max()) <= 1e-13


def test_clipping_and_a_loss_scale_reach_the_sharpness() -> None:
    problem = Problem()
    model = copy.deepcopy(problem.model)
    opt = made(model, torch.optim.SGD, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_factor=2.0, growth_interval=1)
    for number, (x, expected) in enumerate(
        zip(BATCHES, by_equation(problem, torch.optim.SGD, 0.3, momentum=0.9), strict=True)
    ):
        for first in (True, False):
            scaler.scale(loss_on(model, x)).backward()
            if first:
                opt.first_step(zero_grad=True)
        if number:  # else nothing is clipped, and the scaler's step unscales
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        else:
            norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()) / scaler.get_scale()
            for p in model.parameters():
                p.grad.mul_(min(1.0, 0.3 / norm))
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert float((weights(model) - expected).abs().max()) <= 2e-7  # clip_grad_norm_ adds 1e-6 to the norm


def test_maximize_and_steps_without_an_ascent() -> None:
    problem = Problem()
    model, mirror = copy.deepcopy(problem.model), copy.deepcopy(problem.model)
    up, down = made(model, torch.optim.SGD, momentum=0.9, maximize=True), made(mirror, torch.optim.SGD, momentum=0.9)

    def negated() -> Tensor:
        loss = -loss_on(mirror, BATCHES[0])
        loss.backward()
        return loss

    for _ in range(2):
        by_closure(model, up, BATCHES[0])
        down.step(negated)
        assert float((weights(model) - weights(mirror)).abs().max()) <= 1e-13
    plain, spaced = (copy.deepcopy(problem.model) for _ in range(2))
    opt, sgd = made(spaced, torch.optim.SGD, interval=2), torch.optim.SGD(plain.parameters(), lr=LR)
    by_closure(spaced, opt, BATCHES[0])
    plain.load_state_dict(spaced.state_dict())
    by_closure(spaced, opt, BATCHES[1])
    loss_on(plain, BATCHES[1]).backward()
    sgd.step()
    assert float((weights(spaced) - weights(plain)).abs().max()) <= 1e-15


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_moves_nothing_and_a_step_given_up_leaves_nothing(fused: bool) -> None:
    model = network()
    opt = made(model, torch.optim.AdamW, fused=fused)
    before, passes = all_bits(model), []

    def overflowing() -> Tensor:
        passes.append(1)
        loss = closure_of(model)()
        if len(passes) == 2:
            for p in model.parameters():
                p.grad.fill_(math.inf)
        return loss

    opt.step(overflowing)
    assert opt.skipped_steps == 1
    assert unchanged(model, before)
    closure_of(model)()
    opt.first_step(zero_grad=True)
    closure_of(model)()
    opt.abandon()
    assert unchanged(model, before)
    twin = network()
    adamw = torch.optim.AdamW(twin.parameters(), lr=LR, fused=fused)
    for m in (model, twin):
        closure_of(m)()
    opt.step()  # plain: nothing of the step given up is in it
    adamw.step()
    assert unchanged(model, all_bits(twin))


def by_two_calls(opt: SAM, backward, scaler) -> None:
    backward(0)
    opt.first_step(zero_grad=True)
    backward(1)
    opt.second_step(zero_grad=True)


def by_a_closure(opt: SAM, backward, scaler) -> None:
    passes = iter((0, 1))
    opt.step(lambda: backward(next(passes)))


def by_perturbed(opt: SAM, backward, scaler) -> None:
    backward(0)
    with opt.perturbed():
        backward(1)
    opt.step()


def by_a_window(opt: SAM, backward, scaler) -> None:
    SAMWindow(opt, lambda _: backward(int(opt.is_perturbed))).run([0, 1])
    opt.step()


def by_scaler(opt: SAM, backward, scaler) -> None:
    with opt.perturbed() if backward(0) is not None else pytest.fail("no loss"):
        backward(1)
    scaler.step(opt)


def by_unscaling(opt: SAM, backward, scaler) -> None:
    with opt.perturbed() if backward(0) is not None else pytest.fail("no loss"):
        backward(1)
    scaler.unscale_(opt)
    scaler.step(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", [by_two_calls, by_a_closure, by_perturbed, by_a_window, by_scaler, by_unscaling])
def test_a_second_gradient_that_overflows_in_backward_skips_the_step(form, fused: bool, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    opt = made(model, torch.optim.AdamW, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if form in (by_scaler, by_unscaling) else None
    before = all_bits(model)
    factors = [1.0, math.inf]

    def backward(second: int) -> Tensor:
        loss = loss_of(model, X.to(dtype)) * factors[second]
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    for number in (1, 2):
        form(opt, backward, scaler)
        if scaler is not None:
            scaler.update()
            assert scaler.get_scale() == 4.0 / 2**number
        opt.zero_grad()
        assert opt.skipped_steps == number
        assert unchanged(model, before)
        assert not opt.base_optimizer.state
        factors = [math.inf, 1.0]  # and then the first one
    factors = [1.0, 1.0]
    form(opt, backward, scaler)
    assert opt.skipped_steps == 2
    assert not any(same_bits(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_finite_gradients_whose_difference_overflows_skip_the_step() -> None:
    model = network()
    opt = made(model, torch.optim.SGD)
    before = all_bits(model)
    for g in (3e38, -3e38):
        for p in model.parameters():
            p.grad = torch.full_like(p, g)
        if g > 0:
            opt.first_step(zero_grad=True)
    opt.second_step()
    assert opt.skipped_steps == 1
    assert unchanged(model, before)


def test_an_overflow_that_is_clipped_away_leaves_no_sharpness() -> None:
    model = network()
    opt = made(model, torch.optim.SGD)
    closure_of(model)()
    with opt.perturbed():
        (loss_of(model) * math.inf).backward()
    assert all(bool(p.grad.isnan().all()) for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad.fill_(1.0)
    opt.step()
    assert opt.skipped_steps == 0
    for w, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(p, w - LR)


def test_a_gradient_removed_after_the_second_pass_stays_missing() -> None:
    problem = Problem()
    model = copy.deepcopy(problem.model)
    opt = made(model, torch.optim.SGD)
    w, x = problem.w, BATCHES[0]
    g = problem.gradient(w, x)
    h = problem.gradient(w + RHO * g / g.norm(), x)
    loss_on(model, x).backward()
    with opt.perturbed():
        loss_on(model, x).backward()
    *_, last = model.parameters()
    last.grad = None
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)
    before = last.detach().clone()
    opt.step()
    assert same_bits(last, before)
    expected = w - LR * 0.5 * (g + WEIGHT * (h - g))
    kept = len(w) - last.numel()
    assert float((weights(model) - expected)[:kept].abs().max()) <= 1e-13


def test_attaching() -> None:
    model = network()
    wsam = DecoupledWSAM()
    opt = SAM(model.parameters(), torch.optim.SGD, lr=LR, variant=wsam)
    before = all_bits(model)
    with pytest.raises(RuntimeError, match=r"call attach\(opt\)"):
        opt.step(closure_of(model))
    opt.abandon()
    assert unchanged(model, before)
    for wrong in (torch.optim.SGD(model.parameters(), lr=LR), ExternalSAM(torch.optim.SGD(model.parameters(), lr=LR))):
        with pytest.raises(TypeError, match="in a loop, not"):
            wsam.attach(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attach it once"):
        DecoupledWSAM().attach(opt)
    two = DecoupledWSAM()
    bases = [torch.optim.SGD(m.parameters(), lr=LR) for m in (model[0], model[3])]
    with pytest.raises(ValueError, match="not several"):
        two.attach(SAM(None, bases, variant=two))
    wsam.attach(opt)
    with pytest.raises(ValueError, match="attach it once"):
        wsam.attach(opt)
    opt.step(closure_of(model))
    other, again = copy.deepcopy((model, opt))
    with pytest.raises(RuntimeError, match=r"call attach\(opt\)"):
        again.step(closure_of(other))
    again.abandon()
    again.variant.attach(again)

    with pytest.raises(ValueError, match="DecoupledWSAM does not serve fused_restore"):
        SAM(model.parameters(), torch.optim.AdamW, lr=LR, variant=DecoupledWSAM(), fused_restore=True)
    with pytest.raises(TypeError, match="DecoupledWSAM: gamma must be a number, not 'a'"):
        DecoupledWSAM("a")  # type: ignore[arg-type]
    before = all_bits(model)
    closure_of(model)()
    opt.first_step(zero_grad=True)
    closure_of(model)()
    with pytest.raises(RuntimeError, match="stepped at w"):
        opt.base_optimizer.step()
    opt.abandon()
    assert unchanged(model, before)

    gone = weakref.ref(opt)
    gc.disable()  # freed without a garbage collection
    try:
        del opt
        assert gone() is None
    finally:
        gc.enable()
