"""The anchor in transformers' Trainer and TRL's SFT against loops by hand, resuming, what is refused."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from trl import SFTTrainer

from fastpost.integrations.anchor_options import AnchorOptions
from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.transformers import (
    AnchorTrainer,
    AnchorTrainerMixin,
    PostTrainer,
    PostTrainingArguments,
    R3FTrainer,
    R3FTrainerMixin,
    SAMTrainer,
)
from fastpost.integrations.trl import AnchorSFTTrainer, SAMTrainerMixin

from . import tiny
from .by_hand import ascended, distance
from .conftest import same_bits
from .test_anchor import with_lora
from .test_trl import model as trl_model
from .test_trl import sft
from .trainers import CLIP, LR, RHO, arguments, items_of, logged, optimizer_of, rows, trainer_of, windows

KL = 0.4


def model_of(kind: str) -> Any:
    return with_lora() if kind == "lora" else tiny.build("llama", 0.0, torch.float64)


def loss_of(
    model: Any, reference: Any, batch: Any, items: float, dft: bool = False, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """CE plus KL * KL(reference || model) over the labels of the whole window, from the equations; and that divergence."""
    labels = batch["labels"][:, 1:]
    counts = labels != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_q = model(**inputs).logits[:, :-1][counts].log_softmax(-1)
    with torch.no_grad():
        log_p = reference(**inputs).logits[:, :-1][counts].log_softmax(-1)
    nll = F.nll_loss(log_q, labels[counts], reduction="none")
    ce = (1 - smoothing) * nll - smoothing * log_q.mean(-1)
    if dft:
        ce = ce * (-nll).exp().detach()
    kl = (log_p.exp() * (log_p - log_q)).sum()
    return (ce.sum() + KL * kl) / items, kl.detach() / items


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: Any) -> torch.optim.Optimizer:
    return optimizer_of(model) if len(trained(model)) == len(list(model.parameters())) else torch.optim.AdamW(
        trained(model), lr=LR, weight_decay=0.05
    )  # fmt: skip


def loop(
    model: Any,
    anchor: str,
    steps: Any,
    *,
    decay: float = 0.8,
    dft: bool = False,
    rho: float = 0.0,
    kind: str = "llama",
    smoothing: float = 0.0,
) -> list[float]:
    """Training by hand over the batches of all ranks, with SAM where rho is given; the divergence of each step."""
    reference = tiny.build(kind, 0.0, torch.float64) if anchor == "lora_off" else copy.deepcopy(model)
    found: list[float] = []
    reference.eval()
    opt, params = adam(model), trained(model)
    for window in steps:
        items, batches = items_of(window), [batch for mine in window for batch in mine]
        both = [loss_of(model, reference, batch, items, dft, smoothing) for batch in batches]
        found.append(float(sum(kl for _, kl in both)))
        grads = torch.autograd.grad(sum(loss for loss, _ in both), params)
        if rho:
            with ascended(params, grads, rho):
                second = sum(loss_of(model, reference, batch, items, dft)[0] for batch in batches)
                grads = torch.autograd.grad(second, params)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
        if anchor == "ema":
            with torch.no_grad():
                for a, p in zip(reference.parameters(), model.parameters(), strict=True):
                    a.copy_(decay * a + (1 - decay) * p)
    return found


def options_of(anchor: str, **further: Any) -> dict[str, Any]:
    decay = {"anchor_ema_decay": 0.8} if anchor == "ema" else {}
    return {"anchor_kl": KL, "anchor": anchor, "gradient_accumulation_steps": 3, **decay, **further}


@pytest.mark.parametrize(
    ("kind", "anchor", "further"),
    [
        ("full", "reference", {}),
        ("full", "ema", {}),
        ("full", "ema", {"anchor_fused_linear": False, "sft_weighting": "asft"}),
        ("lora", "reference", {}),
        ("lora", "lora_off", {"sft_weighting": "asft"}),
        ("lora", "ema", {}),
        ("full", "reference", {"label_smoothing_factor": 0.2}),
        ("lora", "lora_off", {"label_smoothing_factor": 0.1, "sft_weighting": "asft"}),
    ],
)
def test_training_is_the_loop_by_hand(tmp_path: Path, kind: str, anchor: str, further: dict[str, Any]) -> None:
    mine, hand = model_of(kind), model_of(kind)
    trainer = trainer_of(AnchorTrainer, mine, arguments(tmp_path, 5, **options_of(anchor, **further)))
    trainer.train()
    smoothing = further.get("label_smoothing_factor", 0.0)
    kls = loop(hand, anchor, windows(rows(), 3, 5), dft="sft_weighting" in further, smoothing=smoothing)
    assert distance(mine, hand) <= 1e-9
    assert distance(mine, model_of(kind)) > 1e-3
    assert logged(trainer, "anchor/kl") == pytest.approx(kls, rel=1e-6, abs=1e-12)
    assert kls[-1] > 1e-3


@pytest.mark.parametrize(("kind", "anchor"), [("full", "reference"), ("lora", "lora_off"), ("full", "ema")])
def test_sam_and_an_anchor(tmp_path: Path, kind: str, anchor: str) -> None:
    """The second pass is at w + e, its reference is not."""
    mine, hand = model_of(kind), model_of(kind)
    trainer = trainer_of(PostTrainer, mine, arguments(tmp_path, 4, method="sam+anchor", **options_of(anchor)))
    trainer.train()
    kls = loop(hand, anchor, windows(rows(), 3, 4), rho=RHO)
    assert distance(mine, hand) <= 1e-9
    assert logged(trainer, "anchor/kl") == pytest.approx(kls, rel=1e-6, abs=1e-12)
    assert {"sam/seen_cosine", "anchor/task_loss"} <= set(trainer.state.log_history[0])


def test_dft_alone_is_the_loop_by_hand_and_takes_no_reference(tmp_path: Path) -> None:
    mine, hand = model_of("full"), model_of("full")
    args = arguments(tmp_path, 4, gradient_accumulation_steps=3, sft_weighting="dft")
    trainer = trainer_of(AnchorTrainer, mine, args)
    trainer.train()
    opt = adam(hand)
    for window in windows(rows(), 3, 4):
        opt.zero_grad()
        for batch in window[0]:
            labels = batch["labels"][:, 1:]
            logits = hand(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            ((-ce).exp().detach() * ce).sum().div(items_of(window)).backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    assert distance(mine, hand) <= 1e-9
    assert trainer.anchor.reference is None


def test_r3f_and_an_anchor(tmp_path: Path) -> None:
    """R3F's divergence is added to the anchor's loss: without noise it is the anchor alone, with noise more."""
    noise = {"r3f_eps": 0.3, "r3f_lambda": 0.7, "noise_type": "normal", "r3f_seed": 5}
    found = []
    for method, further in (("anchor", {}), ("r3f+anchor", {**noise, "r3f_eps": 0.0}), ("r3f+anchor", noise)):
        mine = model_of("full")
        args = arguments(tmp_path, 4, method=method, **options_of("reference"), **further)
        trainer = trainer_of(PostTrainer, mine, args)
        trainer.train()
        found.append(mine)
    assert distance(found[0], found[1]) <= 1e-9
    assert distance(found[0], found[2]) > 1e-3
    first = trainer.state.log_history[0]
    assert first["anchor/kl"] == pytest.approx(0, abs=1e-12)  # at the start the model is its reference
    assert first["r3f/symm_kl"] > 0.1
    assert first["loss"] == pytest.approx(first["anchor/task_loss"] + 0.7 * first["r3f/symm_kl"], rel=1e-5)
    # The noised part of the first step is R3F's own, on the same noise.
    own = trainer_of(R3FTrainer, model_of("full"), arguments(tmp_path, 1, gradient_accumulation_steps=3, **noise))
    own.train()
    assert first["r3f/symm_kl"] == pytest.approx(logged(own, "r3f/symm_kl")[0], rel=1e-6)


def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    whole, cut = model_of("full"), model_of("full")
    options = options_of("ema", sft_weighting="asft")
    args = arguments(tmp_path, 3, **{**options, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 6})
    trainer_of(AnchorTrainer, whole, args).train()
    trainer_of(AnchorTrainer, cut, arguments(tmp_path, 3, **options)).train()
    assert distance(whole, cut) <= 1e-9


@pytest.mark.parametrize(("kind", "anchor"), [("full", "ema"), ("full", "reference"), ("lora", "lora_off")])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, kind: str, anchor: str) -> None:
    options = {**options_of(anchor), "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(AnchorTrainer, model_of(kind), arguments(tmp_path / "whole", 5, **options))
    whole.train()
    resumed = trainer_of(AnchorTrainer, model_of(kind), arguments(tmp_path / "resumed", 5, **options))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert same_bits(p, q)
    assert logged(whole, "anchor/kl")[2:] == logged(resumed, "anchor/kl")[-3:]
    if anchor == "ema":
        (tmp_path / "whole" / "checkpoint-2" / "anchor_ema.safetensors").unlink()
        again = trainer_of(AnchorTrainer, model_of(kind), arguments(tmp_path / "again", 5, **options))
        with pytest.raises(ValueError, match="holds no average of the weights"):
            again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_evaluation_is_the_plain_loss_and_a_second_run_takes_other_values(tmp_path: Path) -> None:
    model = model_of("full")
    plain = trainer_of(Trainer, model, arguments(tmp_path), eval_dataset=rows()).evaluate()
    trainer = trainer_of(AnchorTrainer, model, arguments(tmp_path, 1, anchor_kl=KL), eval_dataset=rows())
    assert trainer.evaluate()["eval_loss"] == plain["eval_loss"]
    trainer.args.anchor_kl, trainer.args.anchor_divergence = 0.9, "js"
    trainer.train()
    assert (trainer.anchor.anchor_kl, trainer.anchor.divergence) == (0.9, "js")


def test_a_reference_of_the_users_and_a_new_start_of_model_init(tmp_path: Path) -> None:
    given = tiny.build("causal", 0.0, torch.float64)
    trainer = trainer_of(AnchorTrainer, model_of("full"), arguments(tmp_path, 1, anchor_kl=KL), anchor_model=given)
    trainer.train()
    assert trainer.anchor.reference.model is given
    assert logged(trainer, "anchor/kl")[0] > 0.1
    with pytest.raises(ValueError, match="anchor_model is the reference of anchor='reference', not of 'ema'"):
        trainer_of(AnchorTrainer, model_of("full"), arguments(tmp_path, **options_of("ema")), anchor_model=given)
    args = arguments(tmp_path, 2, anchor_kl=KL)
    made = AnchorTrainer(None, args, train_dataset=rows(), model_init=lambda: model_of("full"))
    made.train()
    start = made.anchor.reference.model
    assert all(same_bits(p, q) for p, q in zip(start.parameters(), model_of("full").parameters(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_gradient_checkpointing_and_bf16(tmp_path: Path, bf16: bool) -> None:
    found = []
    for checkpointing in (False, True):
        mine = with_lora(dtype=torch.float32)
        args = arguments(tmp_path, 3, **options_of("lora_off"), bf16=bf16, gradient_checkpointing=checkpointing)
        trainer = trainer_of(AnchorTrainer, mine, args)
        trainer.train()
        found.append(mine)
        assert all(math.isfinite(kl) for kl in logged(trainer, "anchor/kl"))
    assert distance(*found) <= 1e-5


@pytest.mark.parametrize("joined", [False, True])
def test_trl(tmp_path: Path, joined: bool) -> None:
    """SFT with an anchor, alone and under SAM, against loops over what the trainer was fed."""
    mine, hand = trl_model(), trl_model()

    class Both(SAMTrainerMixin, AnchorSFTTrainer):
        pass

    trainer = sft(Both if joined else AnchorSFTTrainer, tmp_path, 3, mine, anchor_kl=KL, sft_weighting="asft")
    loop(hand, "reference", [[step] for step in trainer.fed], dft=True, rho=RHO if joined else 0.0)
    assert distance(mine, hand) <= 1e-9
    assert len(logged(trainer, "anchor/kl")) == 3
    with pytest.raises(ValueError, match="sft_weighting='dft' is DFT there"):
        sft(AnchorSFTTrainer, tmp_path, 1, trl_model(), loss_type="dft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_kl": -1.0}, "anchor_kl must be finite and >= 0"),
        ({"anchor_kl": "much"}, "anchor_kl must be a number"),
        ({"anchor": "referense"}, "Did you mean 'reference'"),
        ({"anchor_divergence": "revers_kl"}, "Did you mean 'reverse_kl'"),
        ({"sft_weighting": "dtf"}, "Did you mean 'dft'"),
        ({"anchor": "ema", "anchor_ema_decay": 1.0}, "anchor_ema_decay must lie in"),
        ({"anchor_ema_decay": 0.9}, "anchor_ema_decay is of anchor='ema'"),
        ({"sft_weighting": "asft", "anchor_kl": 0.0}, "say 'dft', or give a weight"),
        ({"sft_weighting": "dft", "anchor": "ema"}, "anchor='ema' has no weight"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostTrainingArguments(str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ValueError, match=message):
        PostTrainingOptions(**options)


def test_weights_that_were_not_given() -> None:
    assert [AnchorOptions(sft_weighting=name).anchor_weight for name in ("none", "dft", "asft")] == [0.1, 0.0, 0.1]
    assert AnchorOptions(anchor_kl="1e-2").anchor_weight == 0.01  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"anchor_kl": 0.0}, "anchor_kl=0.0"),  # that it is nothing is said without the option as well
        ({"anchor_kl": 0.0, "anchor_ce": 0.5}, "anchor_kl=0.0 and anchor_ce=0.5"),
        ({"anchor_ce": 0.5}, "anchor_ce=0.5"),
        ({"anchor": "ema", "anchor_ema_decay": 0.5}, "anchor='ema' and anchor_ema_decay=0.5"),
        (
            {"anchor_kl": 0.0, "anchor_ce": 1.0, "anchor": "context", "anchor_teacher": "live"},
            "anchor_kl=0.0 and anchor_ce=1.0 and anchor='context' and anchor_teacher='live'",
        ),
        ({"anchor_divergence": "js"}, "anchor_divergence='js'"),
        ({"anchor_fused_linear": False}, "anchor_fused_linear=False"),
        ({"sft_weighting": "dft"}, "sft_weighting='dft'"),
    ],
)
def test_options_that_no_method_would_read_are_named(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    message = re.escape(
        f"method='sam' does no anchor and would not read {named}; say a method with an anchor, such as method='sam+anchor'"
    )
    with pytest.raises(ValueError, match=message):
        PostTrainingOptions(method="sam", **options)
    with pytest.raises(ValueError, match=message):
        PostTrainingArguments(str(tmp_path), use_cpu=True, method="sam", **options)
    with pytest.raises(ValueError, match=re.escape(f"SAMTrainer does no anchor and would not read {named}; ")):
        trainer_of(SAMTrainer, tiny.build("llama"), arguments(tmp_path, 1, **options))
    assert PostTrainingOptions(method="sam+anchor", **options).method == "sam+anchor"


def test_what_does_not_go_together(tmp_path: Path) -> None:
    model = tiny.build("llama")

    def refused(error: type[Exception], message: str, cls: type, *, fails: Any = model, **options: Any) -> None:
        trainer = {name: options.pop(name) for name in ("compute_loss_func", "anchor_model") if name in options}
        with pytest.raises(error, match=message):
            trainer_of(cls, fails, arguments(tmp_path, 1, **options), **trainer)

    class Own(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    class OverOwn(AnchorTrainerMixin, Own):
        pass

    class Behind(AnchorTrainerMixin, R3FTrainerMixin, Trainer):
        pass

    refused(TypeError, "Own has a loss of its own", OverOwn)
    refused(TypeError, "put R3FTrainerMixin before", Behind)
    refused(TypeError, "compute_loss_func computes a loss", AnchorTrainer, compute_loss_func=lambda *a, **k: 0)
    refused(ValueError, "would not read anchor_kl=0.1", SAMTrainer, anchor_kl=0.1)
    refused(ValueError, "would not read sft_weighting=.dft.", PostTrainer, method="sam", sft_weighting="dft")
    refused(ValueError, "does sam, not method='anchor'", SAMTrainer, method="anchor")
    refused(ValueError, "leave anchor_fused_linear out", PostTrainer, method="r3f+anchor", anchor_fused_linear=True)
    refused(ValueError, "r3f_fused_linear=False", PostTrainer, method="r3f+anchor", r3f_fused_linear=True)
    functional = {"method": "sam+anchor", "sam_perturb": "functional"}
    refused(ValueError, "a fused head has none", PostTrainer, anchor_fused_linear=True, **functional)
    refused(ValueError, "that anchor='lora_off' runs as well", PostTrainer, anchor="lora_off", **functional)
    refused(ValueError, "anchor_model shares weights", AnchorTrainer, anchor_model=model)
    refused(ValueError, "anchor_model is for an anchor", PostTrainer, method="sam", anchor_model=model)
    routed = tiny.build("llama")
    routed.config.output_router_logits = True
    refused(ValueError, "router", AnchorTrainer, fails=routed)
    with pytest.raises(ValueError, match="'lora_off' switches the adapters of a PEFT model off"):
        trainer_of(AnchorTrainer, model, arguments(tmp_path, 1, anchor="lora_off")).train()
    assert issubclass(AnchorSFTTrainer, SFTTrainer)
