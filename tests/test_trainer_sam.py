"""SAM in transformers' Trainer against the loop written from its equations, in float64."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import IterableDataset
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainingArguments

from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.transformers import SAMTrainer, SAMTrainerMixin, Seq2SeqPostTrainingArguments
from fastpost.sam import external, hooks

from . import tiny
from .by_hand import ascended, distance
from .conftest import same_bits
from .trainers import (
    CLIP,
    RHO,
    arguments,
    by_hand,
    causal_loss,
    exact,
    items_of,
    logged,
    optimizer_of,
    rows,
    stacked,
    trainer_of,
    weights,
    windows,
)

TOLERANCE = 1e-9


def model(dropout: float = 0.0) -> Any:
    return exact(tiny.build("causal", dropout, torch.float64))


@pytest.mark.parametrize(("accumulation", "fraction"), [(1, 1.0), (3, 1.0), (3, 0.25), (4, 0.5)])
def test_twenty_steps_are_the_loop_from_the_equations(tmp_path: Any, accumulation: int, fraction: float) -> None:
    """Windows at the end of an epoch are shorter; clipping and the logged norm are those of the second gradient."""
    mine, hand = model(), model()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, sam_ascent_fraction=fraction)
    trainer = trainer_of(SAMTrainer, mine, args)
    trainer.train()
    norms = by_hand(hand, windows(rows(), accumulation, 20), fraction=fraction)
    assert distance(mine, hand) <= TOLERANCE
    assert distance(mine, model()) > 1e-2
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert torch.tensor(norms).min() > args.max_grad_norm  # every step was clipped


class Counting:
    """Counts forward passes that train, as the model is called."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.passes = [*getattr(self, "passes", []), int(inputs["input_ids"][0, 0])]
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, lambda n: n),
        ({"sam_ascent_fraction": 0.25}, lambda n: math.ceil(n / 4)),
        ({"sam_per_micro_batch": True}, lambda n: n),
    ],
)
def test_the_extra_passes_are_those_of_the_ascent(tmp_path: Any, options: dict, extra: Any) -> None:
    class CountingTrainer(Counting, SAMTrainer):
        pass

    trainer = trainer_of(CountingTrainer, model(), arguments(tmp_path, 3, gradient_accumulation_steps=4, **options))
    trainer.train()
    steps = windows(rows(), 4, 3)
    sizes = [len(mine) for (mine,) in steps]
    assert sizes == [4, 4, 2]
    assert len(trainer.passes) == sum(n + extra(n) for n in sizes)
    if options.get("sam_ascent_fraction"):
        first = [int(batch["input_ids"][0, 0]) for batch in steps[0][0]]
        assert trainer.passes[:5] == [first[0], first[0], *first[1:]]


def test_m_sam_adds_the_second_gradients_of_micro_batches(tmp_path: Any) -> None:
    """Each at its own w + e."""
    mine, hand = model(), model()
    trainer_of(SAMTrainer, mine, arguments(tmp_path, 6, gradient_accumulation_steps=3, sam_per_micro_batch=True)).train()
    opt, params = optimizer_of(hand), list(hand.parameters())
    for window in windows(rows(), 3, 6):
        items, total = items_of(window), [torch.zeros_like(p) for p in params]
        for batch in window[0]:
            with ascended(params, torch.autograd.grad(causal_loss(hand, batch, items), params), RHO):
                second = torch.autograd.grad(causal_loss(hand, batch, items), params)
            for part, sum_ in zip(second, total, strict=True):
                sum_ += part
        for p, sum_ in zip(params, total, strict=True):
            p.grad = sum_
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
    assert distance(mine, hand) <= TOLERANCE


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_rho_zero_is_the_plain_trainer_bit_by_bit_with_dropout(tmp_path: Any, fraction: float) -> None:
    """Both passes of a micro-batch draw the same masks, and generators go on as if there had been one."""
    plain, sam = model(0.3), model(0.3)
    options = {"gradient_accumulation_steps": 3, "sam_rho": 0.0, "sam_ascent_fraction": fraction}
    reference = trainer_of(Trainer, plain, arguments(tmp_path, 6, **options))
    reference.train()
    trainer = trainer_of(SAMTrainer, sam, arguments(tmp_path, 6, **options))
    trainer.train()
    assert all(same_bits(p, q) for p, q in zip(plain.parameters(), sam.parameters(), strict=True))
    assert logged(trainer, "loss") == logged(reference, "loss")


@pytest.mark.parametrize(
    ("options", "label_smoothing"), [({"label_smoothing_factor": 0.1}, 0.1), ({"gradient_checkpointing": True}, 0.0)]
)
def test_label_smoothing_and_checkpointing(tmp_path: Any, options: dict, label_smoothing: float) -> None:
    mine, hand = model(), model()
    trainer_of(SAMTrainer, mine, arguments(tmp_path, 6, gradient_accumulation_steps=2, **options)).train()

    def loss(m: Any, batch: Any, items: float) -> torch.Tensor:
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return total / items

    by_hand(hand, windows(rows(), 2, 6), loss)
    assert distance(mine, hand) <= (1e-6 if label_smoothing else TOLERANCE)  # transformers' smoothing sums in float32


def test_a_compiled_model(tmp_path: Any) -> None:
    mine, hand = model(), model()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_accumulation_steps": 2}
    trainer = trainer_of(SAMTrainer, mine, arguments(tmp_path, 3, **options))
    trainer.train()
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    by_hand(hand, windows(rows(), 2, 3))
    assert distance(mine, hand) <= TOLERANCE


def test_encoder_decoders_and_interval_and_scope(tmp_path: Any) -> None:
    """Seq2SeqTrainer; e moves only what is in scope; every second step is a plain one."""

    class Sam(SAMTrainerMixin, Seq2SeqTrainer):
        pass

    seen: list[set[str]] = []

    class Looking(Sam):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            moved = {n for n, p in model.named_parameters() if not same_bits(p, self.known[n])}
            seen.append(moved)
            return super().compute_loss(model, *args, **kwargs)

    bart = tiny.build("seq2seq", 0.0, torch.float64)
    data = [{**row, "labels": row["input_ids"]} for row in rows()]
    args = arguments(tmp_path, 5, sam_scope="*layer_norm*, *layernorm*", sam_interval=2, cls=Seq2SeqPostTrainingArguments)
    trainer = trainer_of(Looking, bart, args, data)

    class Remember(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.known = {n: p.detach().clone() for n, p in bart.named_parameters()}

    trainer.add_callback(Remember())
    trainer.train()
    assert [bool(moved) for moved in seen] == [False, True, False, False, True, False, False, True]
    assert all("norm" in name for moved in seen for name in moved)
    with pytest.raises(ValueError, match="no parameter's name fits"):
        trainer_of(SAMTrainer, model(), arguments(tmp_path, 1, sam_scope="lora"))


def test_a_subclass_with_a_loss_of_its_own(tmp_path: Any) -> None:
    """As unlearning trainers are written: gradient ascent, a batch inside the batch, no PostTrainingArguments."""

    class Unlearn(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            forget = inputs.pop("forget")
            return -model(**forget, num_items_in_batch=num_items_in_batch).loss

    class SamUnlearn(SAMTrainerMixin, Unlearn):
        loss_is_scaled_for_ga = False

    base = arguments(tmp_path, 4, gradient_accumulation_steps=2)
    plain = TrainingArguments(**{n: getattr(base, n) for n in ("output_dir", "max_steps", "learning_rate", "use_cpu")})
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm", "weight_decay"):
        setattr(plain, name, getattr(base, name))
    plain.lr_scheduler_type, plain.report_to, plain.remove_unused_columns = base.lr_scheduler_type, [], False
    plain.optim, plain.save_strategy = base.optim, base.save_strategy
    mine, hand = model(), model()
    trainer = trainer_of(
        SamUnlearn,
        mine,
        plain,
        data_collator=lambda part: {"forget": stacked(part)},
        post_training=PostTrainingOptions(sam_rho=RHO),
    )
    trainer.train()

    def loss(m: Any, batch: Any, items: float) -> torch.Tensor:
        return -m(**batch).loss / 2

    by_hand(hand, windows(rows(), 2, 4), loss)
    assert distance(mine, hand) <= TOLERANCE


class Stream(IterableDataset):
    """Five micro-batches, whose number nobody knows beforehand."""

    def __iter__(self) -> Any:
        return iter(rows(number=10))


def test_what_a_stream_leaves_over_is_dropped(tmp_path: Any) -> None:
    """Windows of three: the Trainer makes no step on the last two micro-batches, and SAM keeps nothing of them."""
    mine, hand = model(), model()
    trainer = SAMTrainer(mine, arguments(tmp_path, 3, gradient_accumulation_steps=3), train_dataset=Stream())
    trainer.train()
    assert trainer.state.global_step == 3
    by_hand(hand, [windows(rows(number=10), 3, 1)[0]] * 3)
    assert distance(mine, hand) <= TOLERANCE


def test_what_is_logged(tmp_path: Any) -> None:
    """float32 weights under bfloat16 autocast: the forward sees e and much rounding noise."""
    exact = trainer_of(SAMTrainer, model(), arguments(tmp_path, 4, logging_steps=2, gradient_accumulation_steps=2))
    exact.train()
    assert logged(exact, "sam/seen_over_intended") == pytest.approx([1.0, 1.0], abs=1e-6)
    assert logged(exact, "sam/seen_cosine") == pytest.approx([1.0, 1.0], abs=1e-6)
    assert logged(exact, "sam/skipped_steps") == [0, 0]
    noisy = trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path, 4, bf16=True, logging_steps=2))
    noisy.train()
    assert torch.tensor(logged(noisy, "sam/seen_over_intended")).min() > 1.001
    assert torch.tensor(logged(noisy, "sam/seen_cosine")).max() < 0.999
    assert exact.sam.param_groups[0]["rho"] == RHO
    assert weights(exact.model)[0].dtype == torch.float64


class Reads(TorchDispatchMode):
    """Counts values that the host reads, which on an accelerator wait for it, by the file that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe(1)
            while f"torch{os.sep}" in frame.f_code.co_filename:
                frame = frame.f_back
            self.files["/".join(Path(frame.f_code.co_filename).parts[-2:])] += 1
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_that_the_trainer_does_not_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights and flags taken for an accelerator's, and a fused optimizer, which is told of an overflow there."""
    for module in (external, hooks):
        monkeypatch.setattr(module, "is_on_cpu", lambda norm: False)
    options = {"optim": "adamw_torch_fused", "gradient_accumulation_steps": 3, "logging_steps": 100}
    found = []
    for cls in (Trainer, SAMTrainer):
        trainer = trainer_of(cls, tiny.build("causal", 0.1), arguments(tmp_path, 6, **options))
        with Reads() as reads:
            trainer.train()
        found.append(reads.files)
    plain, sam = found
    passes = "transformers/masking_utils.py"  # once per forward pass, on the CPU
    assert sam.pop(passes) == 2 * plain.pop(passes)
    assert sam == plain
    assert sum(plain.values()) > 0
