"""Gradients that are not finite, in either pass, with and without GradScaler."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import LookSAM, Variant, hooks

from .conftest import bits
from .small import BASES, X, Y, all_bits, closure_of, loss_of, network, same_state, unchanged


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


@pytest.mark.parametrize("variant", [None, LookSAM])
@pytest.mark.parametrize("base", ["adamw", "adamw fused"])
def test_a_step_between_two_ascents_is_skipped_too(base: str, variant: type[Variant] | None) -> None:
    cls, options = BASES[base]
    model = network()
    opt = SAM(model.parameters(), cls, rho=0.1, interval=3, variant=None if variant is None else variant(), **options)
    opt.step(closure_of(model))
    assert not opt.ascends
    before, state = all_bits(model), copy.deepcopy(opt.base_optimizer.state_dict())
    (loss_of(model) * math.inf).backward()
    opt.step()
    assert unchanged(model, before)
    assert same_state(state, opt.base_optimizer.state_dict())
    assert opt.skipped_steps == 1
    opt.zero_grad()
    opt.step(closure_of(model))
    assert opt.skipped_steps == 1
    assert not unchanged(model, before)


def test_a_plain_step_that_does_not_count_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed's checkpoints make one, at a learning rate of 0, on those ranks alone that have no state: whoever
    looks together with other ranks would wait for them."""
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.1, interval=2)
    opt.step(closure_of(model))
    looked = []
    plain = hooks.OverflowGuard.check
    monkeypatch.setattr(hooks.OverflowGuard, "check", lambda *args: looked.append(args) or plain(*args))
    loss_of(model).backward()
    for rate, looks in ((0.0, 0), (0.1, 1)):
        opt.param_groups[0]["lr"] = rate
        opt.step()
        assert len(looked) == looks


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


# -- an ascent overflow on a device that nobody wants to wait for -----------------------------------------------------------


@pytest.fixture
def far_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors treated as those of a device whose values cannot be read without waiting."""
    monkeypatch.setattr(hooks, "is_on_cpu", lambda norm: False)


def two_branches() -> tuple[nn.Module, SAM, torch.amp.GradScaler]:
    torch.manual_seed(3)
    model = nn.ModuleDict({"used": nn.Linear(20, 3), "other": nn.Linear(20, 3), "tiny": nn.Linear(1, 1)})
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, weight_decay=0.5)
    return model, opt, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)


def ascend_on_all_then_descend_on_one(model, opt, scaler, factor: float = 1.0) -> None:
    opt.zero_grad()
    loss = sum(nn.functional.cross_entropy(model[name](X), Y) for name in ("used", "other"))
    loss = loss + model["tiny"](torch.ones(1, 1)).sum()
    scaler.scale(loss * factor).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(nn.functional.cross_entropy(model["used"](X), Y)).backward()


def test_parameters_without_a_second_gradient_stay_without_one(far_device: None) -> None:
    """A gradient of zero is not none: weight decay would act, moments would decay and step counts go up."""
    model, opt, scaler = two_branches()
    before = {name: bits(p) for name, p in model.named_parameters()}
    for _ in range(3):
        ascend_on_all_then_descend_on_one(model, opt, scaler)
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {"used.weight", "used.bias"}
        scaler.step(opt)
        scaler.update()
    changed = {n for n, p in model.named_parameters() if not torch.equal(bits(p), before[n])}
    assert changed == {"used.weight", "used.bias"}
    assert len(opt.state) == 2
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_in_the_ascent_alone_reaches_the_scaler(far_device: None, unscale: bool) -> None:
    model, opt, scaler = two_branches()
    ascend_on_all_then_descend_on_one(model, opt, scaler)
    scaler.step(opt)
    scaler.update()
    before, state = all_bits(model), copy.deepcopy(opt.state_dict())
    ascend_on_all_then_descend_on_one(model, opt, scaler, factor=math.inf)
    if unscale:  # as trainers do before they clip
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert opt.skipped_steps == 1
    assert unchanged(model, before)
    assert same_state(state, opt.state_dict())
    ascend_on_all_then_descend_on_one(model, opt, scaler)  # and nothing of it is left
    assert all(p.grad.isfinite().all() for p in model["used"].parameters())
    scaler.step(opt)
    assert opt.skipped_steps == 1
    assert not unchanged(model, before)


def assign(model: nn.Module, loss: Tensor, in_place: bool) -> None:
    """Gradients that no hook sees: from `torch.autograd.grad`."""
    params = list(model.parameters())
    for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
        if in_place and p.grad is not None:
            p.grad.copy_(g)
        else:
            p.grad = g


@pytest.mark.parametrize("device", ["at hand", "far"])
@pytest.mark.parametrize("clears", ["first_step", "model", "nobody", "zeros"])
@pytest.mark.parametrize("unscale", [False, True])
def test_an_overflow_in_the_ascent_reaches_the_scaler_where_the_second_gradient_is_assigned(
    request: pytest.FixtureRequest, device: str, clears: str, unscale: bool
) -> None:
    if device == "far":
        request.getfixturevalue("far_device")
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for factor in (1.0, math.inf, 1.0):
        before, state, scale = all_bits(model), copy.deepcopy(opt.state_dict()), scaler.get_scale()
        skipped = opt.skipped_steps
        opt.zero_grad()
        assign(model, scaler.scale(loss_of(model) * factor), in_place=False)
        opt.first_step(zero_grad=clears == "first_step")
        assert opt.param_groups[0]["lr"] == 1e-2  # a look at the groups between the passes, as for a log, is harmless
        if clears == "model":
            model.zero_grad()
        elif clears == "zeros":
            opt.zero_grad(set_to_none=False)
        assign(model, scaler.scale(loss_of(model)), in_place=clears in ("nobody", "zeros"))
        if unscale:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(opt)
        scaler.update()
        if math.isinf(factor):
            assert unchanged(model, before)
            assert same_state(state, opt.state_dict())
            assert scaler.get_scale() == scale / 2
            assert opt.skipped_steps == skipped + 1
        else:
            assert not unchanged(model, before)
            assert scaler.get_scale() == scale
            assert opt.skipped_steps == skipped
            assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dropped_by", ["optimizer", "model", "twice"])
def test_an_overflow_survives_gradients_being_dropped_by_hand(far_device: None, dropped_by: str) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2)
    before = all_bits(model)
    (loss_of(model) * math.inf).backward()
    opt.first_step()
    (model if dropped_by == "model" else opt).zero_grad()
    loss_of(model).backward()
    if dropped_by == "twice":
        opt.zero_grad()
        loss_of(model).backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters())
    opt.step()
    assert unchanged(model, before)


def test_the_whole_overflow_story_holds_without_reading_the_device(far_device: None) -> None:
    for overflowing in ("ascent", "descent"):
        test_a_non_finite_gradient_skips_the_step_without_a_trace("cpu", overflowing, "adamw")
        test_a_step_after_the_block_is_guarded_too(overflowing)
    test_the_gradscaler_recipe("ascent")


def test_hooks_leave_with_the_optimizer(far_device: None) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    opt.step(closure_of(model))
    assert all(p._post_accumulate_grad_hooks for p in model.parameters())
    del opt
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_overflow_in_a_step_that_is_not_made_does_not_haunt_the_next(far_device: None) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    (loss_of(model) * math.inf).backward()
    with opt.perturbed():
        loss_of(model).backward()
    opt.zero_grad()  # given up
    before = all_bits(model)
    loss_of(model).backward()
    with opt.perturbed():
        loss_of(model).backward()
    opt.step()
    assert opt.skipped_steps == 0
    assert not unchanged(model, before)
