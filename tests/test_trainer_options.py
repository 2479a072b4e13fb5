"""Every option of SAM and R3F through every trainer, against loops by hand; long, as those loops serve all trainers."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from fastpost import R3F, R4F, SAM, add_noise
from fastpost.cli import train_options
from fastpost.integrations import specs
from fastpost.integrations.lightning import SAMCallback
from fastpost.integrations.mixin import innermost
from fastpost.integrations.options import PostTrainingOptions, part_of
from fastpost.integrations.transformers import PostTrainer, PostTrainingArguments, R3FTrainer, R3FTrainerMixin, SAMTrainer
from fastpost.integrations.trl import PostSFTConfig, PostSFTTrainer
from fastpost.r3f import relatives
from fastpost.rng import seed_of
from fastpost.sam import GSAM, TRAM, WSAM, ExternalSAM, FriendlySAM, LookSAM, MomentumSAM, SAMWindow, StableSAM, Variant

from . import tiny
from .by_hand import distance
from .conftest import same_bits
from .trainers import (
    BATCH,
    CLIP,
    RHO,
    VARIANTS,
    arguments,
    causal_loss,
    cross_entropy_of,
    exact,
    functional_sam_by_hand,
    items_of,
    logged,
    optimizer_of,
    rows,
    trainer_of,
    variant_by_hand,
    windows,
)

TOLERANCE = 1e-9
STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """The trainer collects garbage when it begins, which takes longer than a run this small; what is there is no garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


def model(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    return exact(tiny.build("causal", dropout, dtype))


def sam_loop(hand: nn.Module, steps: Any, optimizer: Any = None, per_micro_batch: bool = False, **keywords: Any) -> SAM:
    """fastpost.SAM over windows, by hand."""
    base = optimizer_of(hand) if optimizer is None else optimizer
    sam = SAM(keywords.pop("params", None), base, **{"rho": RHO, **keywords})
    now: list[Any] = []
    window = SAMWindow(
        sam, lambda batch: causal_loss(hand, batch, items_of([now])).backward(), per_micro_batch=per_micro_batch
    )
    for (micro_batches,) in steps:
        now[:] = micro_batches
        window.open(len(micro_batches))
        for batch in micro_batches:
            window.feed(batch, share=items_of([[batch]]) / items_of([micro_batches]))
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        sam.step()
        sam.zero_grad()
    return sam


# -- SAM --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"sam_variant": "stablesam"}, lambda m: {"variant": StableSAM()}),
        ({"sam_variant": "gsam:alpha=0.3"}, lambda m: {"variant": GSAM(0.3)}),
        ({"sam_variant": "wsam:gamma=0.8"}, lambda m: {"variant": WSAM(0.8)}),
        ({"sam_variant": "LookSAM"}, lambda m: {"variant": LookSAM(), "interval": 5}),
        ({"sam_variant": "looksam: alpha=0.5", "sam_interval": 2}, lambda m: {"variant": LookSAM(0.5), "interval": 2}),
        (
            {"sam_variant": "friendlysam:sigma=0.5,decay=0.8", "sam_ascent_fraction": 0.5},
            lambda m: {"variant": FriendlySAM(0.5, 0.8), "ascent_fraction": 0.5},
        ),
        ({"sam_variant": "momentumsam:buffers=exp_avg"}, lambda m: {"variant": MomentumSAM(("exp_avg",))}),
        ({"sam_perturb": "functional"}, lambda m: {"perturb": "functional", "model": m}),
        (
            {"sam_adaptive": True, "sam_eta": 0.02, "sam_per_micro_batch": True},
            lambda m: {"adaptive": True, "eta": 0.02, "per_micro_batch": True},
        ),
    ],
)
def test_sam_in_the_trainer_is_sam_in_a_loop(tmp_path: Path, options: dict[str, Any], keywords: Callable) -> None:
    mine, hand = model(), model()
    trainer = trainer_of(SAMTrainer, mine, arguments(tmp_path, STEPS, gradient_accumulation_steps=3, **options))
    trainer.train()
    sam = sam_loop(hand, windows(rows(), 3, STEPS), **keywords(hand))
    assert distance(mine, hand) <= TOLERANCE
    assert distance(mine, model()) > 1e-2
    assert type(trainer.sam.variant) is type(sam.variant)
    assert type(trainer.sam._perturbation) is type(sam._perturbation)


@pytest.mark.parametrize(("accepts", "devices"), [(True, 1), (False, 1), (True, 2)])
@pytest.mark.parametrize("kind", VARIANTS)
def test_a_variant_over_part_of_a_window_counts_its_labels(tmp_path: Path, kind: str, accepts: bool, devices: int) -> None:
    """Losses are divided by the labels of the window, or, where the model is not told them, each by its own. For several
    devices in one process (DataParallel) the Trainer tells a number for each."""
    mine, hand = model(), model()
    options = {"sam_variant": VARIANTS[kind], "sam_ascent_fraction": 0.5, "gradient_accumulation_steps": 3}
    args = arguments(tmp_path, STEPS, **options, per_device_train_batch_size=BATCH // devices)
    args._n_gpu = devices
    trainer = trainer_of(SAMTrainer, mine, args)
    trainer.model_accepts_loss_kwargs = accepts
    trainer.train()
    steps = windows(rows(), 3, STEPS)
    own = {id(batch): len(window) * items_of([[batch]]) for (window,) in steps for batch in window}
    variant_by_hand(hand, steps, kind, 0.5, None if accepts else lambda batch: own[id(batch)])
    assert distance(mine, hand) <= (TOLERANCE if devices == 1 else 1e-8)  # divided by numbers of float32


@pytest.mark.parametrize(("preconditioned", "interval"), [(False, 1), (True, 1), (False, 2)])
def test_functional_sam_in_the_trainer_follows_its_equations(tmp_path: Path, preconditioned: bool, interval: int) -> None:
    """J(w + e)^T dL/dz(w) over windows of three micro-batches; e along g, or g over the root of Adam's second moment."""
    mine, hand, steps, accumulation = model(), model(), 4, 3
    options = {"sam_variant": "preconditionedsam"} if preconditioned else {}
    options.update(sam_functional_path=True, gradient_accumulation_steps=accumulation, sam_interval=interval)
    trainer = trainer_of(SAMTrainer, mine, arguments(tmp_path, steps, **options))
    trainer.train()
    assert not mine.lm_head._forward_hooks
    functional_sam_by_hand(hand, windows(rows(), accumulation, steps), preconditioned, interval=interval)
    assert distance(mine, hand) <= TOLERANCE
    other = model()
    sam_loop(other, windows(rows(), accumulation, steps))
    assert distance(mine, other) > 1e-3


@pytest.mark.parametrize("forward", ["two_pass", "double_batch"])
def test_functional_sam_takes_both_streams_of_r3f(tmp_path: Path, forward: str) -> None:
    """z are the clean and the noised logits, L cross-entropy and 0.4 times their symmetric KL: J(w + e)^T dL/dz(w)."""
    mine, hand = model(), model()
    options = {"r3f_lambda": 0.4, "r3f_eps": 0.3, "r3f_seed": 5, "r3f_forward": forward}
    args = arguments(tmp_path, 3, method="sam+r3f", sam_functional_path=True, gradient_accumulation_steps=3, **options)
    trainer_of(PostTrainer, mine, args).train()

    def streams(hand: Any, batch: Any, step: int, seen: int) -> list[Tensor]:
        return list(both_streams(hand, batch, seed_of(5, step), seen))

    def loss(z: list[Tensor], batch: Any, items: int) -> Tensor:
        return cross_entropy_of(z, batch, items) + 0.4 * symmetric(z[0], z[1], batch) / items

    functional_sam_by_hand(hand, windows(rows(), 3, 3), streams=streams, loss=loss)
    assert distance(mine, hand) <= TOLERANCE
    other = functional_sam_by_hand(model(), windows(rows(), 3, 3))
    assert distance(mine, other) > 1e-3


@pytest.mark.parametrize("makes_logits", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_functional_sam_of_a_fused_head_is_refused_at_its_first_pass(tmp_path: Path, bad: int, makes_logits: bool) -> None:
    """In whichever micro-batch, and also where there are logits that the loss does not take."""

    class PastTheHead(SAMTrainer):
        number = 0

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.number += 1
            if self.number != bad + 1:
                return super().compute_loss(model, inputs, *args, **kwargs)
            if makes_logits:
                model(input_ids=inputs["input_ids"])
            hidden = model.transformer(input_ids=inputs["input_ids"]).last_hidden_state
            return (hidden @ model.lm_head.weight.T).logsumexp(-1).mean()

    mine = model()
    args = arguments(tmp_path, 1, sam_functional_path=True, gradient_accumulation_steps=2)
    trainer = trainer_of(PastTheHead, mine, args)
    with pytest.raises(RuntimeError, match="takes the head's weight itself"):
        trainer.train()
    assert trainer.number == bad + 1
    assert distance(mine, model()) == 0


def test_a_run_whose_end_fails_leaves_nothing_at_the_head(tmp_path: Path) -> None:
    class Fails(SAMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self._given_up = True  # as after a save in the middle of a window
            return super().compute_loss(*args, **kwargs)

        def _end_window(self) -> None:
            raise OSError("no memory for w")

    trainer = trainer_of(Fails, model(), arguments(tmp_path, 1, sam_functional_path=True))
    with pytest.raises(OSError, match="no memory for w"):
        trainer.train()
    assert not trainer.model.lm_head._forward_hooks
    assert not trainer._given_up


@pytest.mark.parametrize("seed", [None, 7])
def test_stochastic_rounding_and_its_seed(tmp_path: Path, seed: int | None) -> None:
    """Bit for bit, in bfloat16."""
    found = [tiny.build("causal", 0.0, torch.bfloat16) for _ in range(2)]
    options = {"sam_rounding": "stochastic", "sam_rounding_seed": seed, "gradient_accumulation_steps": 2}
    trainer = trainer_of(SAMTrainer, found[0], arguments(tmp_path, 3, **options))
    trainer.train()

    class ByHand(Trainer):
        """The passes of the Trainer, around a SAM with these keywords."""

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if not hasattr(self, "window"):
                base = self.optimizer.optimizer
                sam = ExternalSAM(base, rho=RHO, rounding="stochastic", rounding_seed=seed or 0)
                plain = super().training_step
                self.window = SAMWindow(sam, lambda batch: plain(model, batch, self.items))
            self.items = num_items_in_batch
            if not self.window.is_open:
                self.window.open(self.current_gradient_accumulation_steps)
            loss = self.window.feed(inputs)
            if not self.window.is_open:
                self.window.optimizer.finish_step(scaled=False)
            return loss

    trainer_of(ByHand, found[1], arguments(tmp_path, 3, gradient_accumulation_steps=2)).train()
    assert all(same_bits(p, q) for p, q in zip(*(m.parameters() for m in found), strict=True))


def test_masters_in_the_trainer_are_masters_in_a_loop(tmp_path: Path) -> None:
    """Bit for bit in bfloat16; the optimizer steps float32, and a resumed run goes on with the same masters."""
    mine, hand = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    options = {"sam_masters": True, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(SAMTrainer, mine, arguments(tmp_path, 4, **options))
    trainer.train()
    pairs = {id(w): nn.Parameter(w.detach().float()) for w in hand.parameters()}
    base = optimizer_of(hand)
    weights = [w for group in base.param_groups for w in group["params"]]
    for group in base.param_groups:
        group["params"] = [pairs[id(w)] for w in group["params"]]
    sam_loop(hand, windows(rows(), 2, 4), base, params=weights, master_params=[pairs[id(w)] for w in weights])
    assert all(same_bits(p, q) for p, q in zip(mine.parameters(), hand.parameters(), strict=True))
    inner = innermost(trainer.optimizer)
    masters = [m for group in inner.param_groups for m in group["params"]]
    assert all(same_bits(m, pairs[id(w)]) for m, w in zip(masters, weights, strict=True))
    assert all(inner.state[m]["exp_avg"].dtype == m.dtype == torch.float32 for m in masters)
    resumed = model(dtype=torch.bfloat16)
    again = trainer_of(SAMTrainer, resumed, arguments(tmp_path, 4, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(same_bits(p, q) for p, q in zip(mine.parameters(), resumed.parameters(), strict=True))
    after = [m for group in innermost(again.optimizer).param_groups for m in group["params"]]
    assert all(same_bits(m, n) for m, n in zip(masters, after, strict=True))
    with torch.no_grad():
        resumed.lm_head.weight.mul_(2)  # weights of somebody else, from which masters begin
    again.train()
    again.args.sam_masters = False
    with pytest.raises(ValueError, match=r"the optimizer holds masters by now.*set trainer\.optimizer to None"):
        again.train()
    again.optimizer = None
    again.train()
    assert again.sam.report is not None


def test_masters_of_an_optimizer_without_a_state_are_saved(tmp_path: Path) -> None:
    """Plain SGD keeps nothing of its own; a resumed run goes on with the same masters all the same."""
    mine, resumed = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    options = {"sam_masters": True, "optim": "sgd", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    trainer_of(SAMTrainer, mine, arguments(tmp_path, 4, **options)).train()
    again = trainer_of(SAMTrainer, resumed, arguments(tmp_path, 4, **options))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(same_bits(p, q) for p, q in zip(mine.parameters(), resumed.parameters(), strict=True))


def test_a_step_with_masters_that_overflows_is_skipped(tmp_path: Path) -> None:
    class Spoiled(SAMTrainer):
        passes = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.passes += 1
            return super().compute_loss(*args, **kwargs) * (float("inf") if self.passes == 2 else 1)

    mine = model(dtype=torch.bfloat16)
    before = [p.detach().clone() for p in mine.parameters()]
    trainer = trainer_of(Spoiled, mine, arguments(tmp_path, 1, sam_masters=True))
    trainer.train()
    assert trainer.sam.skipped_steps == 1
    assert all(same_bits(p, q) for p, q in zip(before, mine.parameters(), strict=True))


def test_a_variant_with_float16s_loss_scale_gets_it() -> None:
    variant = PostTrainingOptions(sam_variant="friendlysam").sam_keywords(loss_scale=lambda: 8.0)["variant"]
    assert variant.loss_scale() == 8.0
    assert PostTrainingOptions(sam_variant="gsam").sam_keywords(loss_scale=lambda: 8.0)["variant"].alpha == 0.1


# -- R3F's relatives, R4F, TRAM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "relative"),
    [
        ("neftune:alpha=9", lambda: relatives.NEFTune(9.0, seed=5)),
        ("symnoise:alpha=9,r3f_lambda=0.3", lambda: relatives.SymNoise(9.0, 0.3, seed=5)),
        ("smart:eps=0.3,sigma=0.2,steps=2", lambda: relatives.SMART(eps=0.3, sigma=0.2, steps=2, seed=5)),
        ("freelb:adv_steps=2,adv_init_mag=0.4", lambda: relatives.FreeLB(2, adv_init_mag=0.4, seed=5)),
        ("hype:eps=0.1,noise_type=uniform", lambda: relatives.HyPe(0.1, "uniform", seed=5)),
        ("noisedstudent:eps=0.2,r3f_lambda=0.5", lambda: relatives.NoisedStudent(0.2, 0.5, seed=5)),
    ],
)
def test_a_relative_in_the_trainer_is_that_relative_in_a_loop(tmp_path: Path, text: str, relative: Callable) -> None:
    mine, hand = (tiny.build("causal", 0.0, torch.float64) for _ in range(2))
    args = arguments(tmp_path, 4, gradient_accumulation_steps=3, r3f_relative=text, r3f_seed=5)
    trainer_of(R3FTrainer, mine, args).train()
    opt, method = optimizer_of(hand), relative()
    for (window,) in windows(rows(), 3, 4):
        opt.zero_grad()
        with method.window():
            for batch in window:
                out = method(hand, num_items=items_of([window]), **batch)
                if not isinstance(method, relatives.FreeLB):
                    out.loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    assert distance(mine, hand) <= TOLERANCE
    assert distance(mine, tiny.build("causal", 0.0, torch.float64)) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
def test_r_drop_with_its_masks(tmp_path: Path, fused: bool) -> None:
    class ByHand(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            return relatives.RDrop(0.7, fused_linear=fused)(model, num_items=num_items_in_batch, **inputs).loss

    mine, hand = (tiny.build("llama", 0.2, torch.float64) for _ in range(2))
    options = {"gradient_accumulation_steps": 2}
    args = arguments(tmp_path, 3, r3f_relative="rdrop:alpha=0.7", r3f_fused_linear=fused, **options)
    trainer = trainer_of(R3FTrainer, mine, args)
    trainer.train()
    trainer_of(ByHand, hand, arguments(tmp_path, 3, **options)).train()
    assert distance(mine, hand) <= TOLERANCE
    assert min(logged(trainer, "r3f/symm_kl")) > 1e-6


def test_sam_and_a_relative_that_makes_its_own_backward_passes(tmp_path: Path) -> None:
    """FreeLB in both of SAM's passes; with rho 0 it is FreeLB alone, bit for bit, dropout included."""
    found = []
    for method in ("r3f", "sam+r3f"):
        found.append(tiny.build("causal", 0.2))
        options = {"method": method, "sam_rho": 0.0, "r3f_relative": "freelb", "gradient_accumulation_steps": 3}
        trainer = trainer_of(PostTrainer, found[-1], arguments(tmp_path, 4, **options))
        trainer.train()
    assert all(same_bits(p, q) for p, q in zip(*(m.parameters() for m in found), strict=True))
    assert trainer.sam.report is not None


@pytest.mark.parametrize(("layers", "mode"), [("last", "exact"), ("all", "at_most")])
def test_r4f_in_the_trainer_is_r4f_in_a_loop(tmp_path: Path, layers: str, mode: str) -> None:
    mine, hand = (tiny.build("roberta", 0.0, torch.float64) for _ in range(2))
    options = {"r3f_eps": 0.3, "r3f_seed": 5, "r3f_spectral": layers, "r3f_spectral_mode": mode}
    if layers == "last":
        options["r3f_spectral"] = None  # as the method says
    data = rows("sequence")
    trainer = trainer_of(PostTrainer, mine, arguments(tmp_path, 3, method="r4f", **options), data)
    trainer.train()
    r4f, r3f = R4F(hand.classifier, layers=layers, mode=mode), R3F(0.3, seed=5)
    opt = optimizer_of(hand)
    for (window,) in windows(data, 1, 3):
        opt.zero_grad()
        with r3f.window():
            r3f(hand, num_items=items_of([window], shift=False), **window[0]).loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    assert trainer.r4f.layers == r4f.layers
    assert distance(mine, hand) <= TOLERANCE
    trainer.args.r3f_spectral, trainer.args.r3f_spectral_mode, trainer.args.method = None, "exact", "r3f"
    trainer.train()
    assert trainer.r4f is None
    assert not any("parametrizations" in name for name, _ in mine.named_parameters())
    with pytest.raises(ValueError, match="no classifier, score or classification_head"):
        trainer_of(PostTrainer, tiny.build("causal"), arguments(tmp_path, 1, method="r4f"))


def divergences(hand: Any, window: list[Any], items: int, seed: int) -> Tensor:
    """Each micro-batch's share in the symmetric KL under noise, from torch's own functions."""
    found, seen = [], 0
    for batch in window:
        found.append(symmetric(*both_streams(hand, batch, seed, seen), batch) / items)
        seen += batch["input_ids"].numel()
    return torch.stack(found)


def both_streams(hand: Any, batch: Any, seed: int, seen: int) -> tuple[Tensor, Tensor]:
    """Logits without and with noise on the embeddings; `seen` tokens came before in this step."""
    embeds, ids = hand.get_input_embeddings()(batch["input_ids"]), batch["input_ids"]
    noised = add_noise(embeds.detach(), 0.3, seed=seed, token_index=torch.arange(ids.numel()).view(ids.shape) + seen)
    clean, other = (hand(inputs_embeds=e, attention_mask=batch["attention_mask"]).logits for e in (embeds, noised))
    return clean, other


def symmetric(clean: Tensor, noised: Tensor, batch: Any) -> Tensor:
    """The symmetric KL of next tokens, summed up over the labels that count."""
    p, q = (z[:, :-1].log_softmax(-1) for z in (clean, noised))
    return (((p.exp() - q.exp()) * (p - q)).sum(-1) * (batch["labels"][:, 1:] != -100)).sum()


@pytest.mark.parametrize(("fraction", "weight"), [(1.0, None), (0.6, None), (1.0, 0.4)])
def test_tram_in_the_trainer_follows_its_equations(tmp_path: Path, fraction: float, weight: float | None) -> None:
    """e = rho d t^2 g / |t g| (2310.03646), d the divergence under noise at w; with a weight it is in the loss as well."""
    mine, hand = model(), model()
    options = {"method": "tram", "r3f_lambda": weight, "r3f_eps": 0.3, "r3f_seed": 5, "sam_ascent_fraction": fraction}
    args = arguments(tmp_path, 4, gradient_accumulation_steps=3, **{**options, "sam_rho": 0.9})
    trainer = trainer_of(PostTrainer, mine, args)
    trainer.train()
    assert (args.sam_adaptive, args.r3f_lambda, type(trainer.sam.variant)) == (True, weight or 0.0, TRAM)
    opt, params = optimizer_of(hand), list(hand.parameters())
    for step, (window,) in enumerate(windows(rows(), 3, 4)):
        items, k = items_of([window]), math.ceil(fraction * len(window))

        def gradient(micro_batches: list[Any], items: int = items, step: int = step) -> tuple[Any, float]:
            kl = divergences(hand, micro_batches, items, seed_of(5, step)).sum()
            loss = sum(causal_loss(hand, batch, items) for batch in micro_batches) + (weight or 0) * kl
            return torch.autograd.grad(loss, params), float(kl.detach())

        g, share = gradient(window[:k])
        radius = 0.9 * share * items / items_of([window[:k]])
        t = [p.detach().abs() for p in params]
        norm = torch.stack([(a * b).square().sum() for a, b in zip(t, g, strict=True)]).sum().sqrt()
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, a, b in zip(params, t, g, strict=True):
                p += radius * a * a * b / norm
        second, _ = gradient(window)
        with torch.no_grad():
            for p, w, b in zip(params, kept, second, strict=True):
                p.copy_(w)
                p.grad = b
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
    assert distance(mine, hand) <= TOLERANCE


# -- other values for another run -------------------------------------------------------------------------------------------


def test_a_second_run_takes_other_options(tmp_path: Path) -> None:
    """The optimizer goes on with its moments; radius, variant and kind of perturbation are the new ones."""
    mine, hand = model(), model()
    trainer = trainer_of(SAMTrainer, mine, arguments(tmp_path, 3, gradient_accumulation_steps=3))
    trainer.train()
    base = sam_loop(hand, windows(rows(), 3, 3)).base_optimizer
    trainer.args.sam_rho, trainer.args.sam_variant, trainer.args.sam_interval = 0.7, "looksam:alpha=0.4", 2
    trainer.train()
    for group in base.param_groups:
        group["rho"] = 0.7
    sam_loop(hand, windows(rows(), 3, 3), base, variant=LookSAM(0.4), interval=2)
    assert distance(mine, hand) <= TOLERANCE
    trainer.post_training = PostTrainingOptions(sam_rho=0.1, sam_adaptive=True, sam_perturb="functional")
    trainer.train()
    for group in base.param_groups:
        group.update(rho=0.1, adaptive=True)
    sam_loop(hand, windows(rows(), 3, 3), base, perturb="functional", model=hand)
    assert distance(mine, hand) <= TOLERANCE


def test_a_radius_of_a_group_or_of_a_schedule_stays_until_the_option_changes(tmp_path: Path) -> None:
    made = model()
    first, *others = made.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "rho": 0.5}, {"params": others}], lr=1e-3)
    trainer = trainer_of(SAMTrainer, made, arguments(tmp_path, 1), optimizers=(optimizer, None))
    trainer.train()
    assert [group["rho"] for group in optimizer.param_groups] == [0.5, RHO]
    optimizer.param_groups[1]["rho"] = 0.3
    trainer.args.sam_eta, trainer.args.sam_adaptive = 0.01, True
    trainer.train()
    assert [(group["rho"], group["eta"]) for group in optimizer.param_groups] == [(0.5, 0.01), (0.3, 0.01)]
    trainer.args = copy.copy(trainer.args)  # all of them exchanged
    trainer.args.sam_rho, trainer.args.sam_adaptive, trainer.args.sam_eta = 0.4, False, 0.0
    trainer.train()
    assert trainer.post_training is trainer.args
    assert [(g["rho"], g["adaptive"]) for g in optimizer.param_groups] == [(0.5, False), (0.4, False)]


def test_a_second_run_takes_another_method_and_other_options_of_r3f(tmp_path: Path) -> None:
    trainer = trainer_of(PostTrainer, model(), arguments(tmp_path, 1, method="sam"))
    trainer.train()
    assert trainer.r3f is None
    trainer.args.method, trainer.args.r3f_lambda, trainer.args.r3f_eps = "r3f", 0.3, 0.2
    trainer.train()
    assert (trainer.sam, trainer.r3f.r3f_lambda, trainer.r3f.eps) == (None, 0.3, 0.2)
    trainer.r3f.eps = 0.1  # a schedule's, which a run with the same options does not undo
    trainer.train()
    assert trainer.r3f.eps == 0.1
    trainer.args.r3f_relative, trainer.args.r3f_lambda, trainer.args.r3f_eps = "neftune", 1.0, 1e-5
    trainer.train()
    assert isinstance(trainer.r3f, relatives.NEFTune)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.args.r3f_grad = "noised"
    for _ in range(2):  # the refusal holds until something is changed
        with pytest.raises(ValueError, match="r3f_grad='noised' is R3F's"):
            trainer.train()
    assert all(same_bits(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))


# -- all options, all doors -------------------------------------------------------------------------------------------------

# A value for every option that is not its default, with what it takes beside it.
VALUES: dict[str, dict[str, Any]] = {
    "method": {"method": "tram"},
    "sam_rho": {"sam_rho": 0.3},
    "sam_adaptive": {"sam_adaptive": True},
    "sam_eta": {"sam_eta": 0.01, "sam_adaptive": True},
    "sam_ascent_fraction": {"sam_ascent_fraction": 0.5},
    "sam_per_micro_batch": {"sam_per_micro_batch": True},
    "sam_interval": {"sam_interval": 3},
    "sam_variant": {"sam_variant": "gsam:alpha=0.25"},
    "sam_functional_path": {"sam_functional_path": True},
    "sam_perturb": {"sam_perturb": "functional"},
    "sam_masters": {"sam_masters": True},
    "sam_stash": {"sam_stash": "ulp"},
    "sam_scope": {"sam_scope": "*.bias"},
    "sam_rounding": {"sam_rounding": "stochastic"},
    "sam_rounding_seed": {"sam_rounding_seed": 9, "sam_rounding": "stochastic"},
    "sam_dropout_rng": {"sam_dropout_rng": "independent"},
    "sam_norm": {"sam_norm": "backward"},
    "sam_norm_stats": {"sam_norm_stats": "both"},
    "sam_sync_ascent": {"sam_sync_ascent": True},
    "r3f_lambda": {"r3f_lambda": 0.4},
    "r3f_eps": {"r3f_eps": 0.3},
    "noise_type": {"noise_type": "normal"},
    "r3f_noise_scale": {"r3f_noise_scale": "neftune"},
    "r3f_grad": {"r3f_grad": "clean"},
    "r3f_dropout": {"r3f_dropout": "shared"},
    "r3f_forward": {"r3f_forward": "double_batch"},
    "r3f_divergence": {"r3f_divergence": "js"},
    "r3f_where": {"r3f_where": "both"},
    "r3f_detach_embedding": {"r3f_detach_embedding": False},
    "r3f_seed": {"r3f_seed": 4},
    "r3f_embedding": {"r3f_embedding": "transformer.wte"},
    "r3f_fused_linear": {"r3f_fused_linear": True},
    "r3f_relative": {"r3f_relative": "rdrop:alpha=0.5,forward=double_batch"},
    "r3f_spectral": {"r3f_spectral": "all"},
    "r3f_spectral_mode": {"r3f_spectral_mode": "at_most", "r3f_spectral": "last"},
}
R3FS = {"lambda": "r3f_lambda", "type": "noise_type", "detach_embedding": "detach_noised_embedding"}
ATTRIBUTES = {"r3f_relative": ("alpha", 0.5), "sam_variant": ("alpha", 0.25)}
# Of SAM's keywords: what a trainer knows itself, and what it leaves nothing to do for.
THE_TRAINERS = {"params", "base_optimizer", "kwargs", "model", "compute_dtype"}
OF_THE_TRAINER = ("sam_per_micro_batch", "sam_masters", "sam_functional_path")  # options that are no keyword of SAM
NOT_IN_LIGHTNING = (*OF_THE_TRAINER, "sam_sync_ascent")
NOT_SERVED = {"fused_restore", "norm_group"}


def through_transformers(folder: Path, options: dict[str, Any]) -> Any:
    return PostTrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


def through_trl(folder: Path, options: dict[str, Any]) -> Any:
    return PostSFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **options)


def through_the_command(folder: Path, options: dict[str, Any]) -> Any:
    (folder / "x.txt").write_text("a text")
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    base = ["--train_file", str(folder / "x.txt"), "--output_dir", str(folder / "out"), "--use_cpu"]
    return train_options.parse([*base, *words]).arguments


def through_lightning(folder: Path, options: dict[str, Any]) -> Any:
    return SAMCallback(PostTrainingOptions(**options)).options


@pytest.mark.parametrize("door", [through_transformers, through_trl, through_the_command, through_lightning])
def test_every_option_arrives_through_every_door(tmp_path: Path, door: Callable) -> None:
    """Each of them is its own, and reaches SAM's keyword or R3F's attribute of that name."""
    known = {f.name: f.default for f in dataclasses.fields(PostTrainingOptions)}
    assert set(VALUES) == {name for name in known if part_of(name) in ("sam", "r3f")} | {"method"}
    for name, given in VALUES.items():
        part = part_of(name)
        options = {"method": {"sam": "sam", "r3f": "r3f", None: "tram"}[part], **given}
        if door is through_lightning and (part != "sam" or name in NOT_IN_LIGHTNING):
            with pytest.raises(ValueError, match=f"method={options['method']!r}" if part != "sam" else name):
                door(tmp_path, options)
            continue
        arrived = door(tmp_path, options)
        assert arrived.values() == PostTrainingOptions(**options).values()
        assert getattr(arrived, name) == given[name] != known[name]
        key, value = name.partition("_")[2], given[name]
        if name in ATTRIBUTES:
            key, value = ATTRIBUTES[name]
            built = arrived.build_r3f() if part == "r3f" else arrived.build_variant()
            assert getattr(built, key) == value
        elif part == "sam" and name not in OF_THE_TRAINER:
            assert arrived.sam_keywords()[key] == ([value] if name == "sam_scope" else value)
        elif part == "r3f" and not name.startswith("r3f_spectral"):
            built = arrived.build_r3f(fused_linear=bool(arrived.r3f_fused_linear))
            assert getattr(built, R3FS.get(key, key)) == value
    assert PostSFTTrainer._sam_keywords is PostTrainer._sam_keywords
    assert PostSFTTrainer.compute_loss is PostTrainer.compute_loss


def test_what_a_method_sets_follows_it() -> None:
    options = PostTrainingOptions(method="asam")
    for method, expected in (
        ("sam", (0.05, False, 1.0, None)),
        ("sam_lm", (0.15, False, 0.25, None)),
        ("asam", (0.5, True, 1.0, None)),
        ("sam+r4f", (0.05, False, 1.0, "last")),
        ("tram", (1.0, True, 1.0, None)),
        ("none", (0.05, False, 1.0, None)),
    ):
        options.method = method
        options.check()
        assert (options.sam_rho, options.sam_adaptive, options.sam_ascent_fraction, options.r3f_spectral) == expected
        assert options.values() == PostTrainingOptions(method=method).values()
    options.method, options.sam_variant = "sam", "looksam"
    options.check()
    assert options.sam_interval == 5
    options.sam_variant, options.sam_rho = None, 0.3
    options.check()
    assert options.sam_interval == 1
    options.method = "sam_lm"
    options.check()
    assert (options.sam_rho, options.sam_ascent_fraction) == (0.3, 0.25)  # what was given stays


def test_every_keyword_of_sam_has_an_option() -> None:
    """A new keyword shows here: give it an option, or say above why a trainer has no use for it."""
    keywords = set(inspect.signature(SAM.__init__).parameters) - {"self"}
    options = {name.removeprefix("sam_") for name in VALUES if name.startswith("sam_")} - {
        "per_micro_batch",  # the window's
        "functional_path",  # at the model's head
    }
    assert keywords - THE_TRAINERS - NOT_SERVED - {"master_params"} | {"masters"} == options
    built = set(PostTrainingOptions().sam_keywords())
    assert built == keywords - {"params", "base_optimizer", "kwargs", "master_params"} - NOT_SERVED


def test_every_keyword_of_r3f_has_an_option() -> None:
    """Reduction, smoothing, labels and memory are the trainer's and the model's; gradients in place would take the logits
    that a trainer returns."""
    theirs = {"reduction", "label_smoothing", "shift_labels", "ignore_index", "memory_budget", "inplace"}
    names = [name for name in VALUES if part_of(name) == "r3f" and "relative" not in name and "spectral" not in name]
    keys = {R3FS.get(key, key) for key in (name.partition("_")[2] for name in names)}
    assert set(inspect.signature(R3F.__init__).parameters) - {"self"} - theirs == keys


def test_norm_layers_as_a_scope() -> None:
    made = model()
    for text, expected in (
        ("norm_layers", {"ln_1", "ln_2", "ln_f"}),
        ("norm_layers, *.wpe.*", {"ln_1", "ln_2", "ln_f", "wpe"}),
    ):
        scope: Any = PostTrainingOptions(sam_scope=text).sam_keywords(made)["scope"]
        assert {name.split(".")[-2] for name, p in made.named_parameters() if scope(name, p)} == expected


def test_every_variant_and_relative_is_an_option() -> None:
    assert set(specs.RELATIVES) == {name.lower() for name in relatives.__all__}
    ours = [cls for cls in Variant.__subclasses__() if cls.__module__ == "fastpost.sam.variants"]
    found = {cls.__name__.lower() for cls in ours}
    assert set(specs.VARIANTS) == found
    for name in found:
        assert type(PostTrainingOptions(sam_variant=name).build_variant()).__name__.lower() == name
    for name, cls in specs.RELATIVES.items():
        assert type(PostTrainingOptions(r3f_relative=name).build_r3f()) is cls


# -- what does not go together ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sam_variant": "gsm"}, "unknown sam_variant 'gsm'. Did you mean 'gsam'? Valid: stablesam, gsam"),
        ({"sam_variant": "gsam:alhpa=1"}, "unknown parameter of gsam 'alhpa'. Did you mean 'alpha'?"),
        ({"sam_variant": "gsam:alpha=much"}, "alpha of gsam must be a number, not 'much'"),
        ({"sam_variant": "gsam:alpha=-1"}, "sam_variant='gsam:alpha=-1': GSAM: alpha must be finite and >= 0"),
        ({"sam_variant": "gsam:0.1"}, "parameters are written gsam:alpha=0.1"),
        ({"sam_variant": "gsam:"}, "parameters are written gsam:alpha=0.1"),
        ({"sam_variant": "gsam:alpha=1,alpha=2"}, "alpha is set twice"),
        ({"sam_variant": "stablesam:alpha=1"}, "stablesam has no parameters"),
        ({"sam_variant": "friendlysam:loss_scale=2"}, "unknown parameter of friendlysam 'loss_scale'"),
        ({"r3f_relative": "r-drop"}, "Did you mean 'rdrop'?"),
        ({"r3f_relative": "freelb:adv_steps=1.5"}, "adv_steps of freelb must be a whole number, not '1.5'"),
        ({"r3f_relative": "hype:dropout=maybe"}, "dropout of hype must be true or false, not 'maybe'"),
        ({"r3f_relative": "neftune:seed=1"}, "unknown parameter of neftune 'seed'"),
        ({"sam_perturb": "functionl"}, "Did you mean 'functional'?"),
        ({"sam_norm": "backwards"}, "Did you mean 'backward'?"),
        ({"sam_norm": "backward", "sam_adaptive": True}, "ASAM's norm is of t g"),
        ({"sam_norm": "backward", "sam_variant": "friendlysam"}, "makes a direction of its own"),
        ({"sam_stash": "ulps"}, "Did you mean 'ulp'?"),
        ({"sam_stash": "ulp", "sam_perturb": "functional"}, "sam_perturb='functional' writes no weight"),
        ({"sam_stash": "cpu", "sam_masters": True}, "sam_masters keeps w itself"),
        ({"r3f_spectral": "lst"}, "Did you mean 'last'?"),
        ({"sam_variant": "looksam", "sam_interval": 1}, "sam_interval=1 leaves none"),
        ({"sam_variant": "gsam", "sam_per_micro_batch": True}, "which sam_per_micro_batch does not make"),
        ({"sam_variant": "stablesam", "sam_sync_ascent": False}, "sam_sync_ascent=False keeps it apart"),
        ({"sam_variant": "zerothordersam:mu=1e-3"}, "call before each step; in a loop of your own"),
        ({"sam_variant": "DecoupledWSAM"}, "A trainer's form is wsam"),
        ({"sam_variant": "momentumsam", "sam_ascent_fraction": 0.5}, "makes no ascent pass, which sam_ascent_fraction=0.5"),
        ({"sam_variant": "momentumsam", "sam_per_micro_batch": True}, "makes no ascent pass, which sam_per_micro_batch"),
        ({"sam_variant": "momentumsam", "sam_dropout_rng": "independent"}, "makes no ascent pass, which sam_dropout_rng"),
        ({"sam_perturb": "functional", "sam_rounding": "stochastic"}, "sam_rounding='stochastic' has nothing to round"),
        ({"sam_perturb": "functional", "r3f_spectral": "last"}, "take sam_perturb='stored'"),
        (
            {"sam_masters": True, "sam_variant": "gsam"},
            "by casting masters, which sam_variant='gsam' does not do",
        ),
        ({"sam_masters": True, "sam_perturb": "functional"}, "which sam_perturb='functional' does not do"),
        ({"sam_masters": True, "sam_rounding": "stochastic"}, "which sam_rounding='stochastic' does not do"),
        ({"sam_rounding_seed": 1}, "sam_rounding_seed=1 is for sam_rounding='stochastic'"),
        ({"sam_rounding_seed": -1, "sam_rounding": "stochastic"}, "sam_rounding_seed must be a whole number >= 0"),
        ({"sam_eta": 0.01}, "sam_eta=0.01 is ASAM's constant, and sam_adaptive is off"),
        ({"method": "tram", "sam_variant": "gsam"}, "method='tram' is a variant of SAM by itself"),
        ({"method": "sam", "sam_variant": "tram"}, "method='sam' does no R3F; say method='tram', or 'sam+r3f'"),
        ({"method": "r3f", "sam_variant": "gsam"}, "sam_variant='gsam': method='r3f' does no SAM"),
        ({"method": "sam", "r3f_relative": "rdrop"}, "r3f_relative='rdrop': method='sam' does no R3F"),
        ({"method": "tram", "r3f_relative": "rdrop"}, "r3f_relative='rdrop' R3F's place"),
        ({"method": "tram", "r3f_forward": "double_batch"}, "without r3f_forward='double_batch'"),
        ({"method": "tram", "r3f_fused_linear": True}, "which r3f_fused_linear never builds"),
        (
            {"sam_functional_path": True, "sam_ascent_fraction": 0.5},
            "sam_ascent_fraction=0.5 runs some of them at w + e only",
        ),
        ({"sam_functional_path": True, "sam_variant": "momentumsam"}, "which sam_variant='momentumsam' does not make"),
        ({"sam_functional_path": True, "r3f_fused_linear": True}, "r3f_fused_linear never builds logits"),
        ({"r3f_relative": "neftune", "r3f_lambda": 0.5}, "r3f_lambda=0.5 is R3F's"),
        ({"r3f_relative": "neftune", "r3f_fused_linear": True}, "r3f_fused_linear is for R3F and R-Drop"),
        ({"r3f_relative": "rdrop", "r3f_seed": 1}, "r3f_seed changes nothing in r3f_relative='rdrop'"),
        ({"r3f_spectral_mode": "at_most"}, "say r3f_spectral or method='r4f'"),
    ],
)
def test_what_contradicts_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PostTrainingOptions(**options)


@pytest.mark.parametrize(
    ("cls", "kind", "options", "message"),
    [
        (SAMTrainer, "causal", {"sam_variant": "tram"}, "SAMTrainer does no R3F"),
        (R3FTrainer, "causal", {"sam_variant": "gsam"}, "R3FTrainer does no SAM"),
        (R3FTrainer, "causal", {"r3f_relative": "rdrop", "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        (R3FTrainer, "causal", {"neftune_noise_alpha": 5}, "neftune_noise_alpha=5 adds noise"),
        (R3FTrainer, "causal", {"r3f_relative": "hype", "gradient_checkpointing": True}, "gradient_checkpointing runs"),
        (R3FTrainer, "causal", {"r3f_spectral": "last"}, "R4F cannot find its head"),
        (SAMTrainer, "causal", {"sam_rounding": "stochastic"}, "rounding='stochastic' is for 16-bit weights"),
        (SAMTrainer, "causal", {"sam_masters": True}, "wte.weight is torch.float32, and masters are of 16-bit weights"),
        (SAMTrainer, "causal", {"sam_sync_ascent": True}, "no process group is initialised"),
        (SAMTrainer, "sequence", {"sam_functional_path": True}, "BertForSequenceClassification names none"),
        (SAMTrainer, "causal", {"sam_scope": "lora"}, "no parameter's name fits 'lora'"),
    ],
)
def test_what_takes_the_model_is_refused_with_the_trainer(
    tmp_path: Path, cls: Any, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(cls, tiny.build(kind), arguments(tmp_path, 1, **options))


def test_functional_perturbation_names_the_layers_that_it_does_not_serve(tmp_path: Path) -> None:
    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()
            self.extra = nn.Bilinear(2, 2, 2)

    with pytest.raises(ValueError, match=r"not extra \(Bilinear\)"):
        trainer_of(SAMTrainer, Bilinear(), arguments(tmp_path, 1, sam_perturb="functional"))
    trainer_of(SAMTrainer, Bilinear(), arguments(tmp_path, 1, sam_perturb="functional", sam_scope="inner.*"))


def test_a_relative_does_not_replace_a_loss_of_the_trainers_own(tmp_path: Path) -> None:
    class Ascent(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return -super().compute_loss(*args, **kwargs)

    class Both(R3FTrainerMixin, Ascent):
        pass

    with pytest.raises(ValueError, match=r"would replace that of Ascent\.compute_loss"):
        trainer_of(Both, model(), arguments(tmp_path, 1, r3f_relative="rdrop"))
