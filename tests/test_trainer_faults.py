"""SAM in the Trainer when something goes wrong: gradients that are not finite, exceptions, windows left in the middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from fastpost.integrations.mixin import innermost
from fastpost.integrations.transformers import R3FTrainer, SAMTrainer
from fastpost.sam import external

from . import tiny
from .by_hand import distance
from .conftest import same_bits
from .trainers import arguments, exact, rows, trainer_of, weights


class Spoiled(SAMTrainer):
    """Its loss is infinite in the passes of `spoil`, counted from 0."""

    spoil: frozenset[int] = frozenset()
    passes = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.passes += 1
        return loss * float("inf") if self.passes - 1 in self.spoil else loss


class Watch(TrainerCallback):
    """Remembers weights, moments and the scale after every step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.seen, self.steps, self.scales = trainer, [weights(trainer.model)], [], []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(weights(self.trainer.model))
        state = innermost(self.trainer.optimizer).state
        self.steps.append({int(s["step"]) for s in state.values()})
        scaler = self.trainer.accelerator.scaler
        self.scales.append(None if scaler is None else scaler.get_scale())


def unchanged(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(same_bits(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("told", ["gradients dropped", "found_inf", "scaler"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("spoil", [4, 6])
def test_a_gradient_that_is_not_finite_skips_the_step(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, spoil: int, optim: str, told: str
) -> None:
    """Two micro-batches to a step, so passes 4 and 5 are the second step's ascent, 6 and 7 its descent.

    Accelerators tell a fused optimizer on the device; the CPU's fused AdamW takes that too, so it is shown here.
    """
    scaler = told == "scaler"
    if told == "found_inf":
        monkeypatch.setattr(external, "is_on_cpu", lambda norm: False)
    args = arguments(tmp_path, 4, gradient_accumulation_steps=2, optim=optim)
    trainer = trainer_of(Spoiled, tiny.build("causal"), args)
    trainer.spoil = frozenset({spoil})
    if scaler:  # Accelerate makes one for GPUs only; the path is the same
        scaled = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        trainer.accelerator.unscale_gradients = lambda: scaled.unscale_(innermost(trainer.optimizer))
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert [unchanged(a, b) for a, b in zip(watch.seen, watch.seen[1:], strict=False)] == [False, True, False, False]
    assert watch.steps == [{1}, {1}, {2}, {3}]
    assert watch.scales == ([256.0, 128.0, 128.0, 128.0] if scaler else [None] * 4)
    assert trainer.sam.skipped_steps == 1
    assert not hasattr(innermost(trainer.optimizer), "found_inf")
    assert [line["sam/skipped_steps"] for line in trainer.state.log_history if "loss" in line] == [0, 1, 1, 1]


def test_a_scaler_changes_nothing_else(tmp_path: Any) -> None:
    """e does not feel the scale, which is a power of two; the trainer unscales once, before it clips."""
    plain, scaled = (exact(tiny.build("causal", 0.0, torch.float64)) for _ in range(2))
    trainer_of(SAMTrainer, plain, arguments(tmp_path, 4, gradient_accumulation_steps=3)).train()
    trainer = trainer_of(SAMTrainer, scaled, arguments(tmp_path, 4, gradient_accumulation_steps=3))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler = trainer.accelerator.scaler
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(innermost(trainer.optimizer))  # as under fp16
    trainer.train()
    assert scaler.get_scale() == 256.0
    assert distance(plain, scaled) <= 1e-9


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4])
def test_an_exception_in_any_pass_leaves_the_weights_restored(tmp_path: Any, which: int) -> None:
    class Failing(SAMTrainer):
        passes = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            if self.passes - 1 == which:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    model = tiny.build("causal")
    before = weights(model)
    args = arguments(tmp_path, 2, gradient_accumulation_steps=4, sam_ascent_fraction=0.25)
    trainer = trainer_of(Failing, model, args)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert unchanged(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    Failing.compute_loss = SAMTrainer.compute_loss
    trainer.train()  # and it goes on
    assert not unchanged(before, weights(model))


class InTheMiddle(TrainerCallback):
    def __init__(self, what: Any) -> None:
        self.what, self.substeps = what, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.substeps += 1
        if self.substeps == 2:
            self.what(control)


def test_a_window_left_in_the_middle_is_given_up(tmp_path: Any) -> None:
    """Its first micro-batch was the ascent, so the weights are w + e between its micro-batches."""
    model = tiny.build("causal")
    before = weights(model)
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 2, gradient_accumulation_steps=4, sam_ascent_fraction=0.25))
    perturbed = []

    def stop(control: Any) -> None:
        perturbed.append(not unchanged(before, weights(model)))
        control.should_training_stop = True

    trainer.add_callback(InTheMiddle(stop))
    trainer.train()
    assert perturbed == [True]
    assert unchanged(before, weights(model))


def test_saving_in_the_middle_of_a_window_saves_w(tmp_path: Any) -> None:
    model = tiny.build("causal")
    before = weights(model)
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 2, gradient_accumulation_steps=4, sam_ascent_fraction=0.25))
    trainer.add_callback(InTheMiddle(lambda control: trainer.save_model(str(tmp_path / "saved"))))
    with pytest.raises(RuntimeError, match="saved in the middle of an accumulation window"):
        trainer.train()
    saved = type(model).from_pretrained(tmp_path / "saved")
    assert unchanged(before, weights(saved))
    assert unchanged(before, weights(model))


def test_what_cannot_be_served_is_refused_at_construction(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="steps inside backward"):
        SAMTrainer(tiny.build("causal"), arguments(tmp_path, optim="adalomo"), train_dataset=rows())

    class Deep(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

        def _validate_args(self) -> None:
            pass

    with pytest.raises(ValueError, match="DeepSpeed's engine partitions gradients"):
        type("Sam", (SAMTrainer, Deep), {})(tiny.build("causal"), arguments(tmp_path), train_dataset=rows())

    class Flat(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True
            self.accelerator.state.fsdp_plugin = type("Plugin", (), {"fsdp_version": 1})()

    with pytest.raises(ValueError, match="FSDP1 keeps weights in flat buffers"):
        type("Sam", (SAMTrainer, Flat), {})(tiny.build("causal"), arguments(tmp_path), train_dataset=rows())

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match=r"Own\.compute_loss makes the clean pass itself"):
        type("R3f", (R3FTrainer, Own), {})(
            tiny.build("causal"), arguments(tmp_path, r3f_fused_linear=True), train_dataset=rows()
        )
    with pytest.raises(TypeError, match="compute_loss_func computes a loss of its own"):
        R3FTrainer(tiny.build("causal"), arguments(tmp_path), train_dataset=rows(), compute_loss_func=lambda *_, **__: 0)


def test_an_optimizer_that_hides_its_base() -> None:
    class Box:
        pass

    with pytest.raises(TypeError, match="Box is no torch optimizer"):
        innermost(Box())


def test_a_run_begun_again_in_the_middle_of_a_window_begins_at_w(tmp_path: Any) -> None:
    """As auto_find_batch_size does after an out-of-memory error between two micro-batches."""
    seen: list[list[torch.Tensor]] = []

    class Trouble(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append(weights(model))

        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            if len(seen) == 1:
                assert trainer.sam.is_perturbed
                raise RuntimeError("CUDA out of memory.")

    model = tiny.build("causal")
    before = weights(model)
    options = {"gradient_accumulation_steps": 4, "sam_ascent_fraction": 0.25, "sam_rho": 0.5, "auto_find_batch_size": True}
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 1, **options), callbacks=[Trouble()])
    trainer.train()
    assert len(seen) == 2
    assert all(same_bits(p, q) for p, q in zip(seen[1], before, strict=True))


PART = {"gradient_accumulation_steps": 4, "sam_ascent_fraction": 0.25, "sam_rho": 0.5}


def test_evaluating_in_the_middle_of_a_window_never_measures_w_plus_e(tmp_path: Any) -> None:
    class Evaluating(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            trainer.evaluate()

    model = tiny.build("causal")
    before = weights(model)
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 1, **PART), eval_dataset=rows(), callbacks=[Evaluating()])
    with pytest.raises(RuntimeError, match=r"would measure w \+ e; evaluate after a step"):
        trainer.train()
    assert unchanged(before, weights(model))
    whole = {**PART, "sam_ascent_fraction": 1.0}
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 1, **whole), eval_dataset=rows(), callbacks=[Evaluating()])
    trainer.train()  # there the window's weights are w until its last micro-batch
    assert trainer.sam.skipped_steps == 0


def test_asking_for_the_data_in_the_middle_of_a_window_changes_nothing(tmp_path: Any) -> None:
    class Asking(TrainerCallback):
        def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
            len(trainer.get_train_dataloader())

    found = []
    for callbacks in ([], [Asking()]):
        model = exact(tiny.build("causal", 0.0, torch.float64))
        trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 2, **PART), callbacks=callbacks)
        trainer.train()
        found.append(weights(model))
    assert unchanged(*found)


def test_an_optimizer_that_finds_its_own_rate(tmp_path: Any) -> None:
    """Adafactor(lr=None, relative_step=True), T5's recipe, on steps with and without an ascent."""
    from transformers.optimization import Adafactor

    model = tiny.build("causal")
    optimizer = Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda step: 1.0)
    args = arguments(tmp_path, 4, sam_interval=2, optim="adamw_torch")
    trainer = trainer_of(SAMTrainer, model, args, optimizers=(optimizer, schedule))
    trainer.train()
    assert optimizer.param_groups[0]["sam_steps"] == 4
