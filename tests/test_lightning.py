"""SAM and R3F in Lightning's automatic optimisation, against loops written by hand."""

from __future__ import annotations

import copy
import csv
import functools
import logging
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import fastpost
from fastpost.integrations.lightning import SAMCallback
from fastpost.integrations.options import PostTrainingOptions
from fastpost.sam import GSAM, FriendlySAM, LookSAM, MomentumSAM, StableSAM
from tests.by_hand import (
    distance,
    gsam,
    language_loss,
    largest_difference,
    look_sam_between,
    look_sam_kept,
    rows_of_text,
    sam_by_hand,
    stable_sam,
)
from tests.conftest import same_bits
from tests.tiny import build

RHO, LR = 0.05, 1e-3
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


class Module(LightningModule):
    """A tiny GPT-2."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64, sgd: bool = False) -> None:
        super().__init__()
        self.model = build("causal", dropout, dtype)
        self.sgd = sgd
        self.calls = 0

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        loss = language_loss(self.model, rows)
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.sgd:
            return torch.optim.SGD(self.parameters(), lr=0.1)
        return torch.optim.AdamW(self.parameters(), lr=LR)


def trainer(folder: Path, callback: SAMCallback | None, **options: Any) -> Trainer:
    given = options.pop("callbacks", [])
    return Trainer(
        accelerator="cpu",
        devices=options.pop("devices", 1),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(given),
        logger=options.pop("logger", False),
        callbacks=[c for c in [callback, *given] if c is not None],
        **{"max_epochs": 1, "log_every_n_steps": 1, **options},
    )


def loader(rows: int, size: int = 2) -> DataLoader:
    return DataLoader(rows_of_text(rows), batch_size=size)


def windows(micro_batches: int, accumulation: int, size: int = 2) -> list[list[Tensor]]:
    batches = list(rows_of_text(micro_batches * size).split(size))
    return [batches[at : at + accumulation] for at in range(0, len(batches), accumulation)]


def logged(logger: CSVLogger, name: str) -> list[float]:
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize(("accumulation", "fraction"), [(1, 1.0), (3, 1.0), (3, 0.3)])
def test_twenty_steps_equal_the_loop_by_hand(tmp_path: Path, accumulation: int, fraction: float) -> None:
    module = Module()
    model = copy.deepcopy(module.model)
    micro_batches = 19 * accumulation + 1  # the last window is short
    callback = SAMCallback(rho=RHO, ascent_fraction=fraction)
    trainer(tmp_path, callback, accumulate_grad_batches=accumulation, gradient_clip_val=1.0).fit(
        module, loader(2 * micro_batches)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses = sam_by_hand(
        model, windows(micro_batches, accumulation), optimizer, RHO, fraction=fraction, clip=1.0, divide_by=accumulation
    )
    assert len(losses) == 20
    assert losses[-2] < losses[0]
    assert distance(module.model, model) <= 1e-9
    ascent = -(-accumulation * 3 // 10) if fraction < 1 else accumulation
    assert module.calls == 19 * (accumulation + ascent) + 2
    assert callback.sam is not None
    assert not callback.sam.is_perturbed


def test_dropout_masks_are_the_same_in_both_passes_and_rho_zero_is_plain_training(tmp_path: Path) -> None:
    found = []
    for callback in (None, SAMCallback(rho=0.0)):
        module = Module(dropout=0.3)
        torch.manual_seed(3)
        trainer(tmp_path, callback, accumulate_grad_batches=2).fit(module, loader(16))
        found.append(module)
    assert distance(*found) <= 1e-12


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_mixed_precision_with_clipping(tmp_path: Path, precision: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16) if precision == "16-mixed" else None
    dtype = torch.float16 if scaler else torch.bfloat16
    module = Module(dtype=torch.float32, sgd=True)
    model = copy.deepcopy(module.model)
    callback = SAMCallback(rho=RHO)
    plugin = MixedPrecision(precision, "cpu", scaler=scaler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, callback, plugins=[plugin], accumulate_grad_batches=2, gradient_clip_val=0.5).fit(
            module, loader(40)
        )

    def loss(model: torch.nn.Module, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return language_loss(model, rows)

    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = sam_by_hand(model, windows(20, 2), optimizer, RHO, loss=loss, clip=0.5)
    moved = distance(start, model)
    assert losses[-1] < losses[0]
    # Scaled gradients round elsewhere in 16 bits; a step that is unscaled twice, or not clipped, would be far off.
    assert distance(module.model, model) <= 0.03 * moved
    assert callback.sam is not None
    assert callback.sam.skipped_steps == 0
    report = callback.sam.report
    assert report is not None
    assert float(report.seen_norm) != float(report.stored_norm)  # seen through autocast's dtype


def test_an_overflow_skips_the_step_and_shrinks_the_scale(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    module = Module(dtype=torch.float32, sgd=True)
    before = copy.deepcopy(module)
    callback = SAMCallback(rho=RHO)
    trainer(tmp_path, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]).fit(module, loader(2))
    assert distance(module, before) == 0
    assert scaler.get_scale() == 2.0**39
    assert callback.sam is not None
    assert callback.sam.skipped_steps == 1


def test_what_is_logged(tmp_path: Path) -> None:
    module = Module(dtype=torch.float32)
    model = copy.deepcopy(module.model)
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, SAMCallback(rho=RHO), accumulate_grad_batches=2, logger=logger).fit(module, loader(12))
    for name in ("sam/seen_over_intended", "sam/seen_cosine"):
        assert logged(logger, name) == pytest.approx([1.0] * 3, abs=1e-3)
    assert logged(logger, "sam/skipped_steps") == [0.0] * 3
    calls = []

    def loss(model: torch.nn.Module, rows: Tensor) -> Tensor:
        value = language_loss(model, rows)
        calls.append(float(value.detach()))
        return value

    sam_by_hand(model, windows(6, 2), torch.optim.AdamW(model.parameters(), lr=LR), RHO, loss=loss)
    # Two passes at w, two at w + e; what is logged is the last one at w.
    assert logged(logger, "loss") == pytest.approx(calls[1::4], rel=1e-5)
    assert logged(logger, "loss") != pytest.approx(calls[3::4], rel=1e-3)


def test_resumed_from_a_checkpoint_is_the_uninterrupted_run(tmp_path: Path) -> None:
    def run(epochs: int, **fit: Any) -> Module:
        module = Module(dropout=0.0)
        saved = ModelCheckpoint(dirpath=tmp_path, filename="last", save_last=False)
        trainer(tmp_path, SAMCallback(rho=RHO, interval=2), max_epochs=epochs, callbacks=[saved]).fit(
            module, loader(6), **fit
        )
        return module

    whole = run(2)
    for old in tmp_path.glob("*.ckpt"):
        old.unlink()
    run(1)
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"][0]
    assert [(group["rho"], group["sam_steps"]) for group in state["param_groups"]] == [(RHO, 3)]
    assert distance(run(2, ckpt_path=tmp_path / "last.ckpt"), whole) == 0


class Small(LightningModule):
    """Weights enough to write a variant's equations out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
        self.lengths: list[float] = []

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return self.net(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def vector(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def variant_by_hand(net: torch.nn.Module, windows: list[Tensor], name: str, interval: int, clip: float) -> None:
    """GSAM, LookSAM and Stable SAM with the clip at the end."""
    params = list(net.parameters())
    look = torch.zeros(())
    for number, x in enumerate(windows):
        g = vector(torch.autograd.grad(net(x).square().mean(), params))
        w = vector(p.detach() for p in params)
        torch.nn.utils.vector_to_parameters(w + RHO * g / g.norm(), params)
        h = vector(torch.autograd.grad(net(x).square().mean(), params))
        if number % interval:
            h = look_sam_between(g, look)
        elif name == "look":
            look = look_sam_kept(g, h)
        elif name == "gsam":
            h = gsam(g, h, 0.7)
        else:
            h = stable_sam(g, h)
        torch.nn.utils.vector_to_parameters(w - LR * h * min(1.0, float(clip / (h.norm() + 1e-6))), params)


VARIANTS: dict[str, tuple[Any, int]] = {
    "gsam": (lambda: GSAM(0.7), 1),
    "look": (LookSAM, 3),
    "stable": (StableSAM, 1),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_lightning_clips_is_what_a_variant_made(tmp_path: Path, name: str) -> None:
    variant, interval = VARIANTS[name]
    module, clip = Small(), 0.01
    net = copy.deepcopy(module.net)
    x = torch.randn(48, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    trainer(
        tmp_path,
        SAMCallback(rho=RHO, variant=variant(), interval=interval),
        accumulate_grad_batches=2,
        gradient_clip_val=clip,
    ).fit(module, DataLoader(x, batch_size=4))  # type: ignore[arg-type]
    variant_by_hand(net, list(x.split(8)), name, interval, clip)
    assert distance(module.net, net) <= 1e-12


@pytest.mark.parametrize("variant", [LookSAM, FriendlySAM])
def test_what_a_variant_keeps_is_resumed(tmp_path: Path, variant: Any) -> None:
    """In the middle of LookSAM's interval; the module's optimizer is saved by Lightning, and has never heard of SAM."""
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def run(epochs: int, **fit: Any) -> Small:
        module = Small()
        saved = ModelCheckpoint(dirpath=tmp_path, filename="last")
        callback = SAMCallback(rho=RHO, variant=variant(), interval=3)
        loader: Any = DataLoader(x, batch_size=4)  # type: ignore[arg-type]
        trainer(tmp_path, callback, max_epochs=epochs, callbacks=[saved]).fit(module, loader, **fit)
        return module

    whole = run(2)
    for old in tmp_path.glob("*.ckpt"):
        old.unlink()
    run(1)
    state = torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"][0]["state"]
    assert all(any(name.startswith("sam_") for name in kept) for kept in state.values())
    assert distance(run(2, ckpt_path=tmp_path / "last.ckpt"), whole) == 0


class SharedOut(Module):
    """Each process gets every other text, in order; Lightning's own sampler shuffles."""

    def train_dataloader(self) -> DataLoader:
        rows: Any = rows_of_text(16)
        return DataLoader(rows, batch_size=1, sampler=DistributedSampler(rows, shuffle=False))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_two_processes_equal_one(tmp_path: Path, fraction: float) -> None:
    """Two processes with micro-batches of 1 text see what one sees with micro-batches of 2."""
    module = SharedOut()
    model = copy.deepcopy(module.model)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    saved = ModelCheckpoint(dirpath=tmp_path, filename="ddp")
    two = trainer(
        tmp_path,
        SAMCallback(rho=RHO, ascent_fraction=fraction),
        accumulate_grad_batches=2,
        strategy=strategy,
        use_distributed_sampler=False,
        devices=2,
        callbacks=[saved],
    )
    two.fit(module)
    weights = torch.load(tmp_path / "ddp.ckpt", weights_only=False)["state_dict"]
    sam_by_hand(model, windows(8, 2), torch.optim.AdamW(model.parameters(), lr=LR), RHO, fraction=fraction)
    assert largest_difference((weights[f"model.{name}"], p) for name, p in model.named_parameters()) <= 1e-9


def loss_with_a_part_for_some_rows(model: torch.nn.Module, rows: Tensor) -> Tensor:
    of_rows = [language_loss(model, row[None]) + (model.extra.square().sum() if odd(row) else 0) for row in rows]
    return torch.stack(of_rows).mean()


def odd(row: Tensor) -> bool:
    return int(row[0]) % 2 == 1


class SometimesUsed(SharedOut):
    """A weight that only some texts reach: then one rank has a gradient of it and the other has none."""

    def __init__(self) -> None:
        super().__init__()
        self.model.extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        return loss_with_a_part_for_some_rows(self.model, rows)


def test_two_processes_of_which_one_does_not_reach_a_weight(tmp_path: Path) -> None:
    module = SometimesUsed()
    model = copy.deepcopy(module.model)
    assert any(odd(window[0][0]) != odd(window[0][1]) for window in windows(8, 2))
    strategy = DDPStrategy(
        start_method="fork", process_group_backend="gloo", find_unused_parameters=True, timeout=timedelta(seconds=60)
    )
    two = trainer(
        tmp_path,
        SAMCallback(rho=RHO, ascent_fraction=0.5),
        accumulate_grad_batches=2,
        strategy=strategy,
        use_distributed_sampler=False,
        devices=2,
        callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="ddp")],
    )
    two.fit(module)
    weights = torch.load(tmp_path / "ddp.ckpt", weights_only=False)["state_dict"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    sam_by_hand(model, windows(8, 2), optimizer, RHO, fraction=0.5, loss=loss_with_a_part_for_some_rows)
    assert largest_difference((weights[f"model.{name}"], p) for name, p in model.named_parameters()) <= 1e-9


class R3FModule(Module):
    def __init__(self, seed: int | None = 5) -> None:
        super().__init__()
        self.r3f = fastpost.R3F(eps=0.5, seed=seed)

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        out = self.r3f(self.model, input_ids=rows, labels=rows)
        self.log("r3f/symm_kl", out.symm_kl)
        return out.loss


def test_r3f_in_a_training_step(tmp_path: Path) -> None:
    module = R3FModule()
    model = copy.deepcopy(module.model)
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, None, accumulate_grad_batches=2, logger=logger).fit(module, loader(16))
    r3f, optimizer = fastpost.R3F(eps=0.5, seed=5), torch.optim.AdamW(model.parameters(), lr=LR)
    for window in windows(8, 2):
        optimizer.zero_grad()
        for rows in window:
            (r3f(model, input_ids=rows, labels=rows).loss / 2).backward()
        optimizer.step()
    assert distance(module.model, model) <= 1e-9
    divergences = logged(logger, "r3f/symm_kl")
    assert len(divergences) == 4
    assert torch.tensor(divergences).min() > 0


def test_sam_and_r3f_see_the_same_noise_in_both_passes(tmp_path: Path) -> None:
    module = R3FModule(seed=None)
    model = copy.deepcopy(module.model)
    torch.manual_seed(8)
    trainer(tmp_path, SAMCallback(rho=RHO)).fit(module, loader(12))
    r3f = fastpost.R3F(eps=0.5)

    def closure(rows: Tensor) -> Tensor:
        loss = r3f(model, input_ids=rows, labels=rows).loss
        loss.backward()
        return loss.detach()

    torch.manual_seed(8)
    torch.empty((), dtype=torch.int64).random_()  # the seed that DataLoader draws
    opt = fastpost.SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=LR)
    for [rows] in windows(6, 1):
        opt.step(functools.partial(closure, rows))
    assert distance(module.model, model) <= 1e-9


class WithBatchNorm(Module):
    """Behind a batch norm, of which averaged weights need statistics of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)).double()

    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        self.calls += 1
        return self.model(rows.double()).square().mean()


def test_averaged_weights_get_their_statistics(tmp_path: Path) -> None:
    """StochasticWeightAveraging ends with an epoch of forward passes alone, in which SAM has nothing to do."""
    found = []
    for callback in (None, SAMCallback(rho=0.0)):
        averaging = StochasticWeightAveraging(swa_lrs=LR, swa_epoch_start=1)
        found.append(WithBatchNorm())
        trainer(tmp_path, callback, max_epochs=3, callbacks=[averaging]).fit(found[-1], loader(12))
    plain, sam = found
    assert sam.calls - plain.calls == 3 * 6
    assert all(same_bits(a, b) for a, b in zip(plain.state_dict().values(), sam.state_dict().values(), strict=True))


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_options_as_the_trainers_take_them(tmp_path: Path) -> None:
    """The same weights, bit for bit, as with the keywords of fastpost.SAM; another fit takes what was changed."""
    found = []
    given = PostTrainingOptions(method="sam", sam_rho=RHO, sam_variant="gsam:alpha=0.3", sam_interval=2)
    for callback in (SAMCallback(given), SAMCallback(rho=RHO, variant=GSAM(0.3), interval=2)):
        found.append(Module())
        trainer(tmp_path, callback, accumulate_grad_batches=2).fit(found[-1], loader(20))
    assert all(same_bits(p, q) for p, q in zip(*(m.parameters() for m in found), strict=True))
    callback = SAMCallback(given)
    found = [Module() for _ in range(3)]
    for perturb, module in zip(("stored", "functional"), found, strict=False):
        callback.options = PostTrainingOptions(sam_rho=2 * RHO, sam_perturb=perturb)
        trainer(tmp_path, callback).fit(module, loader(20))
        assert callback.sam is not None
        assert callback.sam.param_groups[0]["rho"] == 2 * RHO
    assert distance(*found[:2]) <= 1e-9
    callback.options = PostTrainingOptions(method="none")
    trainer(tmp_path, callback).fit(found[2], loader(20))
    plain = Module()
    trainer(tmp_path, None).fit(plain, loader(20))
    assert all(same_bits(p, q) for p, q in zip(found[2].parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "sam+r3f"}, r"SAMCallback does SAM, not method='sam\+r3f'"),
        ({"r3f_relative": "rdrop"}, "SAMCallback does no R3F"),
        ({"sam_variant": "tram"}, "SAMCallback does no R3F"),
        ({"sam_variant": "momentumsam"}, "MomentumSAM perturbs before the first pass"),
        ({"sam_sync_ascent": False}, "averages the ascent gradient over processes in any case"),
        ({"sam_functional_path": True}, r"FunctionalSAM\(opt\)\.watch\(head\)"),
        ({"sam_masters": True}, "precision='bf16-mixed'"),
    ],
)
def test_options_that_lightning_does_not_serve(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMCallback(PostTrainingOptions(**given))
    with pytest.raises(ValueError, match="leave rho out"):
        SAMCallback(PostTrainingOptions(), rho=RHO)
    with pytest.raises(TypeError, match=r"go by their names, as rho=0\.05"):
        SAMCallback(0.05)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1}, "rho"),
        ({"ascent_fraction": 0}, "ascent_fraction"),
        ({"roh": 0.1}, "Did you mean 'rho'"),
        ({"sync_ascent": True}, "sync_ascent"),
        ({"norm_group": None}, r"override SAMTrainer\.sam_norm_group"),
        ({"variant": MomentumSAM()}, "plain loop"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMCallback(**options)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Empty(Module):
    def training_step(self, rows: Tensor, batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(rows, batch_idx)


class Failing(Module):
    def training_step(self, rows: Tensor, batch_idx: int) -> Any:
        if self.calls == 3:  # the second pass over the second batch's window
            raise KeyboardInterrupt
        return super().training_step(rows, batch_idx)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manual optimisation"):
        trainer(tmp_path, SAMCallback()).fit(Manual(), loader(4))

    with pytest.raises(ValueError, match="two of them would make every pass twice"):
        trainer(tmp_path, SAMCallback(), callbacks=[SAMCallback()]).fit(Module(), loader(4))

    class Twice(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fastpost.SAM(None, super().configure_optimizers())

    with pytest.raises(ValueError, match=r"gave a fastpost\.SAM.*return the plain optimizer"):
        trainer(tmp_path, SAMCallback()).fit(Twice(), loader(4))
    with pytest.raises(RuntimeError, match="returned None"):
        trainer(tmp_path, SAMCallback(), accumulate_grad_batches=4).fit(Empty(), loader(16))

    class Validated(Module):
        def validation_step(self, rows: Tensor, batch_idx: int) -> None: ...

    module = Validated()
    before = copy.deepcopy(module)
    middle = trainer(
        tmp_path,
        SAMCallback(ascent_fraction=0.5),
        accumulate_grad_batches=4,
        val_check_interval=3,
        num_sanity_val_steps=0,
    )
    with pytest.raises(RuntimeError, match="validation in the middle of an accumulation window"):
        middle.fit(module, loader(16), loader(2))
    assert distance(module, before) == 0


class Augmented(LightningModule):
    """What each pass saw: the batch, and a dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 2).double()
        self.seen: list[Tensor] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch["x"] = batch["x"] + torch.randn((), dtype=torch.float64)

    def training_step(self, *args: Any) -> Tensor:
        """As a decorator leaves it: Lightning gives such a step the number as well."""
        batch, number = args
        assert number == len(self.seen) // 2
        x = batch.pop("x")
        self.seen.append(torch.cat((x.flatten(), torch.nn.functional.dropout(torch.ones(8).double()))))
        return self.net(x).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


class Mixup(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batch["x"].add_(torch.rand(()))
        batch["x"] = batch["x"] * 0.7 + 0.3 * batch["x"].flip(0)


def test_both_passes_see_what_the_hooks_before_them_made(tmp_path: Path) -> None:
    """Those of callbacks behind SAM's, of the module, and the random numbers that they drew."""
    data = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)} for i in range(8)]
    for callbacks in ([SAMCallback(rho=RHO), Mixup()], [Mixup(), SAMCallback(rho=RHO)]):
        module = Augmented()
        fit = trainer(tmp_path, None, callbacks=callbacks)
        fit.fit(module, DataLoader(data, batch_size=2))
        assert len(module.seen) == 8
        for first, second in zip(module.seen[::2], module.seen[1::2], strict=True):
            assert same_bits(first, second)
        assert "training_step" not in vars(fit.strategy)


class Counts(Callback):
    """Puts its own in the place of the strategy's step at the first batch, and leaves it there."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            own = trainer.strategy.training_step

            def counted(*args: Any) -> Any:
                self.steps += 1
                return own(*args)

            trainer.strategy.training_step = counted


def test_what_others_put_around_a_step_stays(tmp_path: Path) -> None:
    found = []
    for order in (1, -1):
        counts, module = Counts(), Module()
        trainer(tmp_path, None, callbacks=[SAMCallback(rho=RHO), counts][::order]).fit(module, loader(6))
        found.append((counts.steps, [p.detach() for p in module.parameters()]))
    (behind, first), (before, second) = found
    assert behind == before == 2 * 3  # both passes of each batch
    assert all(map(same_bits, first, second))


def test_an_interrupted_second_pass_leaves_w(tmp_path: Path) -> None:
    module = Failing()
    model = copy.deepcopy(module.model)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, SAMCallback(rho=RHO)).fit(module, loader(8))
    sam_by_hand(model, windows(1, 1), torch.optim.AdamW(model.parameters(), lr=LR), RHO)
    assert distance(module.model, model) <= 1e-9


class Short(Module):
    """Leaves its first epoch after the third of six batches, in the middle of a window of two."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


class InPlace(Module):
    def training_step(self, rows: Tensor, batch_idx: int) -> Tensor:
        rows[:, 0] = 0
        return super().training_step(rows, batch_idx)


def test_a_training_step_that_changes_its_batch_is_refused(tmp_path: Path) -> None:
    module = InPlace()
    before = copy.deepcopy(module.model)
    with pytest.raises(RuntimeError, match="micro-batch 0 was changed in place in its first pass"):
        trainer(tmp_path, SAMCallback(rho=RHO)).fit(module, loader(4))
    assert module.calls == 1
    assert distance(module.model, before) == 0


def test_an_epoch_may_be_left_anywhere(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2}
    model = Short()
    callback = SAMCallback(rho=0.05)
    fitted = trainer(tmp_path, callback, **options)
    fitted.fit(model, loader(12))
    assert fitted.current_epoch == 2
    assert fitted.global_step == 1 + 3
    assert callback.sam is not None
    assert not callback.sam.is_perturbed


def test_a_module_without_an_optimizer(tmp_path: Path) -> None:
    class Still(Module):
        def configure_optimizers(self) -> Any:
            return None

    with pytest.raises(ValueError, match="configure_optimizers gave no optimizer"):
        trainer(tmp_path, SAMCallback()).fit(Still(), loader(4))
