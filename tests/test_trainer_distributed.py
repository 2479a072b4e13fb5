"""The Trainer in two processes: DDP and FSDP2, against the loop from the equations over the batches of both."""

from __future__ import annotations

import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType, TorchContextParallelConfig
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.modeling_outputs import CausalLMOutput

from fastpost import R3F
from fastpost.integrations.r3f_trainer import RANK
from fastpost.integrations.transformers import AnchorTrainer, DriftGuard, PostTrainer, R3FTrainer, SAMTrainer
from fastpost.r3f.relatives import FreeLB

from . import distributed, test_anchor_context, tiny
from .by_hand import ascended, distance, largest_difference
from .test_anchor import with_lora
from .test_trainer_anchor import KL, loop
from .trainers import (
    CLIP,
    RHO,
    VARIANTS,
    arguments,
    by_hand,
    causal_loss,
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

STEPS, FEWER = 20, 8


def model() -> Any:
    return exact(tiny.build("causal", 0.0, torch.float64))


def environment() -> None:
    """What torchrun sets; the processes share a group already."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29511",
        ACCELERATE_USE_CPU="true",
    )


def trained(cls: Any, mine: nn.Module, steps: int, **options: Any) -> Any:
    environment()
    callbacks, resume, given = options.pop("callbacks", []), options.pop("resume", None), options.pop("given", {})
    args = arguments(options.pop("output_dir", None) or tempfile.mkdtemp(), steps, ddp_backend="gloo", **options)
    trainer = trainer_of(cls, mine, args, callbacks=callbacks, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sam(accumulation: int, fraction: float, **options: Any) -> tuple[float, list[float]]:
    mine, hand = model(), model()
    settings = {"gradient_accumulation_steps": accumulation, "sam_ascent_fraction": fraction, **options}
    trainer = trained(SAMTrainer, mine, STEPS, **settings)
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    norms = by_hand(hand, windows(rows(), accumulation, STEPS, ranks=2), fraction=fraction)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    return distance(mine, hand), logged(trainer, "sam/seen_cosine")


class Apart(SAMTrainer):
    """Every rank has a bias of its own for the logits, which DDP leaves alone."""

    def sam_norm_group(self) -> Any:
        return lambda name, p: dist.group.WORLD if name == "lm_head.own" else None


def with_biases(biases: torch.Tensor) -> Any:
    made: Any = model()
    made.lm_head.own, made.row = nn.Parameter(biases.clone()), 0
    made.lm_head.register_forward_hook(lambda head, args, logits: logits + head.own[made.row])
    return made


def biases_apart() -> float:
    """SAM's norm is over the biases of both ranks. Each rank's loss counts twice, as in DDP, which then takes the mean."""
    biases = torch.randn(2, tiny.VOCABULARY, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rank = dist.get_rank()
    mine, hand = with_biases(biases[rank : rank + 1]), with_biases(biases)
    mine._ddp_params_and_buffers_to_ignore = ["lm_head.own"]
    mine.lm_head.own.register_hook(lambda g: g / 2)
    trained(Apart, mine, 4, gradient_accumulation_steps=2, max_grad_norm=0.0)
    steps = windows(rows(), 2, 4, ranks=2)
    rank_of = {id(batch): number for window in steps for number, batches in enumerate(window) for batch in batches}

    def loss(model: Any, batch: Any, items: float) -> torch.Tensor:
        model.row = rank_of[id(batch)]
        return causal_loss(model, batch, items)

    by_hand(hand, steps, loss, clip=torch.inf)
    expected = dict(hand.named_parameters())
    expected["lm_head.own"] = expected["lm_head.own"][rank : rank + 1]
    assert (expected["lm_head.own"] - biases[rank]).abs().max() > 1e-2
    return max(float((p - expected[name]).detach().abs().max()) for name, p in mine.named_parameters())


def own_counts() -> float:
    """average_tokens_across_devices=False: each rank divides by its own labels, and DDP takes the mean of ranks."""
    mine, hand = model(), model()
    trained(SAMTrainer, mine, 6, gradient_accumulation_steps=3, average_tokens_across_devices=False)
    steps = windows(rows(), 3, 6, ranks=2)
    own = {id(batch): 2 * items_of([batches]) for window in steps for batches in window for batch in batches}
    # windows repeat epoch by epoch, always cut alike
    by_hand(hand, steps, lambda m, batch, items: causal_loss(m, batch, own[id(batch)]))
    return distance(mine, hand)


def part_of_a_window(kind: str, own: bool) -> float:
    """The ascent counts by its share of the labels of all ranks, or with `own` by the mean of its shares on each rank."""
    mine, hand = model(), model()
    options = {"sam_variant": VARIANTS[kind], "sam_ascent_fraction": 0.5, "average_tokens_across_devices": not own}
    trained(SAMTrainer, mine, 4, gradient_accumulation_steps=3, **options)
    steps = windows(rows(), 3, 4, ranks=2)
    by = {id(batch): 2 * items_of([batches]) for window in steps for batches in window for batch in batches}
    return distance(mine, variant_by_hand(hand, steps, kind, 0.5, (lambda batch: by[id(batch)]) if own else None))


class Spoiled(SAMTrainer):
    """On rank 1 the loss of pass 4 is infinite: the second step's ascent."""

    passes = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.passes += 1
        return loss * float("inf") if self.passes == 5 and dist.get_rank() == 1 else loss


def spoiled(sync_ascent: bool | None) -> tuple[int, list[bool]]:
    mine = tiny.build("causal")
    trainer = trained(Spoiled, mine, 3, gradient_accumulation_steps=2, sam_sync_ascent=sync_ascent)
    return trainer.sam.skipped_steps, [bool(p.isfinite().all()) for p in mine.parameters()]


def stepped(opt: torch.optim.Optimizer, params: list[nn.Parameter], parts: list[tuple[torch.Tensor, ...]]) -> None:
    """One step by hand with the sum of these gradients, clipped."""
    for p, *own in zip(params, *parts, strict=True):
        p.grad = torch.stack(own).sum(0)
    nn.utils.clip_grad_norm_(params, CLIP)
    opt.step()


def m_sam(strategy: str, sync_ascent: bool | None, each: bool = False) -> float:
    """Each micro-batch ascends by its own gradient: that of all ranks, or with sync_ascent=False each rank's."""
    hand, options = model(), {"sam_per_micro_batch": True, "sam_sync_ascent": sync_ascent}
    accumulation: dict[str, Any] = {"gradient_accumulation_steps": 3}
    if each:
        accumulation = {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 3, "sync_each_batch": True}}}
    if strategy == "fsdp2":
        trainer = sharded(ShardedSAM, model(), 4, **options)
    else:
        trainer = trained(SAMTrainer, model(), 4, **accumulation, **options)
    opt, params = optimizer_of(hand), list(hand.parameters())
    for window in windows(rows(), 3, 4, ranks=2):
        items, second = items_of(window), []
        together = [list(batches) for batches in zip(*window, strict=True)]
        for batches in [[batch] for mine in window for batch in mine] if sync_ascent is False else together:
            g = torch.autograd.grad(sum(causal_loss(hand, batch, items) for batch in batches), params)
            with ascended(params, g, RHO):
                loss = sum(causal_loss(hand, batch, items) for batch in batches)
                second.append(torch.autograd.grad(loss, params))
        stepped(opt, params, second)
    return apart(trainer, hand)


def own_ascents_synchronised_each() -> float:
    """Accelerate's sync_each_batch shares every gradient but those that each rank ascends by on its own."""
    found = []
    for each in (False, True):
        accumulation: dict[str, Any] = {"gradient_accumulation_steps": 2}
        if each:
            accumulation = {
                "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2, "sync_each_batch": True}}
            }
        found.append(model())
        trained(SAMTrainer, found[-1], 3, sam_sync_ascent=False, **accumulation)
    return distance(*found)


def own_ascents() -> float:
    """sync_ascent=False, one micro-batch each: the second gradient is the mean of those at each rank's own w + e."""
    mine, hand = model(), model()
    trained(SAMTrainer, mine, 4, sam_sync_ascent=False)
    opt, params = optimizer_of(hand), list(hand.parameters())
    for window in windows(rows(), 1, 4, ranks=2):
        items, second = items_of(window), []
        for (batch,) in window:
            with ascended(params, torch.autograd.grad(causal_loss(hand, batch, items), params), RHO):
                second.append(torch.autograd.grad(causal_loss(hand, batch, items), params))
        stepped(opt, params, second)
    return distance(mine, hand)


def r3f() -> float:
    """Each rank's tokens have numbers of their own; both terms are over the labels of all ranks."""
    mine, hand = (tiny.build("causal", 0.0, torch.float64) for _ in range(2))
    trained(R3FTrainer, mine, 6, gradient_accumulation_steps=3, r3f_eps=0.3, noise_type="normal", r3f_seed=5)
    opt, method = optimizer_of(hand), R3F(0.3, 1.0, "normal", seed=5)
    for number, window in enumerate(windows(rows(), 3, 6, ranks=2)):
        opt.zero_grad()
        for rank, batches in enumerate(window):
            method.step = number
            with method.window(token_offset=rank * RANK):
                for batch in batches:
                    method(hand, num_items=items_of(window), **batch).loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    return distance(mine, hand)


def freelb() -> float:
    """Several backward passes per micro-batch, each summed over ranks once."""
    mine, hand = (tiny.build("causal", 0.0, torch.float64) for _ in range(2))
    given = "freelb:adv_steps=2,adv_init_mag=0.4"
    trained(R3FTrainer, mine, 3, gradient_accumulation_steps=3, r3f_relative=given, r3f_seed=5)
    opt, method = optimizer_of(hand), FreeLB(2, adv_init_mag=0.4, seed=5)
    for number, window in enumerate(windows(rows(), 3, 3, ranks=2)):
        opt.zero_grad()
        for rank, batches in enumerate(window):
            method.step = number
            with method.window(token_offset=rank * RANK):
                for batch in batches:
                    method(hand, num_items=items_of(window), **batch)
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    return distance(mine, hand)


def tram(fraction: float = 1.0) -> float:
    """The radius is the divergence of all ranks: e = rho d t^2 g / |t g|, t = |w|."""
    mine, hand = model(), model()
    options = {"method": "tram", "r3f_eps": 0.3, "r3f_seed": 5, "sam_rho": 0.9, "sam_ascent_fraction": fraction}
    trained(PostTrainer, mine, 3, gradient_accumulation_steps=3, **options)
    opt, r3f, params = optimizer_of(hand), R3F(0.3, seed=5), list(hand.parameters())
    for number, window in enumerate(windows(rows(), 3, 3, ranks=2)):
        items, batches = items_of(window), [batch for mine in window for batch in mine]
        ascent = [mine[: math.ceil(fraction * len(mine))] for mine in window]
        kl = 0.0
        for rank, own in enumerate(ascent):
            r3f.step = number
            with r3f.window(token_offset=rank * RANK):
                kl += sum(float(r3f(hand, num_items=items_of(ascent), **batch).symm_kl) for batch in own)
        g = torch.autograd.grad(sum(causal_loss(hand, batch, items) for mine in ascent for batch in mine), params)
        stretched = [p.detach().square() * part for p, part in zip(params, g, strict=True)]
        norm = torch.stack([(p.detach() * part).square().sum() for p, part in zip(params, g, strict=True)]).sum().sqrt()
        longest = torch.stack([part.square().sum() for part in stretched]).sum().sqrt()
        with ascended(params, stretched, float(0.9 * kl * longest / norm)):
            second = torch.autograd.grad(sum(causal_loss(hand, batch, items) for batch in batches), params)
        for p, part in zip(params, second, strict=True):
            p.grad = part
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()
    return distance(mine, hand)


def drift() -> tuple[Any, ...]:
    guard = DriftGuard(max_drift=0.3)
    trainer = trained(SAMTrainer, tiny.build("causal"), 12, callbacks=[guard])
    return guard.stopped_at, guard.last_good, trainer.state.global_step, float(next(trainer.model.parameters()).sum())


class OnCpu:
    """Lets Accelerate shard on CPUs, which it leaves to accelerators; torch's FSDP2 does not mind."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()  # type: ignore[misc]


class ShardedSAM(OnCpu, SAMTrainer):
    pass


class ShardedR3F(OnCpu, R3FTrainer):
    pass


class ShardedAnchor(OnCpu, AnchorTrainer):
    pass


def sharded(cls: Any, mine: nn.Module, steps: int, layer: str = "GPT2Block", **options: Any) -> Any:
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    wrapped = {"version": 2, "transformer_layer_cls_to_wrap": [layer], "state_dict_type": "SHARDED_STATE_DICT"}
    trainer = trained(cls, mine, steps, fsdp=True, fsdp_config=wrapped, gradient_accumulation_steps=3, **options)
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    return trainer


class PlainConfig(PretrainedConfig):
    model_type = "plain"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Plain(PreTrainedModel):
    """A model without attention, for which torch's context_parallel has no kernel on CPUs."""

    config_class, accepts_loss_kwargs = PlainConfig, True
    _supports_sdpa, _no_split_modules = True, ["Layer"]

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        torch.manual_seed(3)
        self.words, self.places = nn.Embedding(tiny.VOCABULARY, 16), nn.Embedding(8, 16)
        self.layer, self.head = Layer(), nn.Linear(16, tiny.VOCABULARY)
        self.double()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(
        self, input_ids: Any, position_ids: Any = None, shift_labels: Any = None, num_items_in_batch: Any = None, **rest: Any
    ) -> CausalLMOutput:
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        logits, loss = self.head(self.layer(self.words(input_ids) + self.places(places))), None
        if shift_labels is not None:
            flat = logits.flatten(0, 1), shift_labels.flatten()
            loss = nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch
        return CausalLMOutput(loss=loss, logits=logits)


def cut_sequences() -> float:
    """Accelerate's context parallelism: both processes have the same texts, each a part of every one."""
    mine, hand = (Plain(PlainConfig(attn_implementation="sdpa")) for _ in range(2))
    handler = TorchContextParallelConfig(cp_comm_strategy="allgather")
    options = {"parallelism_config": ParallelismConfig(cp_size=2, cp_handler=handler), "sam_ascent_fraction": 0.5}
    options["remove_unused_columns"] = False
    data = rows(time=8)
    trainer = sharded(ShardedSAM, mine, 4, **options, layer="Layer", given={"data": data})
    norms = by_hand(hand, windows(data, 3, 4), fraction=0.5)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    return apart(trainer, hand)


def apart(trainer: Any, hand: nn.Module) -> float:
    whole = {name: distributed.whole(p) for name, p in trainer.model.named_parameters()}
    return largest_difference((whole[name], p) for name, p in hand.named_parameters())


def tensor_parallel_r3f() -> float:
    """Ranks of one tensor-parallel group have the same batch and the same noise: a step is that of one process."""
    hand: Any = tiny.build("llama", 0.0, torch.float64)
    environment()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    hand.save_pretrained(folder[0])  # which the first rank does
    dist.barrier()
    cut = type(hand).from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2), dtype=torch.float64)
    trainer = trained(
        ShardedR3F, cut.train(), 4, gradient_accumulation_steps=3, r3f_eps=0.3, noise_type="normal", r3f_seed=5
    )
    assert trainer.get_tp_size() == 2
    opt, method = optimizer_of(hand), R3F(0.3, 1.0, "normal", seed=5)
    for window in windows(rows(), 3, 4):
        opt.zero_grad()
        with method.window():
            for batch in window[0]:
                method(hand, num_items=items_of(window), **batch).loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    return apart(trainer, hand)


def fsdp2(fraction: float) -> float:
    hand = model()
    trainer = sharded(ShardedSAM, model(), FEWER, sam_ascent_fraction=fraction)
    norms = by_hand(hand, windows(rows(), 3, FEWER, ranks=2), fraction=fraction)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6)
    assert logged(trainer, "sam/seen_over_intended") == pytest.approx([1.0] * FEWER, abs=1e-6)
    return apart(trainer, hand)


def functional_path(strategy: str) -> float:
    """Preconditioned Functional-SAM."""
    options: dict[str, Any] = {"sam_functional_path": True, "sam_variant": "preconditionedsam"}
    if strategy == "fsdp2":
        trainer = sharded(ShardedSAM, model(), 4, **options)
    else:
        trainer = trained(SAMTrainer, model(), 4, gradient_accumulation_steps=3, **options)
    return apart(trainer, functional_sam_by_hand(model(), windows(rows(), 3, 4, ranks=2), True))


def fsdp2_resumed() -> float:
    """Saved by torch's distributed checkpoint after four steps of six; the group's rho comes back with it, and a guard knows
    where the run began."""
    guards = DriftGuard(max_drift=1e9), DriftGuard(max_drift=1e9)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    saving = {"save_strategy": "steps", "save_steps": 4, "output_dir": folder[0], "sam_interval": 3}
    whole = sharded(ShardedSAM, model(), 6, callbacks=[guards[0]], **saving)
    weights = {name: distributed.whole(p) for name, p in whole.model.named_parameters()}
    resumed = sharded(ShardedSAM, model(), 6, resume=f"{folder[0]}/checkpoint-4", callbacks=[guards[1]], **saving)
    again = {name: distributed.whole(p) for name, p in resumed.model.named_parameters()}
    assert resumed.sam.param_groups[0]["sam_steps"] == 6
    assert guards[1].drift == pytest.approx(guards[0].drift, rel=1e-6)
    assert sorted(path.name for path in Path(folder[0]).glob("drift_guard*")) == [
        f"drift_guard_start-0000{rank}-of-00002.safetensors" for rank in range(2)
    ]
    lost = Path(folder[0], f"drift_guard_start-0000{dist.get_rank()}-of-00002.safetensors")
    before = lost.read_bytes()
    dist.barrier()  # both have looked
    if dist.get_rank() == 1:  # that one rank cannot read its part is enough
        lost.unlink()
    dist.barrier()
    guard = DriftGuard(max_drift=1e9)
    with pytest.warns(UserWarning, match="from the weights of step 4, not from"):
        sharded(ShardedSAM, model(), 6, resume=f"{folder[0]}/checkpoint-4", callbacks=[guard], **saving)
    assert guard.drift < guards[0].drift
    assert lost.read_bytes() == before if dist.get_rank() == 0 else not lost.exists()
    return largest_difference((weights[name], again[name]) for name in weights)


def fsdp2_drift() -> tuple[Any, ...]:
    guard = DriftGuard(max_drift=0.3)
    trainer = sharded(ShardedSAM, model(), 12, callbacks=[guard])
    start = dict(model().named_parameters())
    squares = [(distributed.whole(p) - start[n].detach()).square().sum() for n, p in trainer.model.named_parameters()]
    with pytest.raises(ValueError, match="max_layer_drift needs whole weights"):
        sharded(ShardedSAM, model(), 1, callbacks=[DriftGuard(max_layer_drift=1.0)])
    return guard.stopped_at, guard.last_good, guard.drift, float(torch.stack(squares).sum().sqrt())


def fsdp2_r3f() -> float:
    """The fused head in the root's group, and the logits, are the same step."""
    runs = []
    for fused in (False, True):
        options = {"r3f_eps": 0.3, "noise_type": "normal", "r3f_seed": 5, "r3f_fused_linear": fused}
        trainer = sharded(ShardedR3F, tiny.build("causal", 0.0, torch.float64), 4, **options)
        runs.append({name: distributed.whole(p) for name, p in trainer.model.named_parameters()})
    return largest_difference((runs[0][name], runs[1][name]) for name in runs[0])


def anchored(kind: str) -> float:
    """An average of the weights, or adapters off: the loop over the batches of both ranks."""
    mine, hand = (tiny.build("llama", 0.0, torch.float64) if kind == "ema" else with_lora() for _ in range(2))
    options = {"anchor_kl": KL, "anchor": kind, **({"anchor_ema_decay": 0.8} if kind == "ema" else {})}
    trained(AnchorTrainer, mine, 4, gradient_accumulation_steps=3, **options)
    loop(hand, kind, windows(rows(), 3, 4, ranks=2))
    return distance(mine, hand)


def in_context(kind: str) -> float:
    """A teacher that reads a context, of either weights; each rank's batch has contexts of its own."""
    mine, hand = (test_anchor_context.model_of(kind) for _ in range(2))
    data = test_anchor_context.texts(12)
    options = test_anchor_context.options_of(kind, gradient_accumulation_steps=1)
    trained(AnchorTrainer, mine, 4, **options, given={"data": data, "data_collator": test_anchor_context.collate})
    test_anchor_context.loop(hand, kind, data, 4, batches=2)
    return distance(mine, hand)


def fsdp2_anchor(kind: str) -> float:
    """A reference that is given whole, or a sharded model's own adapters off, through the fused head."""
    hand = with_lora("causal") if kind == "lora_off" else tiny.build("causal", 0.0, torch.float64)
    mine = with_lora("causal") if kind == "lora_off" else tiny.build("causal", 0.0, torch.float64)
    given = {} if kind == "lora_off" else {"anchor_model": tiny.build("causal", 0.0, torch.float64)}
    trainer = sharded(ShardedAnchor, mine, 4, anchor=kind, anchor_kl=KL, anchor_fused_linear=True, given=given)
    loop(hand, kind, windows(rows(), 3, 4, ranks=2), kind="causal")
    return apart(trainer, hand)


def fsdp2_context(kind: str) -> float:
    """The same of a teacher that reads a context, or the sharded model itself."""
    mine, hand, given = (
        with_lora("causal") if kind == "lora_off" else tiny.build("causal", 0.0, torch.float64) for _ in "abc"
    )
    options = {"anchor": "context", "anchor_teacher": kind, "anchor_kl": test_anchor_context.KL, "anchor_fused_linear": True}
    data = {"data": test_anchor_context.texts(12), "data_collator": test_anchor_context.collate}
    data |= {"anchor_model": given} if kind == "reference" else {}
    trainer = sharded(ShardedAnchor, mine, 3, **options, given=data)
    test_anchor_context.loop(hand, kind, data["data"], 3, batches=6, base="causal")
    return apart(trainer, hand)


CASES = {
    "sam 1": partial(sam, 1, 1.0),
    "sam 3": partial(sam, 3, 1.0),
    "sam 3, a third": partial(sam, 3, 0.3),
    "overflow": partial(spoiled, None),
    "overflow of one rank's own ascent": partial(spoiled, False),
    "own ascents": own_ascents,
    "own ascents, sync_each_batch": own_ascents_synchronised_each,
    "m-sam ddp": partial(m_sam, "ddp", None),
    "m-sam ddp, own ascents": partial(m_sam, "ddp", False),
    "m-sam ddp, own ascents, sync_each_batch": partial(m_sam, "ddp", False, each=True),
    "m-sam fsdp2": partial(m_sam, "fsdp2", None),
    "parameters apart": biases_apart,
    "own counts": own_counts,
    "part of a window, wsam": partial(part_of_a_window, "wsam", False),
    "part of a window, friendlysam, own counts": partial(part_of_a_window, "friendlysam", True),
    "functional path ddp": partial(functional_path, "ddp"),
    "functional path fsdp2": partial(functional_path, "fsdp2"),
    "r3f": r3f,
    "freelb": freelb,
    "tram": tram,
    "tram, a third": partial(tram, 0.3),
    "drift": drift,
    "anchor ema": partial(anchored, "ema"),
    **{f"anchor context, {kind}": partial(in_context, kind) for kind in ("ema", "reference", "live", "lora_off")},
    "anchor lora_off": partial(anchored, "lora_off"),
    "tensor-parallel r3f": tensor_parallel_r3f,
    "fsdp2": partial(fsdp2, 1.0),
    "fsdp2, a third": partial(fsdp2, 0.3),
    "fsdp2, sequences cut": cut_sequences,
    "fsdp2 resumed": fsdp2_resumed,
    "fsdp2 drift": fsdp2_drift,
    "fsdp2 r3f": fsdp2_r3f,
    "fsdp2 anchor reference": partial(fsdp2_anchor, "reference"),
    "fsdp2 anchor lora_off": partial(fsdp2_anchor, "lora_off"),
    **{f"fsdp2 anchor context, {kind}": partial(fsdp2_context, kind) for kind in ("reference", "live", "lora_off")},
}


@pytest.fixture(scope="module")
def outcome() -> distributed.Outcome:
    return distributed.run(2, CASES)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("sam")])
def test_sam_is_the_loop_from_the_equations(outcome: distributed.Outcome, case: str) -> None:
    for apart, cosines in outcome.of(case):
        assert apart <= 1e-9
        assert cosines == pytest.approx([1.0] * STEPS, abs=1e-6)


@pytest.mark.parametrize("case", ["overflow", "overflow of one rank's own ascent"])
def test_an_overflow_on_one_rank_skips_the_step_on_both(outcome: distributed.Outcome, case: str) -> None:
    for skipped, finite in outcome.of(case):
        assert skipped == 1
        assert all(finite)


@pytest.mark.parametrize("case", ["own ascents", "own ascents, sync_each_batch"])
def test_each_rank_may_ascend_by_its_own_gradient(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("m-sam")])
def test_m_sam_is_the_loop_from_the_equations(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9


def test_ranks_may_hold_parameters_of_their_own(outcome: distributed.Outcome) -> None:
    assert outcome.worst("parameters apart") <= 1e-9


def test_each_rank_may_count_its_own_tokens(outcome: distributed.Outcome) -> None:
    assert outcome.worst("own counts") <= 1e-9


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("part of a window")])
def test_a_variant_counts_the_labels_of_its_ascent(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9


@pytest.mark.parametrize("case", ["r3f", "tensor-parallel r3f", "freelb", "tram", "tram, a third"])
def test_r3f_and_its_relatives_are_the_loop_by_hand(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9


def test_guards_agree(outcome: distributed.Outcome) -> None:
    one, two = outcome.of("drift")
    assert one == two
    assert one[0] is not None


@pytest.mark.parametrize("case", ["functional path ddp", "functional path fsdp2"])
def test_functional_sam_is_the_loop_from_the_equations(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9


@pytest.mark.parametrize("case", ["fsdp2", "fsdp2, a third", "fsdp2, sequences cut"])
def test_sharded_sam_is_the_loop_from_the_equations(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9


def test_a_sharded_run_resumes(outcome: distributed.Outcome) -> None:
    assert outcome.worst("fsdp2 resumed") == 0


def test_drift_of_shards_is_that_of_the_whole(outcome: distributed.Outcome) -> None:
    for stopped_at, last_good, drift, measured in outcome.of("fsdp2 drift"):
        assert stopped_at == last_good + 1
        assert drift == pytest.approx(measured, rel=1e-5)
        assert measured <= 0.3


def test_r3f_of_a_sharded_model(outcome: distributed.Outcome) -> None:
    assert outcome.worst("fsdp2 r3f") <= 1e-9


@pytest.mark.parametrize("case", [name for name in CASES if "anchor" in name])
def test_an_anchor_is_the_loop_from_the_equations(outcome: distributed.Outcome, case: str) -> None:
    assert outcome.worst(case) <= 1e-9
