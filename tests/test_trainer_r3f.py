"""R3F in transformers' Trainer against loops by hand: fastpost.R3F over windows, and its equations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import HPSearchBackend

from fastpost import R3F, add_noise
from fastpost.integrations.transformers import (
    AnchorTrainer,
    PostTrainer,
    R3FTrainer,
    R3FTrainerMixin,
    Seq2SeqPostTrainingArguments,
)

from . import tiny
from .by_hand import distance
from .conftest import same_bits
from .trainers import (
    BATCH,
    CLIP,
    RHO,
    arguments,
    causal_loss,
    exact,
    items_of,
    logged,
    optimizer_of,
    rows,
    stacked,
    trainer_of,
    windows,
)

R3F_OPTIONS = {"r3f_eps": 0.3, "r3f_lambda": 0.7, "noise_type": "normal", "r3f_seed": 5}


class Seq2SeqR3F(R3FTrainerMixin, Seq2SeqTrainer):
    pass


def data_of(kind: str) -> list[dict[str, Tensor]]:
    if kind == "sequence":
        return rows("sequence")
    return rows() if kind == "causal" else [{**row, "labels": row["input_ids"]} for row in rows()]


def loop(model: nn.Module, r3f: R3F, steps: Any, *, shift: bool) -> None:
    """R3F over windows, by hand."""
    opt = optimizer_of(model)
    for window in steps:
        opt.zero_grad()
        with r3f.window():
            for batch in window[0]:
                r3f(model, num_items=items_of(window, shift), **batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()


@pytest.mark.parametrize(("kind", "smoothing"), [("causal", 0.0), ("causal", 0.1), ("sequence", 0.0), ("seq2seq", 0.1)])
def test_training_is_the_loop_by_hand(tmp_path: Any, kind: str, smoothing: float) -> None:
    mine, hand = (tiny.build(kind, 0.0, torch.float64) for _ in range(2))
    cls, options = R3FTrainer, {"gradient_accumulation_steps": 3, "label_smoothing_factor": smoothing, **R3F_OPTIONS}
    if kind == "seq2seq":
        cls, options = Seq2SeqR3F, {"cls": Seq2SeqPostTrainingArguments, **options}
    trainer = trainer_of(cls, mine, arguments(tmp_path, 6, **options), data_of(kind))
    trainer.train()
    r3f = R3F(0.3, 0.7, "normal", seed=5, label_smoothing=smoothing)
    loop(hand, r3f, windows(data_of(kind), 3, 6), shift=kind == "causal")
    assert distance(mine, hand) <= 1e-9
    assert distance(mine, tiny.build(kind, 0.0, torch.float64)) > 1e-3


def test_the_loss_is_that_of_the_equations(tmp_path: Any) -> None:
    """CE + lambda (KL(p||q) + KL(q||p)) from torch's own functions over the labels of the whole window, and its logs."""
    model = tiny.build("causal", 0.0, torch.float64)
    trainer = trainer_of(R3FTrainer, model, arguments(tmp_path, 1, gradient_accumulation_steps=3, **R3F_OPTIONS))
    trainer.train()
    model = tiny.build("causal", 0.0, torch.float64)
    ((window,),) = windows(rows(), 3, 1)
    items, task, kl, number = items_of([window]), 0.0, 0.0, 0
    for batch in window:
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
        index = torch.arange(embeds[..., 0].numel()).reshape(embeds.shape[:-1]) + number
        number += index.numel()
        noised = add_noise(embeds, 0.3, "normal", seed=5, token_index=index)
        logits = [model(inputs_embeds=e, attention_mask=batch["attention_mask"]).logits[:, :-1] for e in (embeds, noised)]
        labels = batch["labels"][:, 1:]
        counts = labels != -100
        p, q = (part[counts].log_softmax(-1) for part in logits)
        task += nn.functional.nll_loss(p, labels[counts], reduction="sum").item() / items
        kl += ((p.exp() - q.exp()) * (p - q)).sum().item() / items
    assert logged(trainer, "r3f/task_loss") == pytest.approx([task], rel=1e-6)
    assert logged(trainer, "r3f/symm_kl") == pytest.approx([kl], rel=1e-5)
    assert logged(trainer, "loss") == pytest.approx([task + 0.7 * kl], rel=1e-5)
    assert kl > 0.1


@pytest.mark.parametrize("options", [{"r3f_lambda": 0.0}, {"anchor_kl": 0.0}])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_shift_labels_are_the_targets_as_they_stand(tmp_path: Any, options: dict[str, float], accumulation: int) -> None:
    """As in the Trainer, which counts its items by them: two texts packed into each row."""
    data = []
    for row in rows():
        targets = nn.functional.pad(row["labels"][1:], (0, 1), value=-100)
        data.append({**row, "shift_labels": torch.where(torch.arange(len(targets)) == 5, -100, targets)})
    plain, mine = (tiny.build("llama", 0.0) for _ in range(2))
    shared = {"gradient_accumulation_steps": accumulation, "remove_unused_columns": False}
    reference = trainer_of(Trainer, plain, arguments(tmp_path, 4, **shared), data)
    trainer = trainer_of(
        R3FTrainer if "r3f_lambda" in options else AnchorTrainer, mine, arguments(tmp_path, 4, **shared, **options), data
    )
    reference.train()
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-5)
    assert distance(mine, plain) <= 1e-5


def test_sequence_parallelism_is_refused(tmp_path: Any, monkeypatch: Any) -> None:
    """There the Trainer's loss weighs ranks by their labels."""
    trainer = trainer_of(R3FTrainer, tiny.build("causal", 0.0), arguments(tmp_path, 1, **R3F_OPTIONS))
    monkeypatch.setattr(Accelerator, "parallelism_config", SimpleNamespace(sp_size=2, cp_size=1, tp_size=1))
    trainer.args.r3f_eps = 0.2
    with pytest.raises(ValueError, match=r"R3FTrainer: under sequence parallelism \(sp_size=2\)"):
        trainer.train()


@pytest.mark.parametrize("options", [{"r3f_noise_scale": "neftune"}, {"r3f_relative": "freelb"}])
def test_noise_by_length_under_context_parallelism_is_refused(tmp_path: Any, monkeypatch: Any, options: Any) -> None:
    """A rank has a part of each sequence there."""
    trainer = trainer_of(R3FTrainer, tiny.build("causal", 0.0), arguments(tmp_path, 1, r3f_eps=0.3))
    monkeypatch.setattr(Accelerator, "parallelism_config", SimpleNamespace(sp_size=1, cp_size=2, tp_size=1))
    trainer.args.r3f_eps = 0.2
    trainer._take_options()  # which noise of the tokens alone is not
    trainer.args = arguments(tmp_path, 1, **options)
    with pytest.raises(ValueError, match=r"R3FTrainer: this noise is scaled by the length .* \(cp_size=2\)"):
        trainer._take_options()


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("options", [{"method": "r3f"}, {"method": "anchor", "anchor": "reference"}])
def test_several_gpus_in_one_process_are_refused_by_name(tmp_path: Any, options: dict[str, str], accepts: bool) -> None:
    """As a script without torchrun has them; also where the model is told of no number of labels. Evaluation is the
    Trainer's own."""
    args = arguments(tmp_path, 1, **options)
    args._n_gpu = 2
    trainer = trainer_of(PostTrainer, tiny.build("causal", 0.0), args, eval_dataset=rows())
    trainer.model_accepts_loss_kwargs = accepts
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"DataParallel cuts each batch among the 2 GPUs .*torchrun"):
        trainer.train()


def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path: Any) -> None:
    """Noise belongs to the token: one batch of six rows, or three micro-batches of two."""
    whole, cut = (tiny.build("causal", 0.0, torch.float64) for _ in range(2))
    options = {"per_device_train_batch_size": 6, **R3F_OPTIONS}
    trainer_of(R3FTrainer, whole, arguments(tmp_path, 3, **options)).train()
    trainer_of(R3FTrainer, cut, arguments(tmp_path, 3, gradient_accumulation_steps=3, **R3F_OPTIONS)).train()
    assert distance(whole, cut) <= 1e-9


def test_evaluation_is_the_plain_loss(tmp_path: Any) -> None:
    model = tiny.build("causal", 0.0, torch.float64)
    plain = trainer_of(Trainer, model, arguments(tmp_path), eval_dataset=rows()).evaluate()
    ours = trainer_of(R3FTrainer, model, arguments(tmp_path, **R3F_OPTIONS), eval_dataset=rows()).evaluate()
    assert ours["eval_loss"] == plain["eval_loss"]


def test_lambda_zero_is_the_plain_trainer(tmp_path: Any) -> None:
    plain, ours = (tiny.build("causal", 0.2) for _ in range(2))
    trainer_of(Trainer, plain, arguments(tmp_path, 4, gradient_accumulation_steps=2)).train()
    trainer_of(R3FTrainer, ours, arguments(tmp_path, 4, gradient_accumulation_steps=2, r3f_lambda=0.0)).train()
    assert distance(plain, ours) <= 1e-4  # the cross-entropies round differently, and AdamW's first steps feel that


@pytest.mark.parametrize("options", [{}, {"bf16": True}])
def test_the_fused_head(tmp_path: Any, options: dict) -> None:
    dtype = torch.float32 if options else torch.float64
    built, fused = (tiny.build("llama", 0.0, dtype) for _ in range(2))
    for model, fuse in ((built, False), (fused, True)):
        args = arguments(tmp_path, 3, gradient_accumulation_steps=2, r3f_fused_linear=fuse, **R3F_OPTIONS, **options)
        trainer = trainer_of(R3FTrainer, model, args)
        trainer.train()
        assert len(logged(trainer, "r3f/symm_kl")) == 3
    assert distance(built, fused) <= (0.05 if options else 1e-9)


def test_sam_and_r3f_together(tmp_path: Any) -> None:
    """Both of SAM's passes are R3F's, with the same noise; micro-batches of the ascent count their tokens once."""
    mine, hand = (tiny.build("causal", 0.0, torch.float64) for _ in range(2))
    options = {"gradient_accumulation_steps": 3, "sam_ascent_fraction": 0.6, "method": "sam+r3f", **R3F_OPTIONS}
    trainer = trainer_of(PostTrainer, mine, arguments(tmp_path, 5, **options))
    trainer.train()
    opt, r3f = optimizer_of(hand), R3F(0.3, 0.7, "normal")
    params = list(hand.parameters())
    for number, (window,) in enumerate(windows(rows(), 3, 5)):
        items, ascent = items_of([window]), window[: -(-6 * len(window) // 10)]
        for micro_batches in (ascent, window):
            r3f.seed, r3f.step = 5, number
            opt.zero_grad()
            with r3f.window():
                for batch in micro_batches:
                    r3f(hand, num_items=items, **batch).loss.backward()
            if micro_batches is ascent:
                before = [p.detach().clone() for p in params]
                norm = torch.stack([p.grad.square().sum() for p in params]).sum().sqrt()
                with torch.no_grad():
                    for p in params:
                        p += RHO * p.grad / norm
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
    assert distance(mine, hand) <= 1e-9
    assert {"sam/seen_cosine", "r3f/symm_kl"} <= set(trainer.state.log_history[0])


class Ascent(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        loss, outputs = super().compute_loss(model, {**inputs, "labels": labels}, True, num_items_in_batch)
        return (-loss, outputs) if return_outputs else -loss


class BatchMean(Ascent):
    """Whose loss is a mean over the micro-batch, for the Trainer to divide."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("base", [Ascent, BatchMean])
@pytest.mark.parametrize("grad", ["both", "noised", "clean"])
def test_over_a_loss_of_the_trainers_own_the_divergence_is_added(tmp_path: Any, base: type, grad: str) -> None:
    """As unlearning trainers are written; labels are taken out of the batch in between."""
    mine, hand = (exact(tiny.build("causal", 0.0, torch.float64)) for _ in range(2))

    class Both(R3FTrainerMixin, base):  # type: ignore[misc, valid-type]
        pass

    options = {"gradient_accumulation_steps": 3, **R3F_OPTIONS, "r3f_grad": grad}
    trainer = trainer_of(Both, mine, arguments(tmp_path, 5, **options))
    trainer.train()
    opt, r3f = optimizer_of(hand), R3F(0.3, 0.7, "normal", seed=5, grad=grad)
    for (window,) in windows(rows(), 3, 5):
        opt.zero_grad()
        with r3f.window():
            for batch in window:
                items = items_of([window] if base is Ascent else [[batch]])
                loss = r3f(hand, num_items=items, **batch).loss - 2 * causal_loss(hand, batch, items)
                (loss if base is Ascent else loss / len(window)).backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    assert distance(mine, hand) <= 1e-9
    assert torch.tensor(logged(trainer, "r3f/symm_kl")).min() > 0.01


@pytest.mark.parametrize("seed", [None, 5])
def test_with_rho_zero_sam_and_r3f_is_r3f_bit_by_bit_dropout_included(tmp_path: Any, seed: int | None) -> None:
    alone, both = (tiny.build("causal", 0.2) for _ in range(2))
    options = {"gradient_accumulation_steps": 3, "sam_rho": 0.0, **R3F_OPTIONS, "r3f_seed": seed}
    first = trainer_of(PostTrainer, alone, arguments(tmp_path, 5, method="r3f", **options))
    first.train()
    second = trainer_of(PostTrainer, both, arguments(tmp_path, 5, method="sam+r3f", **options))
    second.train()
    assert all(same_bits(p, q) for p, q in zip(alone.parameters(), both.parameters(), strict=True))
    assert logged(first, "r3f/symm_kl") == logged(second, "r3f/symm_kl")


def test_a_model_without_labels_to_take_a_divergence_at(tmp_path: Any) -> None:
    regression = tiny.build("sequence")
    regression.config.problem_type = "regression"
    data = [{**row, "labels": row["labels"].float()} for row in rows("sequence")]
    with pytest.raises(ValueError, match="regression"):
        trainer_of(R3FTrainer, regression, arguments(tmp_path, 1), data).train()
    model = tiny.build("causal")
    model.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match="has no get_input_embeddings"):
        trainer_of(R3FTrainer, model, arguments(tmp_path, 1)).train()
    assert stacked(data[:2])["labels"].dtype == torch.float32


def test_a_trial_of_a_search_has_its_own_options(tmp_path: Any) -> None:
    trainer = trainer_of(PostTrainer, tiny.build("causal"), arguments(tmp_path, 1, method="sam+r3f", **R3F_OPTIONS))
    trainer.hp_search_backend = HPSearchBackend.RAY  # whose trials are mappings
    trainer.hp_space = lambda trial: trial
    trainer._hp_search_setup({"r3f_lambda": 7.0, "r3f_eps": 0.5})
    assert (trainer.r3f.r3f_lambda, trainer.r3f.eps) == (7.0, 0.5)


def test_a_router_s_loss_is_not_dropped(tmp_path: Any) -> None:
    model = tiny.build("causal")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="router"):
        trainer_of(R3FTrainer, model, arguments(tmp_path, 1))


@pytest.mark.parametrize("options", [{}, {"r3f_fused_linear": True}, {"r3f_lambda": 0.0}, {"label_smoothing_factor": 0.1}])
def test_a_window_without_a_supervised_token_changes_nothing(tmp_path: Any, options: dict[str, Any]) -> None:
    """Where the plain Trainer divides 0 by 0, or skips; weights stay finite and those of the other windows count."""
    data = rows()
    for row in data[: 2 * BATCH]:  # the first window
        row["labels"] = torch.full_like(row["labels"], -100)
    found = []
    for skipped, steps in ((0, 2), (2 * BATCH, 1)):
        model = tiny.build("causal")
        args = arguments(
            tmp_path, steps, gradient_accumulation_steps=2, lr_scheduler_type="constant", optim="sgd", weight_decay=0.0,
            **(R3F_OPTIONS | {"r3f_eps": 0.0} | options),
        )  # fmt: skip
        trainer_of(R3FTrainer, model, args, data[skipped:]).train()
        found.append(dict(model.named_parameters()))
    for name, p in found[0].items():
        assert p.isfinite().all()
        torch.testing.assert_close(p, found[1][name], msg=name)
