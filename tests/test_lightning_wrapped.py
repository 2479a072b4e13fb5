"""fastpost.SAM as the optimizer that Lightning or Fabric wraps, without the callback, against loops written by hand."""

from __future__ import annotations

import copy
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastpost import SAM, SAMWindow
from fastpost.sam import GSAM, LookSAM, MomentumSAM, Variant

from .by_hand import ascended
from .by_hand import distance as gap

RHO, LR, ROWS = 0.3, 0.1, 4
BATCHES = torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split(ROWS)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()


def sam_gradients(model: nn.Module, x: Tensor, rho: float = RHO) -> tuple[list[Tensor], list[Tensor]]:
    """g at w and h at w + rho g / |g|."""
    params = list(model.parameters())
    g = torch.autograd.grad(loss_of(model, x), params)
    with ascended(params, g, rho):
        h = torch.autograd.grad(loss_of(model, x), params)
    return list(g), list(h)


def step_by_hand(model: nn.Module, x: Tensor, base: torch.optim.Optimizer, clip: Any = None, ascend: bool = True) -> None:
    g, h = sam_gradients(model, x)
    for p, part in zip(model.parameters(), h if ascend else g, strict=True):
        p.grad = part
    if clip is not None:
        clip(model.parameters())
    base.step()


def by_norm(parameters: Any) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.5)


def by_value(parameters: Any) -> None:
    nn.utils.clip_grad_value_(parameters, 0.05)


class Automatic(LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = network()
        self.options = options
        self.before_step = 0
        self.seen: list[Any] = []

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor | None:
        return loss_of(self.net, x)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.before_step += 1
        self.seen.append(optimizer.is_perturbed)

    def configure_optimizers(self) -> Any:
        opt = SAM(self.parameters(), torch.optim.SGD, **{"rho": RHO, "lr": LR, "momentum": 0.9, **self.options})
        return [opt], [{"scheduler": torch.optim.lr_scheduler.StepLR(opt, 2), "interval": "step"}]


def base_of(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    return base, torch.optim.lr_scheduler.StepLR(base, 2)


def trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        **{"max_epochs": 1, **options},
    )


def loader(batches: int = len(BATCHES)) -> DataLoader:
    return DataLoader(torch.cat(BATCHES[:batches]), batch_size=ROWS)  # type: ignore[arg-type]


@contextmanager
def no_scheduler_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r".*lr_scheduler.step\(\)")
        yield


# -- automatic optimisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_automatic_optimisation_is_sam_in_every_step(tmp_path: Path, clip: str | None) -> None:
    """Clipping acts on the second gradient alone: by value, it would turn the ascent."""
    module, reference = Automatic(), network()
    options = {"gradient_clip_val": 0.5 if clip == "norm" else 0.05, "gradient_clip_algorithm": clip} if clip else {}
    fitted = trainer(tmp_path, **options)
    with no_scheduler_warning():
        fitted.fit(module, loader())
    base, schedule = base_of(reference)
    for x in BATCHES:
        step_by_hand(reference, x, base, {None: None, "norm": by_norm, "value": by_value}[clip])
        schedule.step()
    assert gap(module.net, reference) <= 1e-12
    assert fitted.global_step == len(BATCHES)
    assert module.seen == [False] * len(BATCHES)


@pytest.mark.parametrize("variant", [GSAM(0.7), LookSAM(), MomentumSAM(), None])
def test_what_lightning_clips_is_what_is_stepped_with(tmp_path: Path, variant: Variant | None) -> None:
    class Measured(Automatic):
        def configure_optimizers(self) -> Any:
            little = 1e-12  # a momentum to follow, and too little to be seen in a step
            return SAM(self.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=little, variant=variant, interval=3)

    module, lengths = Measured(), []

    class Length(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.before = copy.deepcopy(module.net)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            pairs = zip(module.net.parameters(), self.before.parameters(), strict=True)
            lengths.append(math.sqrt(sum((p - q).square().sum().item() for p, q in pairs)) / LR)

    trainer(tmp_path, gradient_clip_val=0.02, callbacks=[Length()]).fit(module, loader())
    assert len(lengths) == len(BATCHES)
    assert all(0.0199 <= length <= 0.02 * (1 + 1e-9) for length in lengths)


def test_accumulation_is_refused_and_names_the_callback(tmp_path: Path) -> None:
    module = Automatic()
    before = copy.deepcopy(module.net)
    with pytest.raises(RuntimeError, match=r"fastpost\.integrations\.lightning\.SAMCallback"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader())
    assert gap(module.net, before) == 0


def test_a_batch_without_a_loss_makes_no_step(tmp_path: Path) -> None:
    class Empty(Automatic):
        def training_step(self, x: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(x, batch_idx)

        def configure_optimizers(self) -> Any:
            return SAM(self.parameters(), torch.optim.SGD, rho=RHO, lr=LR)

    module, reference = Empty(), network()
    trainer(tmp_path).fit(module, loader(3))
    base = torch.optim.SGD(reference.parameters(), lr=LR)
    for x in (BATCHES[0], BATCHES[2]):
        step_by_hand(reference, x, base)
    assert gap(module.net, reference) <= 1e-12


# -- manual optimisation ---------------------------------------------------------------------------------------------------


def two_calls(module: Any, opt: Any, x: Tensor) -> None:
    module.manual_backward(loss_of(module.net, x))
    opt.first_step(zero_grad=True)
    module.manual_backward(loss_of(module.net, x))
    opt.second_step(zero_grad=True)


def block(module: Any, opt: Any, x: Tensor) -> None:
    module.manual_backward(loss_of(module.net, x))
    with opt.perturbed():
        module.manual_backward(loss_of(module.net, x))
    opt.step()
    opt.zero_grad()


def closure(module: Any, opt: Any, x: Tensor) -> None:
    def run() -> Tensor:
        loss = loss_of(module.net, x)
        opt.zero_grad()
        module.manual_backward(loss)
        return loss

    assert opt.step(run).item() == pytest.approx(loss_before(module, x))


def loss_before(module: Any, x: Tensor) -> float:
    return float(module.losses[-1])


def sloppy_closure(module: Any, opt: Any, x: Tensor) -> None:
    with opt.toggle_model():
        opt.step(lambda: module.manual_backward(loss_of(module.net, x)))


def window(module: Any, opt: Any, x: Tensor) -> None:
    SAMWindow(opt, lambda rows: module.manual_backward(loss_of(module.net, rows) / 2)).run(x.chunk(2))
    opt.step()


class Manual(Automatic):
    def __init__(self, form: Callable[[Any, Any, Tensor], None], **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.form, self.losses = form, []

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        opt = self.optimizers()
        self.losses.append(float(loss_of(self.net, x).detach()))
        if opt.ascends:
            self.form(self, opt, x)
        else:
            opt.zero_grad()
            self.manual_backward(loss_of(self.net, x))
            opt.step()
            opt.zero_grad()
        self.lr_schedulers().step()


@pytest.mark.parametrize("form", [two_calls, block, closure, sloppy_closure, window])
@pytest.mark.parametrize("interval", [1, 2])
def test_manual_optimisation(tmp_path: Path, form: Any, interval: int) -> None:
    module, reference = Manual(form, interval=interval), network()
    fitted = trainer(tmp_path)
    with no_scheduler_warning():
        fitted.fit(module, loader())
    base, schedule = base_of(reference)
    for step, x in enumerate(BATCHES):
        step_by_hand(reference, x, base, ascend=step % interval == 0)
        schedule.step()
    assert gap(module.net, reference) <= 1e-12
    assert fitted.global_step == len(BATCHES)
    assert module.seen == [False] * len(BATCHES)


def test_the_optimizer_itself_in_manual_optimisation(tmp_path: Path) -> None:
    """`opt.optimizer`, as in Accelerate; Lightning does not count steps that do not go through its own."""

    def through(module: Any, opt: Any, x: Tensor) -> None:
        two_calls(module, opt.optimizer, x)

    module, reference = Manual(through), network()
    trainer(tmp_path).fit(module, loader())
    base, schedule = base_of(reference)
    for x in BATCHES:
        step_by_hand(reference, x, base)
        schedule.step()
    assert gap(module.net, reference) <= 1e-12


@pytest.mark.parametrize("form", [two_calls, closure, window])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_in_manual_optimisation(tmp_path: Path, form: Any, precision: Any) -> None:
    """Loss scales are powers of two: the scaled and the unscaled run have the same bits, but for float16's range."""
    runs = []
    for scale in (2.0**8, 1.0) if precision == "16-mixed" else (None,):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        module = Manual(form if scale is None else without_check(form))
        module.net.float()
        start = copy.deepcopy(module.net)
        fitted = trainer(tmp_path, plugins=[MixedPrecision(precision, "cpu", scaler=scaler)])
        fitted.fit(module, DataLoader(torch.cat(BATCHES).float(), batch_size=ROWS))
        assert fitted.global_step == len(BATCHES)
        runs.append(module.net)
    moved = gap(start, runs[0])
    assert moved > 1e-3
    assert gap(runs[0], runs[-1]) == 0
    reference = network().float()
    base, schedule = base_of(reference)
    for x in BATCHES:
        step_by_hand(reference, x.float(), base)
        schedule.step()
    assert all(gap(run, reference) <= 0.01 * moved for run in runs)


def without_check(form: Any) -> Any:
    if form is not closure:
        return form
    return lambda module, opt, x: opt.step(lambda: module.manual_backward(loss_of(module.net, x)))


@pytest.mark.parametrize("form", [two_calls, window])
def test_an_overflow_under_lightning_skips_the_step_and_shrinks_the_scale(tmp_path: Path, form: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = Manual(form)
    module.net.float()
    before = copy.deepcopy(module.net)
    fitted = trainer(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    fitted.fit(module, DataLoader(BATCHES[0].float(), batch_size=ROWS))
    assert gap(module.net, before) == 0
    assert scaler.get_scale() == 2.0**39
    sam = fitted.optimizers[0]
    assert not sam.is_perturbed
    assert sam.skipped_steps == 1
    assert fitted.global_step == 1


@pytest.mark.parametrize("clip", [None, 0.05])
def test_automatic_optimisation_in_float16(tmp_path: Path, clip: float | None) -> None:
    """Clipping under float16, which Lightning refuses for optimizers that unscale by themselves."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module, reference = Automatic(), network().float()
    module.net.float()
    start = copy.deepcopy(reference)
    fitted = trainer(tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], gradient_clip_val=clip)
    fitted.fit(module, DataLoader(torch.cat(BATCHES).float(), batch_size=ROWS))
    base, schedule = base_of(reference)
    clipping = None if clip is None else lambda params: nn.utils.clip_grad_norm_(params, clip)
    for x in BATCHES:
        step_by_hand(reference, x.float(), base, clipping)
        schedule.step()
    assert gap(module.net, reference) <= 0.01 * gap(start, reference)
    assert fitted.global_step == len(BATCHES)


class Two(LightningModule):
    """Two optimizers in turn, each with a loss that reaches the other's weights."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.left, self.right = network(), network()
        self.form = form

    def losses(self, x: Tensor) -> list[Tensor]:
        a, b = self.left(x), self.right(x)
        return [(a * b).square().mean(), (a - 2 * b).square().mean()]

    def training_step(self, x: Tensor, batch_idx: int) -> None:
        for i, opt in enumerate(self.optimizers()):

            def backward(opt: Any = opt, i: int = i) -> None:
                loss = self.losses(x)[i]
                opt.zero_grad()
                self.manual_backward(loss)

            if self.form == "toggled":
                with opt.toggle_model():
                    opt.step(backward)
            elif self.form == "closure":
                opt.step(backward)
            else:
                backward()
                opt.first_step()
                backward()
                opt.second_step()

    def configure_optimizers(self) -> Any:
        return [SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR) for net in (self.left, self.right)]


@pytest.mark.parametrize("form", ["toggled", "closure", "two calls"])
def test_two_optimizers(tmp_path: Path, form: str) -> None:
    module, reference = Two(form), Two(form)
    fitted = trainer(tmp_path)
    fitted.fit(module, loader(3))
    for x in BATCHES[:3]:
        for i, net in enumerate((reference.left, reference.right)):
            params = list(net.parameters())
            with ascended(params, torch.autograd.grad(reference.losses(x)[i], params), RHO):
                h = torch.autograd.grad(reference.losses(x)[i], params)
            with torch.no_grad():
                for p, part in zip(params, h, strict=True):
                    p.sub_(LR * part)
    assert gap(module.left, reference.left) <= 1e-12
    assert gap(module.right, reference.right) <= 1e-12
    assert fitted.global_step == 6


def test_resumed_from_a_checkpoint_with_sam_as_the_module_s_optimizer(tmp_path: Path) -> None:
    def run(epochs: int, **fit: Any) -> tuple[Trainer, Manual]:
        module = Manual(two_calls, interval=2)
        fitted = trainer(tmp_path, max_epochs=epochs)
        fitted.fit(module, loader(3), **fit)
        return fitted, module

    _, whole = run(2)
    half, _ = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(2, ckpt_path=tmp_path / "half.ckpt")
    assert gap(resumed.net, whole.net) == 0


# -- Fabric ----------------------------------------------------------------------------------------------------------------


def fabric_step(form: str, fabric: Fabric, model: Any, opt: Any, x: Tensor, clip: float | None) -> None:
    def backward() -> Tensor:
        loss = loss_of(model, x)
        fabric.backward(loss)
        return loss

    if form == "closure":
        opt.step(backward)
        return
    backward()
    if opt.ascends:
        opt.first_step(zero_grad=True)
        backward()
    if clip is not None:
        fabric.clip_gradients(model, opt, max_norm=clip, error_if_nonfinite=False)
    opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(("form", "clip"), [("two calls", None), ("two calls", 0.5), ("closure", None)])
def test_fabric(form: str, clip: float | None, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, reference = network(), network()
    fabric = Fabric(accelerator="cpu", devices=1)
    sam = SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9, interval=interval)
    model, opt = fabric.setup(net, sam)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2)
    base, expected = base_of(reference)
    for step, x in enumerate(BATCHES):
        fabric_step(form, fabric, model, opt, x, clip)
        step_by_hand(reference, x, base, by_norm if clip else None, ascend=step % interval == 0)
        with no_scheduler_warning():
            schedule.step()
        expected.step()
        assert gap(net, reference) <= 1e-12
    assert opt.skipped_steps == 0
    assert opt.state_dict()["param_groups"][0]["sam_steps"] == len(BATCHES)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # as of sharded models
    assert net.float()[0].weight.dtype == torch.float32


@pytest.mark.parametrize(("form", "clip"), [("two calls", None), ("two calls", 0.05), ("closure", None)])
@pytest.mark.parametrize("scale", [2.0**8, 2.0**40])
def test_fabric_in_float16(form: str, clip: float | None, scale: float) -> None:
    net, reference = network().float(), network().float()
    start = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricMixedPrecision("16-mixed", "cpu", scaler=scaler)])
    model, opt = fabric.setup(net, SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9))
    base, _ = base_of(reference)
    for x in BATCHES[:3]:
        fabric_step(form, fabric, model, opt, x.float(), clip)
        assert not opt.is_perturbed
        if scale < 2**20:
            clipping = None if clip is None else lambda params: nn.utils.clip_grad_norm_(params, clip)
            step_by_hand(reference, x.float(), base, clipping)
    if scale < 2**20:
        assert gap(net, reference) <= 0.01 * gap(start, reference)
        assert opt.skipped_steps == 0
    else:
        assert gap(net, start) == 0
        assert opt.skipped_steps == 3
        assert scaler.get_scale() == scale / 8


def test_fabric_accumulating_by_hand_and_with_a_window() -> None:
    reference = network()
    base, _ = base_of(reference)
    step_by_hand(reference, BATCHES[0], base)
    for form in ("by hand", "window"):
        net = network()
        fabric = Fabric(accelerator="cpu", devices=1)
        model, opt = fabric.setup(net, SAM(net.parameters(), torch.optim.SGD, rho=RHO, lr=LR, momentum=0.9))

        def backward(x: Tensor, fabric: Fabric = fabric, model: Any = model) -> None:
            fabric.backward(loss_of(model, x) / 2)

        halves = BATCHES[0].chunk(2)
        if form == "window":
            SAMWindow(opt, backward).run(halves)
        else:
            for x in halves:
                backward(x)
            copied = copy.deepcopy(net)
            with pytest.raises(RuntimeError, match="earlier micro-batches"):
                opt.step(functools.partial(backward, halves[1]))
            assert gap(net, copied) == 0
            for x in halves:
                backward(x)
            opt.first_step(zero_grad=True)
            for x in halves:
                backward(x)
        opt.step()
        assert gap(net, reference) <= 1e-12


def test_fabric_saves_and_loads(tmp_path: Path) -> None:
    def prepared() -> Any:
        net = network()
        fabric = Fabric(accelerator="cpu", devices=1)
        return fabric, net, *fabric.setup(net, SAM(net.parameters(), torch.optim.AdamW, rho=RHO, lr=LR))

    fabric, net, model, opt = prepared()
    fabric_step("two calls", fabric, model, opt, BATCHES[0], None)
    fabric.save(tmp_path / "saved.ckpt", {"model": model, "opt": opt})
    fabric_step("two calls", fabric, model, opt, BATCHES[1], None)
    other, fresh, its_model, its_opt = prepared()
    other.load(tmp_path / "saved.ckpt", {"model": its_model, "opt": its_opt})
    fabric_step("two calls", other, its_model, its_opt, BATCHES[1], None)
    assert gap(net, fresh) == 0
