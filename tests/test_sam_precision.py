"""Mixed precision: autocast, loss scaling, and the traps between the two."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM

from .small import all_bits, closure_of, loss_of, network, unchanged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("overflowing", [None, "ascent", "descent"])
def test_autocast_with_a_scaler(dtype: torch.dtype, overflowing: str | None) -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    before = all_bits(model)
    losses = []
    for stage in ("ascent", "descent"):
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model) * (math.inf if overflowing == stage else 1.0)
        losses.append(loss.item())
        scaler.scale(loss).backward()
        if stage == "ascent":
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double() / 2.0**12
            opt.first_step(zero_grad=True)
    scaler.unscale_(opt)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(opt)
    scaler.update()
    assert unchanged(model, before) == (overflowing is not None)
    assert scaler.get_scale() == (2.0**11 if overflowing else 2.0**12)
    if not overflowing:  # to first order the loss rises by rho |g|; this network is smooth
        assert losses[1] - losses[0] == pytest.approx(0.5 * gradient.norm().item(), rel=0.3)


def test_both_passes_inside_one_autocast_region_see_their_own_weights() -> None:
    """autocast keeps its casts of weights until the region is left; those of w must not serve at w + e, nor the reverse."""
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.0)
    outputs = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for stage in range(3):
            loss = loss_of(model)
            outputs.append(loss.item())
            if stage == 0:
                loss.backward()
                opt.first_step(zero_grad=True)
            if stage == 1:
                loss.backward()
                opt.second_step()
    assert outputs[1] > outputs[0] + 0.1
    assert outputs[2] == outputs[0]


def test_a_closure_through_the_scaler_is_refused_not_applied_1024_times_too_large() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = all_bits(model)

    def closure() -> Tensor:
        loss = loss_of(model)
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(RuntimeError, match=r"closure cannot go through GradScaler\.step"):
        scaler.step(opt, closure)  # as Accelerate passes it: by position
    assert unchanged(model, before)
    opt.step(closure_of(model))  # and the scaler has left no trace
    assert not unchanged(model, before)


def test_a_base_step_that_raises_leaves_no_trace_of_the_scaler() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    opt.first_step(zero_grad=True)
    scaler.scale(loss_of(model)).backward()
    opt.base_optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        scaler.step(opt)
    assert not hasattr(opt, "found_inf")
    assert not hasattr(opt, "grad_scale")
    assert not opt.is_perturbed
