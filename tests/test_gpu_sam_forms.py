"""SAM's windows, variants and functional perturbation on a GPU: against the CPU, and without waiting for the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import GSAM, TRAM, FriendlySAM, LookSAM, MomentumSAM, PreconditionedSAM, SAMWindow, StableSAM

from .gpu import DEVICE, needs_gpu, no_sync

pytestmark = needs_gpu
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "stable": (StableSAM, {}),
    "gsam": (GSAM, {}),
    "look": (LookSAM, {"interval": 2}),
    "friendly": (FriendlySAM, {}),
    "momentum": (MomentumSAM, {}),
    "preconditioned": (PreconditionedSAM, {}),
}
FUSED = {"fused": True, "lr": 1e-2, "eps": 1e-3}


def network(device: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    layers = nn.Linear(20, 70), nn.Dropout(dropout), nn.GELU(), nn.LayerNorm(70), nn.Linear(70, 7)
    return nn.Sequential(*layers).to(device, dtype)


def micro_batches(device: str, n: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(6)
    return [(torch.randn(32, 20).to(device), torch.randint(7, (32,)).to(device)) for _ in range(n)]


def runner(model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> Any:
    def forward_backward(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return forward_backward


@pytest.mark.parametrize("options", [{}, {"ascent_fraction": 0.5}, {"per_micro_batch": True}])
def test_windows_agree_with_the_cpu_and_wait_for_nothing(options: dict[str, Any]) -> None:
    results = []
    for device in (DEVICE, "cpu"):
        model = network(device)
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, **FUSED)
        window = SAMWindow(opt, runner(model), **options)
        batches = micro_batches(device)
        window.run(batches)  # allocates
        opt.step()
        with no_sync():
            for _ in range(3):
                window.run(batches)
                opt.step()
        results.append([p.detach().cpu() for p in model.parameters()])
        assert opt.skipped_steps == 0
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mode", ["same", "independent"])
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_dropout_masks_on_the_device(mode: str, per_micro_batch: bool) -> None:
    model = network(DEVICE, 0.5)
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    opt = SAM(model.parameters(), torch.optim.SGD, rho=1e-6, lr=0.0, dropout_rng=mode)
    SAMWindow(opt, runner(model), per_micro_batch=per_micro_batch).run(micro_batches(DEVICE))
    order = [0, 0, 1, 1, 2, 2, 3, 3] if per_micro_batch else [0, 1, 2, 3] * 2
    pairs: dict[int, list[Tensor]] = {}
    for number, mask in zip(order, masks, strict=True):
        pairs.setdefault(number, []).append(mask)
    assert all(torch.equal(*pair) == (mode == "same") for pair in pairs.values())
    assert not torch.equal(pairs[0][0], pairs[1][0])
    masks.clear()
    batch = micro_batches(DEVICE)[0]
    opt.step(lambda: runner(model)(batch))
    assert torch.equal(*masks) == (mode == "same")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_with_the_cpu_and_wait_for_nothing(name: str) -> None:
    variant, options = VARIANTS[name]
    results = []
    for device in (DEVICE, "cpu"):
        model = network(device)
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, variant=variant(), **options, **FUSED)
        batches = micro_batches(device)
        for batch in batches[:2]:
            opt.step(lambda batch=batch, model=model: runner(model)(batch))
        with no_sync():
            for batch in batches:
                opt.step(lambda batch=batch, model=model: runner(model)(batch))
        results.append([p.detach().cpu() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_tram_takes_its_radius_from_the_device() -> None:
    model, tram = network(DEVICE), TRAM()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=1.0, adaptive=True, variant=tram, **FUSED)
    batch = micro_batches(DEVICE)[0]

    def closure() -> Tensor:
        tram.observe(batch[0].square().mean())
        return runner(model)(batch)

    opt.step(closure)
    with no_sync():
        opt.step(closure)
    assert opt.report.intended_norm.item() > 0


@pytest.mark.parametrize("unscale", [False, True])
def test_an_ascent_overflow_shrinks_the_scale_without_a_second_gradient_for_all(unscale: bool) -> None:
    model = network(DEVICE)
    spare = nn.Linear(20, 3).to(DEVICE)  # takes part in the ascent only
    opt = SAM([*model.parameters(), *spare.parameters()], torch.optim.AdamW, rho=0.1, weight_decay=0.5, **FUSED)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    x, y = micro_batches(DEVICE)[0]
    before = [p.detach().clone() for p in (*model.parameters(), *spare.parameters())]
    for factor in (1.0, math.inf):
        opt.zero_grad()
        scaler.scale((nn.functional.cross_entropy(model(x), y) + spare(x).square().mean()) * factor).backward()
        opt.first_step(zero_grad=True)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        assert all(p.grad is None for p in spare.parameters())
        if unscale:
            scaler.unscale_(opt)
        after = [p.detach().clone() for p in model.parameters()] if factor != 1.0 else []
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert opt.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(spare.parameters(), before[-2:], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after, strict=True))


def test_steps_between_two_ascents_wait_for_nothing_under_a_scaler() -> None:
    model = network(DEVICE)
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, interval=3, **FUSED)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=1000)
    window = SAMWindow(opt, runner(model, scaler))

    batches = micro_batches(DEVICE, 2)

    def steps(n: int) -> None:
        for _ in range(n):
            window.run(batches)
            scaler.step(opt)
            scaler.update()

    steps(3)  # allocates
    with no_sync():
        steps(6)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_functional_product_is_rounded_once(dtype: torch.dtype) -> None:
    """Shifts below half a unit in the last place survive on average; added to a rounded output none would."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, bias=False).to(DEVICE, dtype)
    x = torch.randn(256, 512).to(DEVICE, dtype)
    direction = torch.randn(512, 512).to(DEVICE, dtype)
    rho = 0.02 if dtype == torch.bfloat16 else 0.0025
    opt = SAM(layer.parameters(), torch.optim.SGD, rho=rho, lr=0.0, perturb="functional", model=layer)
    clean = layer(x).double()
    layer.weight.grad = direction.clone()
    with no_sync():
        opt.first_step(zero_grad=True)
        moved = layer(x).double() - clean
    opt.restore_()
    shift = x.double() @ (rho * direction.double() / direction.double().norm()).T
    assert (shift.abs() < 0.5 * torch.finfo(dtype).eps * clean.abs() / 2).double().mean() > 0.5  # most are that small
    assert ((moved * shift).sum() / shift.square().sum()).item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_functional_training_agrees_with_stored(autocast: torch.dtype | None) -> None:
    results = []
    for functional in (False, True):
        model = network(DEVICE)
        more = {"perturb": "functional", "model": model} if functional else {}
        opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.5, **more, **FUSED)
        for x, y in micro_batches(DEVICE):

            def closure(x: Tensor = x, y: Tensor = y, model: nn.Module = model) -> Tensor:
                with torch.autocast(DEVICE, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                    loss = nn.functional.cross_entropy(model(x).float(), y)
                loss.backward()
                return loss

            opt.step(closure)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in network(DEVICE).parameters()])
    loose = 1e-4 if autocast is None else 0.1
    assert (results[0] - results[1]).norm() <= loose * (results[0] - start).norm()
