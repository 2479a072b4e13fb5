"""Running statistics of norm layers: each micro-batch moves them once, at w, as a run without SAM would; bit for bit."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from fastpost import SAM, SAMWindow
from fastpost.integrations.accelerate import AcceleratedWindow
from fastpost.integrations.lightning import SAMCallback
from fastpost.integrations.transformers import PostTrainingArguments, SAMTrainer
from fastpost.sam import MomentumSAM, frozen_norm_stats

from .by_hand import ascended
from .conftest import same_bits

RHO, LR = 0.5, 0.1
ROWS = torch.randn(48, 4, 6, generator=torch.Generator().manual_seed(1))
BATCHES = ROWS.split(8)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class RunningScale(nn.Module):
    """A layer that is no norm of torch's, but keeps its statistics as they do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_scale", torch.ones(()))
        self.register_buffer("table", torch.ones(3))  # some other buffer, which is the layer's own business

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_scale = 0.9 * self.running_scale + 0.1 * x.detach().abs().mean()  # another tensor each time
            self.table += 1
        return x / self.running_scale


class Net(nn.Module):
    """Each kind of layer with running statistics, behind weights that move them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.bn = nn.BatchNorm1d(4)
        self.first = nn.Conv1d(4, 4, 3, padding=1)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.sync = nn.SyncBatchNorm(4)
        self.second = nn.Conv1d(4, 4, 3, padding=1)
        self.frozen = nn.BatchNorm1d(4)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)
        self.scale = RunningScale()
        self.out = nn.Linear(24, 3)
        self.frozen.running_mean.fill_(0.25)

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.bn(x))
        for norm in (self.cumulative, self.instance, self.sync):
            x = norm(torch.tanh(self.second(x)))
        return self.out(self.scale(self.untracked(self.frozen(x))).flatten(1))


def net() -> Net:
    return Net().train()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running_" in name or "num_batches" in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    assert len(a) == len(b) > 10
    return all(same_bits(a[name], b[name]) for name in a)


def after_one_pass(model: nn.Module, batches: Any) -> dict[str, Tensor]:
    """The statistics as training without SAM would leave them: each micro-batch once, at these weights."""
    twin = copy.deepcopy(model)
    for x in batches:
        loss_of(twin, x)
    return statistics(twin)


# -- by hand ------------------------------------------------------------------------------------------------------------


def closure_of(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = loss_of(model, x)
        loss.backward()
        return loss

    return closure


def two_calls(model: nn.Module, opt: SAM, x: Tensor) -> None:
    closure_of(model, x)()
    opt.first_step(zero_grad=True)
    closure_of(model, x)()
    opt.second_step(zero_grad=True)


def plain_step(model: nn.Module, opt: SAM, x: Tensor) -> None:
    closure_of(model, x)()
    opt.first_step(zero_grad=True)
    closure_of(model, x)()
    opt.step()
    opt.zero_grad()


def block(model: nn.Module, opt: SAM, x: Tensor) -> None:
    closure_of(model, x)()
    with opt.perturbed():
        closure_of(model, x)()
    assert not opt.is_perturbed
    opt.step()
    opt.zero_grad()


def by_closure(model: nn.Module, opt: SAM, x: Tensor) -> None:
    opt.step(closure_of(model, x))


def reused(model: nn.Module, opt: SAM, x: Tensor) -> None:
    closure_of(model, x)()
    opt.step(closure_of(model, x), reuse_grads=True)
    opt.zero_grad()


def given_up(model: nn.Module, opt: SAM, x: Tensor) -> None:
    closure_of(model, x)()
    opt.first_step(zero_grad=True)
    closure_of(model, x)()
    opt.abandon()


def failing(model: nn.Module, opt: SAM, x: Tensor) -> None:
    closure_of(model, x)()
    with pytest.raises(KeyError), opt.perturbed():
        fails(model)


def fails(model: nn.Module) -> None:
    loss_of(model, BATCHES[0])
    raise KeyError


FORMS = [two_calls, plain_step, block, by_closure, reused, given_up, failing]


@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"fused_restore": True}], ids=["", "interval", "fused"])
@pytest.mark.parametrize("form", FORMS)
def test_by_hand_with_the_model_known(form: Any, options: dict[str, Any]) -> None:
    model = net()
    base: Any = torch.optim.AdamW if "fused_restore" in options else torch.optim.SGD
    opt = SAM(model.parameters(), base, rho=RHO, lr=LR, model=model, **options)
    addresses = [b.data_ptr() for b in model.bn.buffers()]
    for x in BATCHES:
        expected = after_one_pass(model, [x])
        weights = copy.deepcopy(model.state_dict())
        form(model, opt, x)
        assert same(statistics(model), expected)
        moved = not torch.equal(model.out.weight, weights["out.weight"])
        assert moved == (form not in (given_up, failing))
    assert int(model.bn.num_batches_tracked) == len(BATCHES)
    assert addresses == [b.data_ptr() for b in model.bn.buffers()]
    assert float(model.frozen.running_mean[0]) == 0.25
    assert int(model.scale.table[0]) > len(BATCHES)  # a buffer that is no statistic is left to its layer


def test_with_a_context_around_the_second_pass() -> None:
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    for x in BATCHES:
        expected = after_one_pass(model, [x])
        closure_of(model, x)()
        opt.first_step(zero_grad=True)
        with frozen_norm_stats(model):
            loss_of(model, x).backward()
        opt.second_step(zero_grad=True)
        assert same(statistics(model), expected)
    before = statistics(model)
    with pytest.raises(KeyError), frozen_norm_stats(model):
        fails(model)
    assert same(statistics(model), before)
    with frozen_norm_stats(model):
        loss = loss_of(model, BATCHES[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # a layer may compute with its statistics
        loss.backward()


def test_the_second_gradient_is_that_of_a_training_pass() -> None:
    """Layers normalise by the batch in both passes: leaving statistics alone must not turn them to evaluation."""
    model = net().double()
    x = BATCHES[0].double()
    twin = copy.deepcopy(model)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, model=model)
    params = list(twin.parameters())
    with ascended(params, torch.autograd.grad(loss_of(twin, x), params), RHO):
        h = torch.autograd.grad(loss_of(twin, x), params)
    two_calls(model, opt, x)
    for p, w, part in zip(model.parameters(), params, h, strict=True):
        assert (p - (w - LR * part)).abs().max() <= 1e-12


def test_both_moves_them_twice_and_without_the_model_nothing_is_known() -> None:
    for options in ({"norm_stats": "both", "known": True}, {"known": False}):
        model = net()
        known = options.pop("known")
        opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, model=model if known else None, **options)
        for x in BATCHES:
            two_calls(model, opt, x)
        assert int(model.bn.num_batches_tracked) == 2 * len(BATCHES)


def test_the_only_pass_of_momentum_sam_counts() -> None:
    model = net()
    opt = SAM(
        model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, model=model, variant=MomentumSAM()
    )  # fmt: skip
    for x in BATCHES:
        opt.step(closure_of(model, x))
    assert int(model.bn.num_batches_tracked) == len(BATCHES)


def test_layers_that_come_or_change_after_construction() -> None:
    """Converted to synchronised ones, made by a lazy layer in its first pass, cast: the model is asked anew in each step."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LazyBatchNorm1d(), nn.Linear(6, 2))
    x = BATCHES[0][:, 0]
    opt = SAM(None, torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=LR), rho=RHO, model=model)
    two_calls(model, opt, x)
    assert int(model[1].num_batches_tracked) == 1
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    two_calls(model, opt, x)
    assert int(model[1].num_batches_tracked) == 2
    model[1].to(torch.float64).to(torch.float32)
    two_calls(model, opt, x)
    assert int(model[1].num_batches_tracked) == 3


def test_copies_and_pickles_know_their_own_model() -> None:
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, model=model)
    for twin_model, twin in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        expected, untouched = after_one_pass(twin_model, [BATCHES[0]]), statistics(model)
        two_calls(twin_model, twin, BATCHES[0])
        assert same(statistics(twin_model), expected)
        assert same(statistics(model), untouched)


# -- windows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["optimizer", "window"])
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_windows(told: str, per_micro_batch: bool) -> None:
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, model=model if told == "optimizer" else None)

    def forward_backward(x: Tensor) -> None:
        (loss_of(model, x) / 3).backward()

    window = SAMWindow(
        opt, forward_backward, per_micro_batch=per_micro_batch, model=model if told == "window" else None
    )  # fmt: skip
    for batches in (BATCHES[:3], BATCHES[3:]):
        expected = after_one_pass(model, batches)
        window.run(batches)
        assert same(statistics(model), expected)
        opt.step()
    window.open(3)
    expected = after_one_pass(model, BATCHES[:1])
    window.feed(BATCHES[0])
    window.close()  # short, as at the end of an epoch
    assert same(statistics(model), expected)


def test_a_micro_batch_that_passes_only_at_w_plus_e_counts_there() -> None:
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, model=model, ascent_fraction=0.5)
    window = SAMWindow(opt, lambda x: (loss_of(model, x) / 4).backward())
    window.open(4)
    expected = after_one_pass(model, BATCHES[:2])
    window.feed(BATCHES[0])
    window.feed(BATCHES[1])
    assert opt.is_perturbed
    assert same(statistics(model), expected)
    expected = after_one_pass(model, BATCHES[2:4])
    window.feed(BATCHES[2])
    window.feed(BATCHES[3])
    assert same(statistics(model), expected)
    opt.step()
    assert int(model.bn.num_batches_tracked) == 4


def test_a_window_given_up_in_the_middle_of_its_second_passes() -> None:
    model = net()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, model=model)
    calls = []

    def forward_backward(x: Tensor) -> None:
        calls.append(1)
        loss_of(model, x).backward()
        if len(calls) == 3:
            raise KeyError

    window = SAMWindow(opt, forward_backward)
    window.open(2)
    window.feed(BATCHES[0])
    expected = after_one_pass(model, BATCHES[1:2])
    with pytest.raises(KeyError):
        window.feed(BATCHES[1])
    assert same(statistics(model), expected)


# -- trainers: at a learning rate of 0 weights stay, and a run without SAM has the same statistics ---------------------


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, x)}


def trained_by_transformers(folder: Path, cls: Any, **options: Any) -> Net:
    made = PostTrainingArguments if cls is SAMTrainer else TrainingArguments
    model = Labelled()
    arguments = made(
        str(folder), max_steps=3, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=0.0,
        optim="sgd", weight_decay=0.0, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=5,
        **options,
    )  # fmt: skip
    cls(model, arguments, train_dataset=[{"x": row} for row in ROWS]).train()
    return model.net


@pytest.mark.parametrize("options", [{}, {"sam_per_micro_batch": True}, {"sam_interval": 2}], ids=["", "m-SAM", "interval"])
def test_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = trained_by_transformers(tmp_path, Trainer)
    ours = trained_by_transformers(tmp_path, SAMTrainer, sam_rho=RHO, **options)
    assert same(statistics(ours), statistics(plain))
    assert int(ours.bn.num_batches_tracked) == 6
    fraction = trained_by_transformers(tmp_path, SAMTrainer, sam_rho=RHO, sam_ascent_fraction=0.5)
    assert int(fraction.bn.num_batches_tracked) == 6
    both = trained_by_transformers(tmp_path, SAMTrainer, sam_rho=RHO, sam_norm_stats="both")
    assert int(both.bn.num_batches_tracked) == 12


class Module(LightningModule):
    def __init__(self, sam: bool = False, manual: bool = False) -> None:
        super().__init__()
        self.net = net()
        self.sam, self.automatic_optimization = sam, not manual

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        if self.automatic_optimization:
            return loss_of(self.net, x)
        opt: Any = self.optimizers()
        self.manual_backward(loss_of(self.net, x))
        opt.first_step(zero_grad=True)
        loss = loss_of(self.net, x)
        self.manual_backward(loss)
        opt.second_step(zero_grad=True)
        return loss

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.parameters(), lr=0.0)
        return SAM(None, base, rho=RHO) if self.sam else base


def trained_by_lightning(folder: Path, module: Module, callbacks: Any = (), accumulation: int = 1) -> Net:
    LightningTrainer(
        max_epochs=1, accelerator="cpu", devices=1, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        accumulate_grad_batches=accumulation,
    ).fit(module, DataLoader(ROWS, batch_size=8))  # fmt: skip  # type: ignore[arg-type]
    return module.net


def test_lightning(tmp_path: Path) -> None:
    plain = trained_by_lightning(tmp_path, Module())
    for number in (1, 2, 4):
        ours = trained_by_lightning(tmp_path, Module(), [SAMCallback(rho=RHO)], number)
        assert same(statistics(ours), statistics(plain))
    wrapped = [trained_by_lightning(tmp_path, Module(sam=True)), trained_by_lightning(tmp_path, Module(True, True))]
    assert all(same(statistics(ours), statistics(plain)) for ours in wrapped)
    both = trained_by_lightning(tmp_path, Module(), [SAMCallback(rho=RHO, norm_stats="both")], 2)
    assert int(both.bn.num_batches_tracked) == 2 * len(BATCHES)


@pytest.mark.usefixtures("accelerate_alone")
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_accelerate(per_micro_batch: bool) -> None:
    found = []
    for ours in (False, True):
        made = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net()
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        model, opt, loader = made.prepare(model, SAM(None, base, rho=RHO) if ours else base, DataLoader(ROWS, batch_size=8))
        window = AcceleratedWindow(made, model, opt, loss_of, per_micro_batch=per_micro_batch) if ours else None
        for x in loader:
            with made.accumulate(model):
                if window is not None:
                    window(x)
                else:
                    made.backward(loss_of(model, x))
                opt.step()
                opt.zero_grad()
        found.append(statistics(model))
    assert same(*found)


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    p = [nn.Parameter(torch.ones(1))]
    for call in (
        lambda: SAM(p, torch.optim.SGD, norm_stats="fist"),
        lambda: SAMCallback(norm_stats="fist"),
        lambda: PostTrainingArguments("out", sam_norm_stats="fist", report_to="none"),
    ):
        with pytest.raises(ValueError, match="Did you mean 'first'"):
            call()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        SAM(p, torch.optim.SGD, model=[])  # type: ignore[arg-type]
