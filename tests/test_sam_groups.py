"""Parameter groups that others write: values scheduled or loaded, groups added to the base optimizer, maximised groups."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import FriendlySAM, SAMWindow

from .conftest import same_bits
from .small import X, all_bits, closure_of, loss_of, network, same_state, unchanged

# -- values ---------------------------------------------------------------------------------------------------------------

NONSENSE: dict[str, tuple[str, Any, type[Exception]]] = {
    "negative rho": ("rho", -0.05, ValueError),
    "rho nan": ("rho", math.nan, ValueError),
    "rho inf": ("rho", math.inf, ValueError),
    "rho below zero as a tensor": ("rho", torch.tensor(-1e-9), ValueError),
    "rho nan of numpy": ("rho", np.float32("nan"), ValueError),
    "rho as text": ("rho", "0.05", TypeError),
    "rho missing": ("rho", None, TypeError),
    "rho as truth": ("rho", True, TypeError),
    "several rho": ("rho", torch.ones(2), TypeError),
    "complex rho": ("rho", 0.1 + 0j, TypeError),
    "negative eta": ("eta", -0.01, ValueError),
    "eta nan": ("eta", math.nan, ValueError),
    "eta as text": ("eta", "0", TypeError),
    "adaptive as text": ("adaptive", "no", TypeError),
    "adaptive missing": ("adaptive", None, TypeError),
    "adaptive nan": ("adaptive", math.nan, TypeError),
    "several adaptive": ("adaptive", torch.ones(2, dtype=torch.bool), TypeError),
    "steps below zero": ("sam_steps", -1, ValueError),
    "half a step": ("sam_steps", 1.5, ValueError),
    "no steps": ("sam_steps", None, TypeError),
}


def trained(**options: Any) -> tuple[nn.Module, SAM]:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, **options)
    opt.step(closure_of(model))
    return model, opt


@pytest.mark.parametrize("form", ["two calls", "closure", "perturbed", "window"])
@pytest.mark.parametrize("what", [name for name, (key, _, _) in NONSENSE.items() if key != "sam_steps"])
def test_nonsense_in_a_group_is_refused_before_a_weight_moves(what: str, form: str) -> None:
    key, value, error = NONSENSE[what]
    model, opt = trained(variant=FriendlySAM())
    opt.zero_grad()
    loss_of(model).backward()
    before, state = all_bits(model), copy.deepcopy(opt.state_dict())
    opt.param_groups[0][key] = value
    forms = {
        "two calls": opt.first_step,
        "closure": lambda: opt.step(closure_of(model)),
        "perturbed": lambda: opt.perturbed().__enter__(),
        "window": lambda: SAMWindow(opt, lambda x: loss_of(model, x).backward()).run([X]),
    }
    with pytest.raises(error, match=f"SAM: {key} must be"):
        forms[form]()
    assert unchanged(model, before)
    assert not opt.is_perturbed
    opt.param_groups[0].update(rho=0.1, eta=0.0, adaptive=False)
    assert same_state(state, opt.state_dict())
    twin, other = trained(variant=FriendlySAM())
    opt.step(closure_of(model))  # nothing is left of the attempt, nor in the variant's memory
    other.step(closure_of(twin))
    assert unchanged(model, all_bits(twin))


@pytest.mark.parametrize("what", NONSENSE)
@pytest.mark.parametrize("bases", [1, 2])
def test_nonsense_in_a_state_is_refused_before_anything_is_loaded(what: str, bases: int) -> None:
    key, value, error = NONSENSE[what]
    model = network()
    params = list(model.parameters())
    parts = [params] if bases == 1 else [params[:2], params[2:]]
    opt = SAM(None, [torch.optim.AdamW(part, lr=1e-2) for part in parts], rho=0.1)
    opt.step(closure_of(model))
    kept = copy.deepcopy(opt.state_dict())
    opt.step(closure_of(model))
    state = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(kept)
    bad["param_groups"][-1][key] = value
    with pytest.raises(error, match=f"SAM: {key}"):
        opt.load_state_dict(bad)
    assert same_state(state, opt.state_dict())
    assert [g["sam_steps"] for g in opt.param_groups] == [2] * bases
    opt.load_state_dict(kept)
    assert [g["sam_steps"] for g in opt.param_groups] == [1] * bases


@pytest.mark.parametrize("what", [name for name, (key, _, _) in NONSENSE.items() if key != "sam_steps"])
def test_nonsense_in_a_new_group_is_refused_and_the_group_not_added(what: str) -> None:
    key, value, error = NONSENSE[what]
    model = network()
    params = list(model.parameters())
    with pytest.raises(error, match=f"SAM: {key} must be"):
        SAM([{"params": params, key: value}], torch.optim.SGD, lr=0.1)
    opt = SAM(params[:2], torch.optim.SGD, lr=0.1)
    with pytest.raises(error, match=f"SAM: {key} must be"):
        opt.add_param_group({"params": params[2:], key: value})
    assert len(opt.param_groups) == 1
    opt.base_optimizer.add_param_group({"params": params[2:], key: value})  # which asks nobody
    before = all_bits(model)
    loss_of(model).backward()
    with pytest.raises(error, match=f"SAM: {key} must be"):
        opt.first_step()
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rho", 0.1), ("rho", np.float64(0.1)), ("rho", torch.tensor(0.1, dtype=torch.float64)), ("rho", 0), ("rho", 0.0),
     ("eta", torch.tensor([0.5])), ("adaptive", np.bool_(True)), ("adaptive", 1), ("adaptive", torch.tensor(True))],
)  # fmt: skip
def test_numbers_of_all_kinds_are_taken(key: str, value: Any) -> None:
    plain = float(value) if key != "adaptive" else True
    model, twin = network(), network()
    opt, other = (SAM(m.parameters(), torch.optim.SGD, rho=0.3, adaptive=True, lr=0.1) for m in (model, twin))
    opt.param_groups[0][key] = value
    other.param_groups[0][key] = plain
    opt.step(closure_of(model))
    other.step(closure_of(twin))
    assert unchanged(model, all_bits(twin))


def test_a_state_with_another_number_of_parameters_is_refused_before_anything_is_loaded() -> None:
    model = network()
    params = list(model.parameters())
    opt = SAM(None, [torch.optim.AdamW(params[:2], lr=0.1), torch.optim.AdamW(params[2:], lr=0.1)], rho=0.1)
    opt.step(closure_of(model))
    state = copy.deepcopy(opt.state_dict())
    bad = copy.deepcopy(state)
    bad["param_groups"][0]["lr"] = 7.0
    bad["param_groups"][1]["params"] = bad["param_groups"][1]["params"][:1]
    with pytest.raises(ValueError, match="group 1 of the state has 1 parameters, this optimizer's 2"):
        opt.load_state_dict(bad)
    assert opt.param_groups[0]["lr"] == 0.1
    assert same_state(state, opt.state_dict())


# -- groups added by others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.01, "interval": 2}, {"functional": True}])
@pytest.mark.parametrize("bases", [1, 2])
def test_a_group_added_to_the_base_is_the_same_as_one_added_to_sam(options: dict[str, Any], bases: int) -> None:
    options = dict(options)
    functional = options.pop("functional", False)
    results = []
    for through in ("SAM", "base"):
        model = network()
        model.append(nn.Linear(3, 3))
        first, second, third = (list(model[i].parameters()) for i in (0, 3, 4))
        parts = [first + second] if bases == 1 else [first, second]
        more = {"perturb": "functional", "model": model} if functional else {}
        opt = SAM(None, [torch.optim.SGD(part, lr=0.1) for part in parts], rho=0.3, **options, **more)
        opt.step(closure_of(model))
        adder = opt if through == "SAM" else opt._bases[-1]
        adder.add_param_group({"params": third, "lr": 0.01})
        for _ in range(3):
            opt.step(closure_of(model))
        group = opt.param_groups[-1]
        assert (group["rho"], group["lr"], group["sam_steps"]) == (0.3, 0.01, 4)
        assert opt.state_dict()["param_groups"][-1]["rho"] == 0.3
        results.append((model, opt))
    (one, a), (two, b) = results
    assert unchanged(one, all_bits(two))
    assert same_state(a.state_dict(), b.state_dict())
    a.load_state_dict(b.state_dict())


def test_a_group_added_to_the_base_is_in_the_state_before_any_step() -> None:
    model = network()
    params = list(model.parameters())
    opt = SAM(params[:2], torch.optim.SGD, rho=0.3, lr=0.1)
    opt.base_optimizer.add_param_group({"params": params[2:]})
    saved = opt.state_dict()
    assert [g["rho"] for g in saved["param_groups"]] == [0.3, 0.3]
    assert [g["sam_steps"] for g in saved["param_groups"]] == [0, 0]
    opt.load_state_dict(saved)


def test_a_group_with_a_radius_of_its_own_keeps_it() -> None:
    model = network()
    params = list(model.parameters())
    opt = SAM(params[:2], torch.optim.SGD, rho=0.3, lr=0.1)
    opt.base_optimizer.add_param_group({"params": params[2:], "rho": 0.05, "adaptive": True})
    assert [(g["rho"], g["adaptive"], g["eta"]) for g in opt.param_groups] == [(0.3, False, 0.0), (0.05, True, 0.0)]


def test_lightnings_finetuning_callback_unfreezes_a_layer(tmp_path: Any) -> None:
    """Through SAM itself and through the optimizer that it wraps."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def __init__(self, through: str) -> None:
            super().__init__()
            self.through = through

        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                chosen = optimizer if self.through == "SAM" else optimizer.base_optimizer
                self.unfreeze_and_add_param_group(pl_module.net[0], chosen, lr=0.05, train_bn=True)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, x: Tensor, i: int) -> Tensor:
            return loss_of(self.net, x)

        def configure_optimizers(self) -> Any:
            return SAM((p for p in self.parameters() if p.requires_grad), torch.optim.SGD, rho=0.3, lr=0.1)

    results = []
    for through in ("SAM", "base"):
        module = Module()
        frozen = all_bits(module.net[0])
        trainer = Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Unfreeze(through)], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader([*X], batch_size=32))
        (opt,) = trainer.optimizers
        assert [g["rho"] for g in opt.param_groups] == [0.3, 0.3]
        assert not unchanged(module.net[0], frozen)
        results.append(module.net)
    assert unchanged(results[0], all_bits(results[1]))
    by_hand = network()
    by_hand[0].requires_grad_(False)
    plain = SAM(list(by_hand[3].parameters()), torch.optim.SGD, rho=0.3, lr=0.1)
    for epoch in range(3):
        if epoch == 1:
            by_hand[0].requires_grad_(True)
            plain.add_param_group({"params": list(by_hand[0].parameters()), "lr": 0.05})
        plain.step(closure_of(by_hand))
    assert unchanged(results[0], all_bits(by_hand))


def test_what_cannot_be_perturbed_is_not_added() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    opt = SAM(model[0].parameters(), torch.optim.SGD, rho=0.3, lr=0.1, perturb="functional", model=model)
    with pytest.raises(ValueError, match="Conv1d"):
        opt.add_param_group({"params": model[1].parameters()})
    assert len(opt.param_groups) == 1
    opt.base_optimizer.add_param_group({"params": model[1].parameters()})
    model[1](model[0](torch.randn(4, 4)).unsqueeze(-1)).square().sum().backward()
    with pytest.raises(ValueError, match="Conv1d"):
        opt.first_step()
    assert not opt.is_perturbed


def test_groups_and_masters() -> None:
    model = network().bfloat16()
    params = list(model.parameters())
    masters = [p.detach().float() for p in params]
    opt = SAM(params, torch.optim.SGD, rho=0.3, lr=0.1, master_params=masters)
    stranger = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="build SAM anew with the masters of all"):
        opt.add_param_group({"params": [stranger]})
    opt.base_optimizer.add_param_group({"params": [stranger]})
    before = all_bits(model)
    with pytest.raises(ValueError, match="none of master_params"):
        opt.step(closure_of(model, X.bfloat16()))
    assert unchanged(model, before)


def test_masters_that_no_longer_fit_are_refused_before_a_weight_moves() -> None:
    for change, words in (
        (lambda m, ms: m.float(), "its parameter torch.float32"),
        (lambda m, ms: setattr(ms[0], "data", ms[0].data.double()), "dtype torch.float64"),
        (lambda m, ms: setattr(ms[0], "data", ms[0].data[:2]), "shape"),
    ):
        model = network().bfloat16()
        masters = [p.detach().float() for p in model.parameters()]
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, master_params=masters)
        opt.step(closure_of(model, X.bfloat16()))
        change(model, masters)
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        loss_of(model, X.to(model[0].weight.dtype)).backward()
        with pytest.raises(ValueError, match=words):
            opt.first_step()
        assert all(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
        opt.abandon()


def test_masters_given_other_memory_or_another_order_are_found_there() -> None:
    results = []
    for moves in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).bfloat16()
        torch.manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape) * 0.1)
        masters = [p.detach().float() for p in model.parameters()]
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, master_params=masters)
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
        for step in range(4):
            if moves:
                for m in masters:
                    old, m.data = m.data, m.data.clone()
                    old.fill_(math.nan)  # whoever still reads there, shows
            if moves and step == 2:
                model.to(memory_format=torch.channels_last)  # and the masters stay as they are

            def closure(model: nn.Module = model, x: Tensor = x) -> Tensor:
                loss = model(x).float().square().mean()
                loss.backward()
                return loss

            opt.step(closure)
        results.append([p.detach() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        assert torch.isfinite(q).all()
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
