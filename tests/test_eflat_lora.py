"""EFlat-LoRA against its equations in float64, with every matrix of full size formed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from fastpost.integrations.peft import EFlatLoRA
from tests.by_hand import language_loss, largest_difference, rows_of_text
from tests.conftest import same_bits
from tests.test_peft import RHO, lora, trained, windows
from tests.tiny import build

SCALE = 6 / 3


def pairs(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {n: (m.lora_A["default"].weight, m.lora_B["default"].weight) for n, m in layers.items()}


@pytest.mark.parametrize("kind", ["llama", "causal"])
def test_eflat_lora_is_its_equations(kind: str) -> None:
    model, other = lora(kind, live=False), lora(kind, live=False)
    eflat = EFlatLoRA(model, RHO, beta=0.7)
    opt = torch.optim.SGD(trained(model), lr=0.5)
    eflat.attach(opt)
    moved = {name: torch.zeros_like(b) for name, (_, b) in pairs(other).items()}
    for [rows] in windows(6):
        for name, (_, b) in pairs(other).items():  # to B + E and, after the pass, back
            b.data.add_(moved[name])
        loss = language_loss(other, rows)
        loss.backward()
        for name, (a, b) in pairs(other).items():
            of_b = b.grad @ torch.linalg.pinv(a.detach().T) / SCALE
            of_a = torch.linalg.pinv(b.detach().T) @ a.grad / SCALE
            g = (of_b + of_a) / 2
            b.data.sub_(moved[name])
            new = RHO * g / g.norm() @ torch.linalg.pinv(a.detach()) / SCALE
            moved[name] = 0.3 * moved[name] + 0.7 * new
        for p in trained(other):
            p.data.sub_(0.5 * p.grad)
            p.grad = None

        ours = language_loss(model, rows)
        assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
        ours.backward()
        opt.step()
        opt.zero_grad()
        state = eflat.state_dict()
        assert state.keys() == moved.keys()
        assert largest_difference((state[name], e) for name, e in moved.items()) <= 1e-12
        assert largest_difference(zip(trained(model), trained(other), strict=True)) <= 1e-12


@pytest.mark.parametrize("form", ["closure", "named", "lightning", "twice"])
def test_a_closure_makes_the_gradients_that_are_read(form: str, tmp_path: Path) -> None:
    """As Lightning's automatic optimisation has it: E is that of the loop without a closure, after every step."""

    def made() -> tuple[Any, Any, EFlatLoRA]:
        model = lora("causal", live=False)
        opt = torch.optim.SGD(trained(model), lr=0.5)
        eflat = EFlatLoRA(model, RHO, beta=0.7)
        eflat.attach(opt)
        return model, opt, eflat

    model, opt, eflat = made()
    expected = []
    for [rows] in windows(4):
        opt.zero_grad()
        language_loss(model, rows).backward()
        opt.step()
        expected.append(eflat.state_dict())
    other, opt, eflat = made()
    found = []
    if form == "lightning":

        class Module(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = other

            def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
                return language_loss(self.model, rows)

            def on_train_batch_end(self, *_: Any) -> None:
                found.append(eflat.state_dict())

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return opt

        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
        trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
        trainer.fit(Module(), DataLoader(torch.stack([rows for [rows] in windows(4)]), batch_size=None))
    for [rows] in windows(4) if form != "lightning" else []:

        def closure(rows: Tensor = rows) -> Tensor:
            opt.zero_grad()
            loss = language_loss(other, rows)
            loss.backward()
            return loss

        def twice(closure: Any = closure) -> Tensor:
            assert same_bits(closure(), closure())
            return closure()

        if form == "named":
            opt.step(closure=closure)
        else:
            opt.step(closure if form == "closure" else twice)
        found.append(eflat.state_dict())
    for mine, theirs in zip(found, expected, strict=True):
        assert largest_difference((mine[name], e) for name, e in theirs.items()) == 0
    assert largest_difference(zip(trained(model), trained(other), strict=True)) == 0
    assert any(bool(e.any()) for e in expected[0].values())


def test_an_optimizer_may_run_its_closure_several_times() -> None:
    """Each time at the E of the step's beginning; what the last one leaves counts."""
    model = lora("causal", live=False)
    opt = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=3, max_eval=3, tolerance_grad=0, tolerance_change=0)
    eflat = EFlatLoRA(model, RHO, beta=0.7)
    eflat.attach(opt)
    for [rows] in windows(3):
        start, seen = eflat.state_dict(), []

        def closure(rows: Tensor = rows, seen: list[Any] = seen) -> Tensor:
            seen.append(eflat.state_dict())
            opt.zero_grad()
            loss = language_loss(model, rows)
            loss.backward()
            return loss

        opt.step(closure)
        assert len(seen) == 3
        for state in seen:
            assert largest_difference((state[name], e) for name, e in start.items()) == 0
        assert largest_difference((eflat.state_dict()[name], e) for name, e in start.items()) > 0


def test_the_perturbation_raises_the_loss_is_off_in_eval_mode_and_goes_away(tmp_path: Path) -> None:
    model = lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    eflat = EFlatLoRA(model, rho=0.5)
    rows = rows_of_text(4)
    start = float(language_loss(model, rows).detach())
    language_loss(model, rows).backward()
    eflat.update()
    risen = float(language_loss(model, rows).detach())
    assert risen > start + 0.02
    model.eval()
    with torch.no_grad():
        assert float(language_loss(model, rows)) == pytest.approx(start, abs=1e-12)
    model.train()
    assert all(same_bits(p, before[name]) for name, p in model.named_parameters())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama", dtype=torch.float64), tmp_path)
    assert largest_difference((p, pairs(model)[n][1]) for n, (_, p) in pairs(again).items()) == 0

    kept = eflat.state_dict()
    eflat.remove()
    assert float(language_loss(model, rows).detach()) == start
    resumed = EFlatLoRA(model, rho=0.5)
    resumed.load_state_dict(kept)
    assert float(language_loss(model, rows).detach()) == risen
    for p in trained(model):
        p.grad *= 1e-3  # clipped
    resumed.update()
    clipped = resumed.state_dict()
    resumed.load_state_dict(kept)
    for p in trained(model):
        p.grad *= 1e3
    resumed.update()
    assert largest_difference((clipped[n], e) for n, e in resumed.state_dict().items()) <= 1e-12
    held = resumed.state_dict()
    for p in trained(model):
        p.grad.fill_(torch.inf)
    resumed.update()
    assert all(same_bits(held[n], e) for n, e in resumed.state_dict().items())


def test_a_state_from_before_the_first_step_begins_at_zero() -> None:
    model, rows = lora(), rows_of_text(4)
    eflat = EFlatLoRA(model, rho=0.5)
    fresh = eflat.state_dict()
    assert fresh.keys() == pairs(model).keys()
    assert not any(bool(e.any()) for e in fresh.values())
    start = language_loss(model, rows)
    start.backward()
    eflat.update()
    eflat.load_state_dict(fresh)
    assert same_bits(language_loss(model, rows).detach(), start.detach())


def test_sixteen_bits() -> None:
    model = lora(dtype=torch.bfloat16)
    opt = torch.optim.AdamW(trained(model), lr=1e-3)
    eflat = EFlatLoRA(model)
    eflat.attach(opt)
    for [rows] in windows(3):
        language_loss(model, rows).backward()
        opt.step()
        opt.zero_grad()
    assert all(bool(e.isfinite().all()) and bool(e.any()) for e in eflat.state_dict().values())


def test_eflat_lora_refusals() -> None:
    with pytest.raises(TypeError, match="PeftModel"):
        EFlatLoRA(build("llama"))
    with pytest.raises(ValueError, match="rho"):
        EFlatLoRA(lora(), rho=-1)
    for beta in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="beta must lie"):
            EFlatLoRA(lora(), beta=beta)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        EFlatLoRA(lora(), adapter="other")
    with pytest.raises(TypeError, match="no plain LoRA"):
        EFlatLoRA(lora(use_dora=True))
    model = lora()
    eflat = EFlatLoRA(model)
    with pytest.raises(ValueError, match="replaced already"):
        EFlatLoRA(model)
    with pytest.raises(ValueError, match="lacks"):
        eflat.attach(torch.optim.SGD(trained(model)[:1], lr=0.1))
    with pytest.raises(TypeError, match="beta must be a number, not 'a'"):
        EFlatLoRA(lora(), beta="a")
    with pytest.raises(ValueError, match="no layer of this model"):
        eflat.load_state_dict({"elsewhere": torch.zeros(1)})
    language_loss(model, rows_of_text(4)).backward()
    eflat.update()
    state = eflat.state_dict()
    first, *rest = state
    for kept in ({}, {name: state[name] for name in rest}):
        with pytest.raises(ValueError, match=rf"lacks E of {len(state) - len(kept)} of {len(state)} layers \({first}"):
            eflat.load_state_dict(kept)
    with pytest.raises(ValueError, match=f"E of {first} in the state is not finite"):
        eflat.load_state_dict({**state, first: state[first] * torch.nan})
    for wrong, found in ((None, "not NoneType"), ({**state, first: 0.0}, f"E of {first} must be a tensor")):
        with pytest.raises(TypeError, match=found):
            eflat.load_state_dict(wrong)
    assert all(same_bits(e, state[name]) for name, e in eflat.state_dict().items())
    frozen = lora()
    pairs(frozen)[next(iter(pairs(frozen)))][0].requires_grad_(False)
    with pytest.raises(TypeError, match="does not train"):
        EFlatLoRA(frozen)
