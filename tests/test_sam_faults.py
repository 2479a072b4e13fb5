"""Faults of real training: killed processes, checkpoints on disk, parameters that come, go, freeze or are swapped."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM
from fastpost.sam import LookSAM, SAMWindow

from .conftest import same_bits
from .small import BASES, X, all_bits, closure_of, loss_of, network, same_state, unchanged

# -- killed, and resumed from the last checkpoint ------------------------------------------------------------------------


def build(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2, interval=2, variant=LookSAM())


def train(model: nn.Module, opt: SAM, steps: int, folder: Path | None = None, die_at: int | None = None) -> None:
    for step in range(steps):
        opt.zero_grad()
        loss_of(model).backward()
        with opt.perturbed():
            if step == die_at:
                signal.raise_signal(signal.SIGKILL)
            loss_of(model).backward()
        opt.step()
        if folder is not None:
            torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "step": step + 1}, folder / "last.pt")


def test_killed_between_perturb_and_restore_nothing_is_lost(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom tests.small import network\nfrom tests.test_sam_faults import build, train\n"
        "model = network()\ntrain(model, build(model), 6, pathlib.Path(sys.argv[1]), die_at=4)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    model = network()
    opt = build(model)
    saved = torch.load(tmp_path / "last.pt")
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    assert saved["step"] == 4
    train(model, opt, 6 - saved["step"])
    whole = network()
    train(whole, build(whole), 6)
    assert unchanged(model, all_bits(whole))


# -- torch.distributed.checkpoint and Accelerate, in one process ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("trained", [False, True])
def test_a_distributed_checkpoint_on_disk_resumes_bit_by_bit(tmp_path: Path, base: str, trained: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    cls, options = BASES[base]

    def make(model: nn.Module) -> tuple[SAM, torch.optim.lr_scheduler.LRScheduler]:
        opt = SAM(model.parameters(), cls, rho=0.1, interval=2, **options)
        return opt, torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.5, 10)

    def go(model: nn.Module, opt: SAM, schedule, steps: int) -> None:
        for _ in range(steps):
            opt.step(closure_of(model))
            schedule.step()

    model = network()
    opt, schedule = make(model)
    go(model, opt, schedule, 3 if trained else 0)
    before = all_bits(model)
    weights, state = get_state_dict(model, opt)  # an optimizer that never stepped is warmed up by this
    assert unchanged(model, before)
    dcp.save({"model": weights, "opt": state}, checkpoint_id=tmp_path, no_dist=True)
    passed = schedule.state_dict()
    go(model, opt, schedule, 3)

    resumed = network()
    again, later = make(resumed)
    weights, state = get_state_dict(resumed, again)
    found = {"model": weights, "opt": state}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(resumed, again, model_state_dict=found["model"], optim_state_dict=found["opt"])
    later.load_state_dict(passed)
    go(resumed, again, later, 3)
    assert unchanged(resumed, all_bits(model))
    assert same_state(opt.state_dict(), again.state_dict())


def test_a_state_that_is_loaded_at_once_as_accelerate_does() -> None:
    model, other = network(), network()
    opt, plain = build(model), build(other)
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups is opt.base_optimizer.param_groups
    train(model, opt, 3)
    train(other, plain, 3)
    assert unchanged(model, all_bits(other))


# -- parameters that change ----------------------------------------------------------------------------------------------


def test_parameters_frozen_and_thawed_between_steps() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    for frozen in (False, True, False):
        for p in model[0].parameters():
            p.requires_grad_(not frozen)
            p.grad = None
        before = all_bits(model)
        loss_of(model).backward()
        opt.first_step(zero_grad=True)
        moved = [not torch.equal(a, b) for a, b in zip(all_bits(model), before, strict=True)]
        assert moved == [not frozen, not frozen, True, True]
        loss_of(model).backward()
        opt.second_step(zero_grad=True)
        assert [not torch.equal(a, b) for a, b in zip(all_bits(model), before, strict=True)] == moved


def test_a_parameter_frozen_between_the_passes_is_restored() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = all_bits(model)
    loss_of(model).backward()
    opt.first_step(zero_grad=True)
    model[0].requires_grad_(False)
    loss_of(model).backward()
    opt.second_step()
    assert unchanged(model[0], before[:2])
    assert not unchanged(model[3], before[2:])


@pytest.mark.parametrize("options", [{}, {"scope": ["0.*", "4.*"]}, {"functional": True}])
def test_parameters_added_between_steps(options: dict) -> None:
    model = network()
    functional = options.pop("functional", False)
    model.append(nn.Linear(3, 3))
    more = {"perturb": "functional", "model": model} if functional else {}
    named = dict(model.named_parameters())
    old = [(n, p) for n, p in named.items() if not n.startswith("4.")]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt = SAM(old, torch.optim.SGD, rho=0.5, lr=0.1, **options, **more)
        opt.step(closure_of(model))
    assert all("'4.*' of scope fits no parameter" in str(w.message) for w in told)
    assert len(told) == ("scope" in options)
    opt.add_param_group({"params": [(n, p) for n, p in named.items() if n.startswith("4.")]})
    opt.zero_grad()
    loss_of(model).backward()
    before, clean = all_bits(model), loss_of(model).item()
    opt.first_step(zero_grad=True)
    if functional:
        assert unchanged(model, before)
    else:
        assert not unchanged(model[4], before[4:])
    assert loss_of(model).item() > clean
    loss_of(model).backward()
    opt.second_step()
    assert not unchanged(model[4], before[4:])


@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize("scope", [None, ["0.*"]])
def test_parameters_swapped_after_construction(when: str, scope: list[str] | None) -> None:
    """Accelerate's FSDP2: placeholders first, then the optimizer's groups get other parameter objects."""
    model, reference = network(), network()
    opt = SAM(model.named_parameters(), torch.optim.SGD, rho=0.5, lr=0.1, scope=scope)
    plain = SAM(reference.named_parameters(), torch.optim.SGD, rho=0.5, lr=0.1, scope=scope)
    if when == "later":
        opt.step(closure_of(model))
        plain.step(closure_of(reference))
    for module in (model[0], model[3]):
        for name in ("weight", "bias"):
            new = nn.Parameter(getattr(module, name).detach().clone())
            for group in opt.param_groups:
                group["params"] = [new if p is getattr(module, name) else p for p in group["params"]]
            setattr(module, name, new)
    for _ in range(2):
        opt.step(closure_of(model))
        plain.step(closure_of(reference))
    assert unchanged(model, all_bits(reference))


@pytest.mark.parametrize("perturb", ["stored", "functional"])
def test_tied_parameters_through_a_whole_step(perturb: str) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(2)
        embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        head.weight = embedding.weight
        return nn.Sequential(embedding, head).double()

    model, ids = tied(), torch.arange(11)
    w = model[0].weight.detach().clone().requires_grad_()
    options = {"perturb": perturb, "model": model} if perturb == "functional" else {}
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, **options)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(ids), ids)
        loss.backward()
        return loss

    def gradient(w: Tensor) -> Tensor:
        return torch.autograd.grad(nn.functional.cross_entropy(w[ids] @ w.T, ids), w)[0]

    g = gradient(w)
    expected = w.detach() - 0.1 * gradient(w + 0.3 * g / g.norm())
    opt.step(closure)
    assert (model[0].weight.detach() - expected).abs().max() <= 1e-14
    assert model[0].weight is model[1].weight


# -- gradients that are missing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["stored", "functional"])
def test_experts_that_take_turns(perturb: str) -> None:
    """Each pass of each step routes elsewhere: no expert stays perturbed, none moves that had no second gradient."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(20, 3) for _ in range(3)])
    options = {"perturb": perturb, "model": model} if perturb == "functional" else {}
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=0.1, weight_decay=0.5, **options)
    for first, second in ((0, 1), (1, 2), (2, 0), (1, 1)):
        before = [all_bits(expert) for expert in model]
        opt.zero_grad()
        model[first](X).square().mean().backward()
        opt.first_step(zero_grad=True)
        model[second](X).square().mean().backward()
        opt.second_step()
        assert [i for i in range(3) if not unchanged(model[i], before[i])] == [second]


def test_a_second_pass_without_any_gradient_changes_nothing() -> None:
    model = network()
    opt = SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=0.1)
    before = all_bits(model)
    loss_of(model).backward()
    opt.first_step(zero_grad=True)
    opt.second_step()
    assert unchanged(model, before)
    assert not opt.is_perturbed
    window = SAMWindow(opt, lambda x: loss_of(model, x).backward())
    window.run([X])
    window.optimizer.zero_grad()
    opt.step()
    assert unchanged(model, before)


# -- base optimizers together --------------------------------------------------------------------------------------------


def test_muon_and_adamw_under_one_norm() -> None:
    def bases(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(vectors, lr=1e-2)]

    one, two = network(), network()
    plain = bases(one)
    opt = SAM(None, bases(two), rho=0.0)
    for _ in range(3):
        one.zero_grad()
        closure_of(one)()
        for base in plain:
            base.step()
        opt.step(closure_of(two))
    assert unchanged(two, all_bits(one))
    for group in opt.param_groups:
        group["rho"] = 0.7
    two.zero_grad()
    loss_of(two).backward()
    before = [p.detach().clone() for p in two.parameters()]
    with opt.perturbed():
        e = torch.cat([(p.detach() - b).flatten() for p, b in zip(two.parameters(), before, strict=True)])
    assert e.norm().item() == pytest.approx(0.7, rel=1e-5)
    saved = copy.deepcopy(opt.state_dict())
    opt.step(closure_of(two))
    resumed = network()
    with torch.no_grad():
        for p, b in zip(resumed.parameters(), before, strict=True):
            p.copy_(b)
    again = SAM(None, bases(resumed), rho=0.1)
    again.load_state_dict(saved)
    again.step(closure_of(resumed))
    assert all(same_bits(p, q) for p, q in zip(resumed.parameters(), two.parameters(), strict=True))
