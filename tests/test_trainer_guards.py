"""Guards on ascent in the Trainer: a run that breaks a bound ends at its last good state, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from fastpost.integrations import guards
from fastpost.integrations.transformers import DriftGuard, LossGuard, SAMTrainer

from . import tiny
from .conftest import same_bits
from .trainers import arguments, logged, trainer_of, weights


class Ascent(Trainer):
    """Uphill, as unlearning goes."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return -super().compute_loss(*args, **kwargs)


class Remember(TrainerCallback):
    """Comes before the guards, so it sees every step's weights before they are taken back."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.states = model, [weights(model)]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.states.append(weights(self.model))

    def drift(self, step: int) -> float:
        pairs = zip(self.states[step], self.states[0], strict=True)
        return float(sum((a.double() - b.double()).square().sum() for a, b in pairs).sqrt())


def run(tmp_path: Any, *guards: Any, cls: type = Ascent, **options: Any) -> tuple[Any, Remember]:
    model = tiny.build("causal")
    remember = Remember(model)
    trainer = trainer_of(cls, model, arguments(tmp_path, 12, **options), callbacks=[remember, *guards])
    trainer.train()
    return trainer, remember


def test_drift_is_bounded(tmp_path: Any) -> None:
    _, free = run(tmp_path)
    drifts = [free.drift(step) for step in range(13)]
    bound = (drifts[5] + drifts[6]) / 2
    guard = DriftGuard(max_drift=bound)
    trainer, guarded = run(tmp_path, guard)
    assert (guard.stopped_at, guard.last_good, trainer.state.global_step) == (6, 5, 6)
    assert guard.drift == pytest.approx(drifts[5], rel=1e-6)
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), guarded.states[5], strict=True))
    assert "exceeds max_drift" in guard.reason
    assert "step 5" in guard.reason


def test_drift_of_a_layer_is_bounded_and_checks_may_be_rare(tmp_path: Any) -> None:
    guard = DriftGuard(max_drift=1e9, max_layer_drift=0.3, every=3)
    trainer, guarded = run(tmp_path, guard)
    assert guard.stopped_at is not None
    assert guard.stopped_at % 3 == 0
    assert guard.last_good == guard.stopped_at - 3
    assert "max_layer_drift" in guard.reason
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), guarded.states[guard.last_good], strict=True))


SAVING = {"save_strategy": "steps", "save_steps": 2}


def resumed(folder: Any, checkpoint: Any, *guards: Any, **options: Any) -> Any:
    trainer = trainer_of(Ascent, tiny.build("causal"), arguments(folder, 12, **SAVING, **options), callbacks=list(guards))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.parametrize("moved", ["same folder", "other output_dir", "folder moved"])
def test_a_resumed_run_is_bounded_from_where_it_began(tmp_path: Path, moved: str) -> None:
    _, free = run(tmp_path / "free")
    drifts = [free.drift(step) for step in range(13)]
    bound = (drifts[5] + drifts[6]) / 2
    first = tmp_path / "first"
    layered = DriftGuard(max_layer_drift=1e9)
    whole, _ = run(first, DriftGuard(max_drift=bound), layered, **SAVING)
    start = load_file(first / "drift_guard_start.safetensors")
    assert {name: same_bits(t, start[name]) for name, t in tiny.build("causal").named_parameters()} == dict.fromkeys(
        start, True
    )
    folder = {"same folder": first, "other output_dir": tmp_path / "second", "folder moved": tmp_path / "third"}[moved]
    if moved == "folder moved":
        first.rename(folder)
    both = DriftGuard(max_drift=bound), DriftGuard(max_layer_drift=1e9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = resumed(folder, (first if first.exists() else folder) / "checkpoint-4", *both)
    assert (both[0].stopped_at, both[0].last_good) == (6, 5)
    assert both[0].drift == pytest.approx(drifts[5], rel=1e-6)
    assert both[1].drift == pytest.approx(layered.drift, rel=1e-6)
    assert all(same_bits(p, q) for p, q in zip(weights(again.model), weights(whole.model), strict=True))
    written = folder / "drift_guard_start.safetensors"
    assert all(same_bits(t, start[name]) for name, t in load_file(written).items())


@pytest.mark.parametrize("why", ["missing", "of another run", "broken", "of another dtype", "no guard before"])
def test_a_resumed_run_without_its_start_says_what_the_bound_means(tmp_path: Path, why: str) -> None:
    _, free = run(tmp_path, *[DriftGuard(max_drift=1e9)] * (why != "no guard before"), **SAVING)
    start = tmp_path / "drift_guard_start.safetensors"
    if why == "missing":
        start.unlink()
    elif why == "broken":
        start.write_bytes(start.read_bytes()[:100])
    elif why == "of another dtype":
        with safe_open(start, "pt") as file:
            metadata = file.metadata()
        save_file({name: t.double() for name, t in load_file(start).items()}, start, metadata)
    elif why == "of another run":
        model = tiny.build("causal")
        model.transformer.ln_f.bias.data.add_(1)
        trainer = trainer_of(Ascent, model, arguments(tmp_path, 2, **SAVING), callbacks=[DriftGuard(max_drift=1e9)])
        trainer.train()
    before = start.read_bytes() if start.exists() else None
    guard = DriftGuard(max_drift=1e9, every=5)
    told = "saved without a DriftGuard" if why == "no guard before" else r"drift_guard_start\.safetensors of the run"
    with pytest.warns(UserWarning, match=rf"{told}.* from the weights of step 4, not from"):
        resumed(tmp_path, tmp_path / "checkpoint-4", guard)
    pairs = zip(free.states[10], free.states[4], strict=True)
    expected = float(sum((a.double() - b.double()).square().sum() for a, b in pairs).sqrt())
    assert guard.drift == pytest.approx(expected, rel=1e-6)
    if why == "no guard before":  # a run of its own begins
        names = [name for name, _ in tiny.build("causal").named_parameters()]
        assert all(same_bits(load_file(start)[name], p) for name, p in zip(names, free.states[4], strict=True))
    else:
        assert (start.read_bytes() if start.exists() else None) == before


@pytest.mark.parametrize("moved", [False, True])
def test_a_start_that_was_not_found_counts_again_once_it_is_back(
    tmp_path: Path, moved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One resumed run cannot read it, and writes checkpoints; the next one goes on from those."""

    def unreadable(path: Any, *_: Any) -> Any:
        raise OSError(f"{path}: stale file handle")

    folder, start = tmp_path / "first", tmp_path / "first" / "drift_guard_start.safetensors"
    _, free = run(folder, DriftGuard(max_drift=1e9), **SAVING)
    before, second = start.read_bytes(), tmp_path / "second" if moved else folder
    with monkeypatch.context() as patch:
        patch.setattr(guards, "safe_open", unreadable)
        with pytest.warns(UserWarning, match="from the weights of step 4, not from"):
            resumed(second, folder / "checkpoint-4", DriftGuard(max_drift=1e9))
    assert start.read_bytes() == before
    assert list(tmp_path.glob("*/drift_guard_start*")) == [start]
    guard = DriftGuard(max_drift=1e9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed(second, second / "checkpoint-8", guard)
    assert guard.drift == pytest.approx(free.drift(12), rel=1e-6)


def test_a_run_without_checkpoints_writes_no_start(tmp_path: Path) -> None:
    run(tmp_path, DriftGuard(max_drift=1e9))
    assert not list(tmp_path.glob("drift_guard_start*"))


class Rising(Trainer):
    """Its loss is known: 1, 2, 3, ... at step 1, 2, 3, ..."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss - loss.detach() + self.state.global_step + 1


def test_loss_is_bounded(tmp_path: Any) -> None:
    guard = LossGuard(max_loss=4.5)
    trainer, guarded = run(tmp_path, guard, cls=Rising)
    assert logged(trainer, "loss") == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert (guard.stopped_at, guard.last_good) == (5, 3)  # the fifth loss is that of step 4's weights
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), guarded.states[3], strict=True))


def test_a_loss_that_is_not_a_number_breaks_the_bound(tmp_path: Any) -> None:
    class Nan(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    guard = LossGuard(max_loss=100.0)
    trainer, guarded = run(tmp_path, guard, cls=Nan, logging_nan_inf_filter=False)
    assert (guard.stopped_at, guard.last_good) == (3, 1)
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), guarded.states[1], strict=True))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_what_is_restored_has_a_loss_within_the_bound(tmp_path: Any) -> None:
    """A loss is known one update after the weights that it is of."""

    class Poisoned(Ascent):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 3:
                next(iter(model.parameters())).grad.fill_(float("nan"))
            return loss

    guard = LossGuard(max_loss=1e9)
    trainer, guarded = run(tmp_path, guard, cls=Poisoned, logging_nan_inf_filter=False, max_grad_norm=0.0)
    assert (guard.stopped_at, guard.last_good) == (5, 3)
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), guarded.states[3], strict=True))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_guards_beside_sam(tmp_path: Any) -> None:
    """They look after a step, where the weights are w."""
    guard = DriftGuard(max_drift=0.5)
    options = {"gradient_accumulation_steps": 2, "sam_rho": 5.0}  # e alone is ten times the bound
    trainer, guarded = run(tmp_path, guard, cls=SAMTrainer, **options)
    assert guard.stopped_at == 1 or guarded.drift(guard.last_good) <= 0.5
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), guarded.states[guard.last_good], strict=True))


def test_bad_bounds() -> None:
    with pytest.raises(ValueError, match="give max_drift, max_layer_drift or both"):
        DriftGuard()
    with pytest.raises(ValueError, match="max_drift must be > 0"):
        DriftGuard(max_drift=-1.0)
    with pytest.raises(ValueError, match="every must be > 0"):
        DriftGuard(max_drift=1.0, every=0)
    with pytest.raises(ValueError, match="max_loss must be a number"):
        LossGuard(float("nan"))
