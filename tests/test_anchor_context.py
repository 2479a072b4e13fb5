"""Self-distillation from a context: row by row without padding in float64, in the Trainer and TRL, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastpost.anchor import AdaptersOff, Anchor, ContextCollator, Frozen, InContext, Live, MovingAverage, context
from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.transformers import AnchorTrainer, PostTrainer
from fastpost.integrations.trl import AnchorSFTTrainer, PostSFTConfig
from fastpost.ops import autograd

from . import tiny
from .by_hand import ascended, distance
from .conftest import same_bits
from .test_anchor import gradients, moved, with_lora
from .test_trl import model as trl_model
from .test_trl import settings as trl_settings
from .test_trl import tokenizer
from .trainers import BATCH, CLIP, RHO, arguments, logged, optimizer_of, trainer_of

KL = 0.7
ATEN = torch.ops.aten


def texts(number: int = 4) -> list[dict[str, list[int]]]:
    """Rows of several lengths with contexts of several lengths, one of them empty; the first tokens are a prompt."""
    g = torch.Generator().manual_seed(3)
    found = []
    for i in range(number):
        length, context, prompt = 5 + (3 * i) % 4, (0, 4, 7, 2)[i % 4], 1 + i % 3
        ids = torch.randint(3, tiny.VOCABULARY, (context + length,), generator=g).tolist()
        own = ids[context:]
        labels = [-100] * prompt + own[prompt:]
        found.append({"input_ids": own, "labels": labels, "context_input_ids": ids[:context]})
    return found


def padded(rows: list[list[int]], left: bool, fill: int) -> Tensor:
    most = max(map(len, rows))
    return torch.tensor([[fill] * (most - len(r)) + r if left else r + [fill] * (most - len(r)) for r in rows])


def batch_of(rows: list[dict[str, list[int]]], left: bool = False, context_left: bool = False) -> dict[str, Tensor]:
    fills = {"input_ids": tiny.PAD, "labels": -100, "context_input_ids": tiny.PAD}
    sides = {"input_ids": left, "labels": left, "context_input_ids": context_left}
    batch = {name: padded([row[name] for row in rows], sides[name], fill) for name, fill in fills.items()}
    for mask, name in (("attention_mask", "input_ids"), ("context_attention_mask", "context_input_ids")):
        batch[mask] = padded([[1] * len(row[name]) for row in rows], sides[name], 0)
    return batch


def truth(
    student: Any, teacher: Any, rows: list[dict[str, list[int]]], items: Any = None, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """(divergence, cross-entropy) from the equations, one row at a time and without padding."""
    kl, ce, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        own, context = torch.tensor([row["input_ids"]]), torch.tensor([row["context_input_ids"]], dtype=torch.long)
        log_q = student(input_ids=own).logits[0].log_softmax(-1)
        training = teacher.training
        with torch.no_grad():
            log_p = teacher.eval()(input_ids=torch.cat((context, own), 1)).logits[0].log_softmax(-1)
        teacher.train(training)
        for t in range(1, own.shape[1]):
            label = row["labels"][t]
            if label == -100:
                continue
            q, p = log_q[t - 1], log_p[context.shape[1] + t - 1]
            kl = kl + ((q.exp() * (q - p)).sum() if reverse else (p.exp() * (p - q)).sum())
            ce, count = ce - q[label], count + 1
    return kl / (items or count), ce / (items or count)


@pytest.mark.parametrize("kind", ["llama", "causal", "granite"])  # rotary and learnt positions, scaled logits
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_against_rows_without_padding(kind: str, left: bool, fused: bool | None) -> None:
    start = tiny.build(kind, 0.0, torch.float64)
    ours, theirs = (moved(tiny.build(kind, 0.0, torch.float64)) for _ in range(2))
    anchor = Anchor(InContext(start), KL, ce_weight=0.5, fused_linear=fused)
    rows = texts()
    batch = batch_of(rows, left, not left)
    if left and kind == "causal":  # GPT-2 counts its positions from the padding, whatever the mask
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with pytest.raises(ValueError, match="the batch has position_ids"):
            anchor(ours, **batch)
        return
    got = anchor(ours, **batch)
    kl, ce = truth(theirs, start, rows)
    near = 1e-6 if left else 1e-9  # transformers' rotary angles are float32, and padding on the left moves the student's
    want = [kl, ce, 0.5 * ce + KL * kl]
    torch.testing.assert_close([got.divergence, got.task_loss, got.loss], want, rtol=near, atol=1e-12)
    assert float(got.divergence) > 1e-2
    got.loss.backward()
    (0.5 * ce + KL * kl).backward()
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=10 * near, atol=1e-6 if left else 1e-12)
    assert all(p.grad is None for p in start.parameters())


@pytest.mark.parametrize("weights", ["frozen", "average", "live", "off"])
def test_whose_weights_the_teacher_has(weights: str) -> None:
    """The gradient is the student's, also where both are one model; the teacher draws no random numbers."""
    ours, theirs = with_lora(), with_lora()
    base = tiny.build("llama", 0.0, torch.float64)
    start = copy.deepcopy(theirs)
    reference = {
        "frozen": lambda: Frozen.copy_of(ours), "average": lambda: MovingAverage(ours, 0.5), "live": Live,
        "off": AdaptersOff,
    }[weights]()  # fmt: skip
    anchor = Anchor(InContext(reference), 1.0, ce_weight=0.0, divergence="reverse_kl")
    moved(ours), moved(theirs)
    anchor.reference.update(ours)
    teacher = {"frozen": start, "live": theirs, "off": base, "average": copy.deepcopy(start)}[weights]
    if weights == "average":
        with torch.no_grad():
            for a, p in zip(teacher.parameters(), theirs.parameters(), strict=True):
                a.copy_((a + p) / 2)
    state = torch.get_rng_state()
    got = anchor(ours, **batch_of(texts()))
    assert torch.equal(torch.get_rng_state(), state)
    kl, _ = truth(theirs, teacher, texts(), reverse=True)
    torch.testing.assert_close([got.loss, got.divergence], [kl, kl], rtol=1e-9, atol=1e-12)
    assert float(got.task_loss) == 0
    got.loss.backward()
    kl.backward()
    for a, b in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    ours.eval()
    assert float(anchor(ours, **batch_of(texts())).divergence) == 0


def test_dropout_is_off_in_the_teacher_alone() -> None:
    model = tiny.build("causal", 0.5, torch.float64)
    found = []
    for reference, fields in ((None, False), (InContext(Live()), True)):
        torch.manual_seed(1)
        batch = {n: t for n, t in batch_of(texts()).items() if fields or "context" not in n}
        out = Anchor(reference, 1.0 if fields else 0.0)(model, **batch)
        found.append((out.task_loss, torch.get_rng_state()))
    assert same_bits(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert model.training


def test_whole_rows_of_the_teacher_and_the_collator() -> None:
    """A context in the middle of a row, as a chat's turn; the collator makes the same of contexts and of whole rows."""
    model = moved(tiny.build("llama", 0.0, torch.float64))
    rows = texts()
    prefix = Anchor(InContext(Live()), 1.0, ce_weight=0.0)(model, **batch_of(rows))
    whole = [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "teacher_input_ids": row["context_input_ids"] + row["input_ids"],
            "teacher_labels": torch.tensor([-100] * len(row["context_input_ids"]) + row["labels"]),
        }
        for row in rows
    ]

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        assert set(examples[0]) == {"input_ids", "labels"}
        made = batch_of([{**example, "context_input_ids": []} for example in examples])
        return {name: t for name, t in made.items() if "context" not in name}

    for examples in (rows, whole):
        batch = ContextCollator(collate)(examples)
        assert batch["teacher_input_ids"].shape[1] == max(len(r["context_input_ids"]) + len(r["input_ids"]) for r in rows)
        out = Anchor(InContext(Live()), 1.0, ce_weight=0.0)(model, **batch)
        torch.testing.assert_close(out.divergence, prefix.divergence, rtol=1e-12, atol=0)
    middle = [{**row, "teacher_input_ids": [7, *row["teacher_input_ids"]], "teacher_labels": [-100, *row["teacher_labels"]]}
              for row in whole]  # fmt: skip
    out = Anchor(InContext(Live()), 1.0, ce_weight=0.0)(model, **ContextCollator(collate)(middle))
    as_prefix = [{**row, "context_input_ids": [7, *row["context_input_ids"]]} for row in rows]
    want, _ = truth(model, model, as_prefix)
    torch.testing.assert_close(out.divergence, want.detach(), rtol=1e-9, atol=1e-12)
    cut = [{**row, "teacher_labels": list(row["teacher_labels"])[:-1], "teacher_input_ids": row["teacher_input_ids"][:-1]}
           for row in whole]  # fmt: skip
    with pytest.raises(ValueError, match=r"in row 0 \d of the teacher's labels count and \d of the student's.*max_length"):
        ContextCollator(collate)(cut)
    with pytest.raises(ValueError, match="example 1 of the batch has no context_input_ids"):
        ContextCollator(collate)([rows[0], {n: v for n, v in rows[1].items() if n != "context_input_ids"}])


def test_virtual_tokens_learn_a_context() -> None:
    """Prompt tuning: the student's rows begin with those of its virtual tokens, the teacher's do not."""
    base = tiny.build("llama", 0.0, torch.float64)
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(copy.deepcopy(base), config).double().train()
    rows = texts()
    got = Anchor(InContext(base), 1.0, ce_weight=0.0)(model, **batch_of(rows))

    class Own(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            out = model(input_ids=input_ids)
            out.logits = out.logits[:, 3:]
            return out

    want, _ = truth(Own(), base, rows)
    torch.testing.assert_close(got.divergence, want.detach(), rtol=1e-9, atol=1e-12)


def test_what_is_refused() -> None:
    model, batch = tiny.build("llama"), batch_of(texts())
    anchor = Anchor(InContext(Live()), 1.0, ce_weight=0.0)

    def refused(message: str, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            anchor(model, **{name: t for name, t in {**batch, **changed}.items() if t is not None})

    refused("the batch has no context: neither context_input_ids", context_input_ids=None, context_attention_mask=None)
    refused("context_input_ids and teacher_input_ids", teacher_input_ids=batch["input_ids"])
    refused(r"context_attention_mask has shape \(4, 3\)", context_attention_mask=torch.ones(4, 3))
    refused(r"context_input_ids have shape \(3, 7\)", context_input_ids=batch["context_input_ids"][:3])
    refused("a teacher's row has 6[0-9] tokens, and the model 64 positions; shorten", context_attention_mask=None,
            context_input_ids=torch.ones(4, 57, dtype=torch.long))  # fmt: skip
    refused("Padding .* never counts", attention_mask=batch["attention_mask"] * 0)
    refused("the batch has token_type_ids, which says nothing of the context", token_type_ids=batch["input_ids"])
    first = {name: t for name, t in batch_of(texts()[:1]).items() if "context" not in name}
    answer = first["labels"] != -100  # which the teacher's row begins with, and the student's does not
    first |= dict.fromkeys(("teacher_input_ids", "teacher_labels"), first["labels"][answer][None])
    with pytest.raises(ValueError, match="nothing stands before it"):
        anchor(model, **first)
    with pytest.raises(ValueError, match="a context stands in front of the tokens of a language model"):
        anchor(tiny.build("sequence"), **{**tiny.batch_for("sequence"), "context_input_ids": batch["context_input_ids"]})
    with pytest.raises(TypeError, match="weights must be a reference or a module, not str"):
        InContext("ema")  # type: ignore[arg-type]
    for options in ({"ce_weight": 0.0, "anchor_kl": 0.0}, {"ce_weight": 0.0, "weighting": "dft"}):
        with pytest.raises(ValueError, match="ce_weight=0 leaves the cross-entropy out"):
            Anchor(InContext(Live()), **options)


class NoLooking(TorchDispatchMode):
    """Refuses the operations that on a GPU would wait for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN.masked_select), func
        return func(*args, **kwargs or {})


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at values counts as waiting for the device, though the device is the CPU."""
    for module in (autograd, context):
        monkeypatch.setattr(module, "waits", lambda device: True)


def test_who_checks_the_tokens_where_looking_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An anchor asks under FASTPOST_CHECKS=1; without it nothing waits."""
    batch = ContextCollator(collate)(texts())
    other = {**batch, **{name: batch[name].clone() for name in ("teacher_input_ids", "teacher_labels")}}
    other["teacher_input_ids"][2, 10] += 1
    other["teacher_labels"][2, 10] += 1
    fewer = {**batch, "teacher_labels": batch["teacher_labels"].clone()}
    fewer["teacher_labels"][1, 9] = -100
    as_on_a_gpu(monkeypatch)
    for wrong, message in ((other, "row 2 token 0 of those that count is"), (fewer, "in row 1 . of the teacher's labels")):
        monkeypatch.setenv("FASTPOST_CHECKS", "0")
        with NoLooking():
            context.with_teacher(batch)
            context.with_teacher(wrong)
        monkeypatch.setenv("FASTPOST_CHECKS", "1")
        context.with_teacher(batch)
        with pytest.raises(ValueError, match=message):
            context.with_teacher(wrong)
        with pytest.raises(ValueError, match=message):
            Anchor(InContext(Live()), 1.0, ce_weight=0.0)(tiny.build("llama"), **wrong)


@pytest.mark.parametrize("kind", ["llama", "causal"])  # learnt positions have no row for padding beyond them
def test_only_tokens_need_positions_where_the_longest_row_is_not_known(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(tiny.build(kind, 0.0, torch.float64))
    anchor = Anchor(InContext(Live()), 1.0, ce_weight=0.0)
    batch = batch_of(texts())
    narrow = anchor(model, **batch)
    as_on_a_gpu(monkeypatch)
    for much in (3, 60):  # the teacher's rows have room for 64
        wide = {n: nn.functional.pad(t, (much, 0)) if n.startswith("context") else t for n, t in batch.items()}
        got = anchor(model, **wide)
        torch.testing.assert_close(got.divergence, narrow.divergence, rtol=1e-9, atol=0)
    wide["context_attention_mask"][1] = 1
    with pytest.raises(ValueError, match=r"a teacher's row has 7\d tokens, and the model 64 positions"):
        anchor(model, **wide)


# -- trainers ---------------------------------------------------------------------------------------------------------------


def collate(examples: list[Any]) -> dict[str, Tensor]:
    made = batch_of([{**example, "context_input_ids": []} for example in examples])
    return {name: t for name, t in made.items() if "context" not in name}


def loop(
    model: Any,
    kind: str,
    rows: list[Any],
    steps: int,
    *,
    ce: float = 0.0,
    rho: float = 0.0,
    batches: int = 3,
    base: str = "llama",
) -> list[float]:
    """Training by hand, so many micro-batches a step; the divergence of each step."""
    teacher = {"live": model, "lora_off": tiny.build(base, 0.0, torch.float64)}.get(kind) or copy.deepcopy(model)
    params, found = [p for p in model.parameters() if p.requires_grad], []
    full = len(params) == len(list(model.parameters()))
    opt = optimizer_of(model) if full else torch.optim.AdamW(params, lr=1e-2, weight_decay=0.05)
    size = batches * BATCH
    epoch = [rows[i : i + size] for i in range(0, len(rows), size)]
    for step in range(steps):
        window = epoch[step % len(epoch)]

        def loss(window: Any = window) -> tuple[Tensor, Tensor]:
            kl, task = truth(model, teacher, window)
            return KL * kl + ce * task, kl.detach()

        total, kl = loss()
        found.append(float(kl))
        grads = torch.autograd.grad(total, params)
        if rho:
            with ascended(params, grads, rho):
                grads = torch.autograd.grad(loss()[0], params)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
        if kind == "ema":
            with torch.no_grad():
                for a, p in zip(teacher.parameters(), model.parameters(), strict=True):
                    a.copy_(0.8 * a + 0.2 * p)
    return found


def options_of(kind: str, **further: Any) -> dict[str, Any]:
    decay = {"anchor_ema_decay": 0.8} if kind == "ema" else {}
    return {
        "anchor": "context", "anchor_teacher": kind, "anchor_kl": KL, "gradient_accumulation_steps": 3, **decay, **further,
    }  # fmt: skip


def model_of(kind: str) -> Any:
    return with_lora() if kind == "lora_off" else tiny.build("llama", 0.0, torch.float64)


@pytest.mark.parametrize("kind", ["ema", "reference", "live", "lora_off"])
def test_training_is_the_loop_by_hand(tmp_path: Path, kind: str) -> None:
    """From lists of rows, whose other columns the trainer drops; evaluation is the plain loss, without contexts."""
    mine, hand, rows = model_of(kind), model_of(kind), texts(12)
    ce = {"anchor_ce": 0.3} if kind == "live" else {}
    args = arguments(tmp_path, 4, **options_of(kind, **ce), per_device_eval_batch_size=1)
    trainer = trainer_of(AnchorTrainer, mine, args, rows, data_collator=collate, eval_dataset=rows[:4])
    trainer.train()
    kls = loop(hand, kind, rows, 4, ce=ce.get("anchor_ce", 0.0))
    assert distance(mine, hand) <= 1e-9
    assert distance(mine, model_of(kind)) > 1e-3
    assert logged(trainer, "anchor/kl") == pytest.approx(kls, rel=1e-6)
    with torch.no_grad():
        each = [float(truth(hand, hand, [row])[1]) for row in rows[:4]]  # of one row a batch, whose losses are averaged
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(each) / 4, rel=1e-6)  # transformers' loss is float32


def test_sam_and_r3f_are_joined(tmp_path: Path) -> None:
    mine, hand, rows = model_of("ema"), model_of("ema"), texts(12)
    args = arguments(tmp_path, 3, method="sam+anchor", **options_of("ema"))
    trainer_of(PostTrainer, mine, args, rows, data_collator=collate).train()
    loop(hand, "ema", rows, 3, rho=RHO)
    assert distance(mine, hand) <= 1e-9
    noise = {"r3f_lambda": 0.7, "noise_type": "normal", "r3f_seed": 5}
    found = []
    for eps in (0.0, 0.3):
        model = model_of("ema")
        args = arguments(tmp_path, 3, method="r3f+anchor", **options_of("ema"), **noise, r3f_eps=eps)
        trainer = trainer_of(PostTrainer, model, args, rows, data_collator=collate)
        trainer.train()
        found.append(model)
    plain = model_of("ema")
    loop(plain, "ema", rows, 3)
    assert distance(found[0], plain) <= 1e-9
    assert distance(found[1], plain) > 1e-3
    assert logged(trainer, "r3f/symm_kl")[0] > 0.01


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    options = {**options_of("ema"), "save_strategy": "steps", "save_steps": 2}
    runs = []
    for name, start in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-2"))):
        args = arguments(tmp_path / name, 4, **options)
        trainer = trainer_of(AnchorTrainer, model_of("ema"), args, texts(12), data_collator=collate)
        trainer.train(resume_from_checkpoint=start)
        runs.append(trainer)
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert same_bits(p, q)
    assert logged(runs[0], "anchor/kl")[2:] == logged(runs[1], "anchor/kl")[-2:]


def test_trl(tmp_path: Path) -> None:
    """TRL's own collator, over a data set that is tokens already."""
    words = len(trl_model().get_input_embeddings().weight)
    rows = [{n: [3 + i % (words - 3) if i > 2 else i for i in v] for n, v in row.items()} for row in texts(12)]
    data = Dataset.from_list(rows)
    args = PostSFTConfig(**trl_settings(tmp_path, 3, max_length=32, **options_of("reference")))
    mine, hand = trl_model(), trl_model()
    trainer_of(AnchorSFTTrainer, mine, args, data, processing_class=tokenizer()).train()
    loop(hand, "reference", rows, 3)
    assert distance(mine, hand) <= 1e-9
    args = PostSFTConfig(**trl_settings(tmp_path, 3, max_length=32, packing=True, **options_of("reference")))
    with pytest.raises(ValueError, match="packing puts several examples into a row"):
        trainer_of(AnchorSFTTrainer, trl_model(), args, data, processing_class=tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_teacher": "ema"}, "anchor_teacher is of anchor='context', not of 'reference'"),
        ({"anchor": "context", "anchor_teacher": "lve"}, "Did you mean 'live'"),
        ({"anchor": "context", "anchor_teacher": "live", "anchor_ema_decay": 0.9}, "of anchor='ema', not of 'live'"),
        ({"anchor": "context", "sft_weighting": "dft"}, "weighs the tokens of the cross-entropy"),
        ({"anchor": "context", "anchor_kl": 0.0}, "leave no loss"),
        ({"anchor_ce": -1.0}, "anchor_ce must be finite and >= 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostTrainingOptions(**options)


def test_what_a_trainer_refuses(tmp_path: Path) -> None:
    for options, message in (
        ({"method": "sam+anchor", **options_of("live")}, "anchor_teacher='live' would teach from there"),
        ({"method": "anchor", **options_of("live"), "label_smoothing_factor": 0.1}, "smooths the cross-entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(PostTrainer, model_of("ema"), arguments(tmp_path, 1, **options), texts(4))
    without = [{n: row[n] for n in ("input_ids", "labels")} for row in texts(4)]
    args = arguments(tmp_path, 1, **options_of("ema"))
    trainer = trainer_of(AnchorTrainer, model_of("ema"), args, without, data_collator=collate)
    with pytest.raises(ValueError, match="example 0 of the data set has no context_input_ids"):
        trainer.train()
