"""SAM and R3F in Accelerate's loop, in one process and in two with DDP and FSDP2, against loops written by hand."""

from __future__ import annotations

import copy
import functools
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration, FullyShardedDataParallelPlugin, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import fastpost
from fastpost import SAM, SAMWindow
from fastpost.integrations.accelerate import AcceleratedWindow
from fastpost.sam import GSAM, LookSAM, PassInfo, StableSAM
from tests.by_hand import ascended, distance, language_loss, largest_difference, rows_of_text, sam_by_hand
from tests.conftest import reset_accelerate
from tests.distributed import run, whole
from tests.tiny import build

RHO, LR = 0.05, 1e-3

pytestmark = pytest.mark.usefixtures("accelerate_alone")


def accelerator(accumulation: int = 1, fp16: bool = False, **options: Any) -> Accelerator:
    dataloader = DataLoaderConfiguration(split_batches=True)
    made = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=dataloader, **options)
    if fp16:  # refused on CPUs at construction; all that follows works there
        made.native_amp, made.state._mixed_precision = True, "fp16"
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    return made


def sam(model: nn.Module, **options: Any) -> SAM:
    return SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=LR, **options)


def loader(rows: int, size: int = 2) -> Any:
    return DataLoader(rows_of_text(rows), batch_size=size)  # type: ignore[arg-type]


def windows(rows: int, accumulation: int, size: int = 2) -> list[list[Tensor]]:
    batches = list(rows_of_text(rows).split(size))
    return [batches[at : at + accumulation] for at in range(0, len(batches), accumulation)]


def train(
    made: Accelerator, model: Any, data: Any, clip: float | None = 1.0, window: Any = AcceleratedWindow, **options: Any
) -> Any:
    """The loop of the documentation; returns the prepared model, the optimizer and the windows' losses."""
    model, opt, data = made.prepare(model, sam(model, **options), data)
    both = window(made, model, opt, language_loss)
    losses: list[float] = []
    for rows in data:
        with made.accumulate(model):
            losses.append(float(both(rows)))
            if made.sync_gradients and clip is not None:
                made.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
    assert not opt.optimizer.is_perturbed
    return model, opt, losses


@pytest.mark.parametrize(("accumulation", "fraction"), [(1, 1.0), (3, 1.0), (3, 0.3)])
def test_twenty_steps_equal_the_loop_by_hand(accumulation: int, fraction: float) -> None:
    model = build("causal", dtype=torch.float64)
    reference = copy.deepcopy(model)
    rows = 2 * (19 * accumulation + 1)  # the last window is short
    model, _, _ = train(accelerator(accumulation), model, loader(rows), ascent_fraction=fraction)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR)
    losses = sam_by_hand(
        reference, windows(rows, accumulation), optimizer, RHO, fraction=fraction, clip=1.0, divide_by=accumulation
    )
    assert len(losses) == 20
    assert losses[-2] < losses[0]
    assert distance(model, reference) <= 1e-9


def test_m_sam_is_that_of_a_plain_window() -> None:
    model = build("causal", dtype=torch.float64)
    reference = copy.deepcopy(model)

    def per_micro_batch(*parts: Any) -> AcceleratedWindow:
        return AcceleratedWindow(*parts, per_micro_batch=True)

    model, _, _ = train(accelerator(3), model, loader(12), clip=None, window=per_micro_batch)
    opt = sam(reference)
    plain = SAMWindow(opt, lambda rows: (language_loss(reference, rows) / 3).backward(), per_micro_batch=True)
    for window in windows(12, 3):
        plain.run(window)
        opt.step()
    assert distance(model, reference) <= 1e-12


def test_prepare_hides_first_step_and_the_wrapped_optimizer_has_it() -> None:
    """Loops without `accumulate` need nothing of fastpost.integrations."""
    made, model = accelerator(), build("causal", dtype=torch.float64)
    reference = copy.deepcopy(model)
    model, opt = made.prepare(model, sam(model))
    assert isinstance(opt, AcceleratedOptimizer)
    assert not hasattr(opt, "first_step")
    for number, [rows] in enumerate(windows(20, 1)):
        if number % 2:
            made.backward(language_loss(model, rows))
            opt.optimizer.first_step(zero_grad=True)
            made.backward(language_loss(model, rows))
        else:
            SAMWindow(opt, lambda rows: made.backward(language_loss(model, rows))).run([rows])
        opt.step()
        opt.zero_grad()
    sam_by_hand(reference, windows(20, 1), torch.optim.AdamW(reference.parameters(), lr=LR), RHO)
    assert distance(model, reference) <= 1e-9


def test_fp16_unscales_and_clips_once() -> None:
    model = build("causal")
    start, reference = copy.deepcopy(model), copy.deepcopy(model)
    made = accelerator(2, fp16=True)
    assert made.scaler is not None
    model, opt, losses = train(made, model, loader(40), clip=0.5)
    assert losses[-1] < losses[0]
    assert opt.optimizer.skipped_steps == 0
    assert opt.optimizer.compute_dtype == torch.float16

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return language_loss(model, rows)

    sam_by_hand(reference, windows(40, 2), torch.optim.AdamW(reference.parameters(), lr=LR), RHO, loss=loss, clip=0.5)
    gap = sum(float((p - q).detach().norm()) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    moved = sum(float((p - q).detach().norm()) for p, q in zip(start.parameters(), reference.parameters(), strict=True))
    assert gap <= 0.1 * moved


def test_an_overflow_in_the_ascent_skips_the_step_and_shrinks_the_scale() -> None:
    model = build("causal")
    before = copy.deepcopy(model)
    made = accelerator(fp16=True)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    model, opt, _ = train(made, model, loader(2))
    assert distance(model, before) == 0
    assert made.scaler.get_scale() == 2.0**39
    assert opt.optimizer.skipped_steps == 1


def test_save_state_and_load_state(tmp_path: Path) -> None:
    def prepared() -> Any:
        reset_accelerate()
        made, model = accelerator(2), build("causal", dropout=0.2, dtype=torch.float64)
        model, opt = made.prepare(model, sam(model, interval=2))
        return made, model, opt, AcceleratedWindow(made, model, opt, language_loss)

    def steps(parts: Any, batches: list[Tensor]) -> None:
        made, model, opt, window = parts
        for rows in batches:
            with made.accumulate(model):
                window(rows)
                opt.step()
                opt.zero_grad()

    batches = list(rows_of_text(24).split(2))
    first = prepared()
    torch.manual_seed(5)
    steps(first, batches[:6])
    first[0].save_state(str(tmp_path))
    steps(first, batches[6:])
    second = prepared()
    second[0].load_state(str(tmp_path))
    assert second[2].param_groups[0]["sam_steps"] == 3
    assert second[2].param_groups[0]["rho"] == RHO
    steps(second, batches[6:])
    assert distance(first[1], second[1]) == 0

    with second[0].accumulate(second[1]):
        second[2].optimizer.ascent_fraction = 0.5
        AcceleratedWindow(*second[:3], language_loss)(batches[0])  # half of a window: w + e
        with pytest.raises(RuntimeError, match="while the weights are perturbed"):
            second[0].save_state(str(tmp_path))


def test_r3f_through_accelerate() -> None:
    model = build("causal", dtype=torch.float64)
    reference = copy.deepcopy(model)
    made = accelerator(2)
    model, opt, data = made.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR), loader(16))
    r3f, by_hand = (fastpost.R3F(eps=0.5, seed=5) for _ in range(2))
    divergences = []
    for rows in data:
        with made.accumulate(model):
            out = r3f(model, input_ids=rows, labels=rows)
            divergences.append(float(out.symm_kl))
            made.backward(out.loss)
            opt.step()
            opt.zero_grad()
    plain = torch.optim.AdamW(reference.parameters(), lr=LR)
    for window in windows(16, 2):
        for rows in window:
            (by_hand(reference, input_ids=rows, labels=rows).loss / 2).backward()
        plain.step()
        plain.zero_grad()
    assert torch.tensor(divergences).min() > 0
    assert distance(model, reference) <= 1e-9


def test_methods_of_the_base_optimizer_are_reached_through_both() -> None:
    """Accelerate passes `train` and `eval` on to optimizers that have them, as schedule-free ones do."""

    class ScheduleFreeLike(torch.optim.SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    model = build("causal")
    base = ScheduleFreeLike(model.parameters(), lr=LR)
    opt = accelerator().prepare(SAM(None, base))
    opt.train()
    assert base.mode == "train"
    opt.eval()
    assert base.mode == "eval"
    plain = accelerator().prepare(sam(model))
    plain.train()  # nobody has it, which is no error in Accelerate
    state = {p: {} for p in model.parameters()}
    opt.state = state
    opt.param_groups = [{**opt.param_groups[0], "lr": 0.5}]
    assert base.state is state
    assert base.param_groups[0]["lr"] == 0.5


def test_a_closure_is_a_step_and_is_refused_where_micro_batches_are_accumulated() -> None:
    model = build("causal", dtype=torch.float64)
    reference = copy.deepcopy(model)
    made = accelerator()
    model, opt, data = made.prepare(model, sam(model), loader(6))

    def closure(rows: Tensor) -> Tensor:
        loss = language_loss(model, rows)
        made.backward(loss)
        return loss

    for rows in data:
        opt.step(functools.partial(closure, rows))
        opt.zero_grad()
    sam_by_hand(reference, windows(6, 1), torch.optim.AdamW(reference.parameters(), lr=LR), RHO)
    assert distance(model, reference) <= 1e-9
    made.gradient_accumulation_steps = 3

    def accumulated(data: Any) -> None:
        for rows in data:
            with made.accumulate(model):
                closure(rows)
                opt.step(functools.partial(closure, rows))
                opt.zero_grad()

    before = copy.deepcopy(model)
    for batches in (data, list(data)):  # a loader that Accelerate knows, and one that it does not
        with pytest.raises(RuntimeError, match=r"accumulates 3 micro-batches.*AcceleratedWindow"):
            accumulated(batches)
        assert distance(model, before) == 0
        opt.optimizer.zero_grad()
    other = nn.Linear(3, 2)  # stepped by others, while Accelerate accumulates
    own = SAM(other.parameters(), torch.optim.SGD, lr=LR)
    torch.optim.lr_scheduler.StepLR(own, 1)
    for _ in data:
        weight = other.weight.detach().clone()
        own.step(lambda: other(torch.ones(3)).sum().backward())
        assert not torch.equal(other.weight, weight)

    def two_calls() -> None:
        for rows in data:
            with made.accumulate(model):
                closure(rows)
                opt.optimizer.first_step(zero_grad=True)
                closure(rows)
                opt.step()

    with pytest.raises(RuntimeError, match=r"called twice.*AcceleratedWindow"):
        two_calls()


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("form", ["window", "two calls"])
@pytest.mark.parametrize("variant", [GSAM(0.7), StableSAM(), LookSAM()])
def test_accelerate_clips_what_is_stepped_with(form: str, variant: Any, fp16: bool) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(torch.float32 if fp16 else torch.float64)
    x = torch.randn(24, 4, dtype=model[0].weight.dtype, generator=torch.Generator().manual_seed(1))
    made = accelerator(fp16=fp16)
    if fp16:
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    opt = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, variant=variant, interval=3)
    model, opt, data = made.prepare(model, opt, DataLoader(x, batch_size=4))  # type: ignore[arg-type]

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return model(rows).square().mean()

    both = AcceleratedWindow(made, model, opt, loss)
    lengths = []
    for rows in data:
        with made.accumulate(model):
            before = copy.deepcopy(model)
            if form == "window":
                both(rows)
            else:
                made.backward(loss(model, rows))
                if opt.optimizer.ascends:
                    opt.optimizer.first_step(zero_grad=True)
                    made.backward(loss(model, rows))
            made.clip_grad_norm_(model.parameters(), 0.01)
            opt.step()
            opt.zero_grad()
        pairs = zip(model.parameters(), before.parameters(), strict=True)
        lengths.append(math.sqrt(sum((p - q).square().sum().item() for p, q in pairs)) / 0.1)
    assert torch.tensor(lengths).max() <= 0.01 * (1 + 1e-4)
    assert torch.tensor(lengths).min() >= 0.00995


def test_an_overflow_reaches_accelerate_where_the_second_gradient_is_assigned() -> None:
    model = build("causal")
    made = accelerator(fp16=True)
    made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model, opt = made.prepare(model, sam(model))
    before = copy.deepcopy(model)
    made.backward(language_loss(model, rows_of_text(2)) * math.inf)
    opt.optimizer.first_step(zero_grad=True)
    params = list(model.parameters())
    loss = made.scaler.scale(language_loss(model, rows_of_text(2)))
    for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = g
    made.clip_grad_norm_(params, 1.0)
    opt.step()
    assert distance(model, before) == 0
    assert made.scaler.get_scale() == 2.0**11
    assert opt.optimizer.skipped_steps == 1


def test_refusals() -> None:
    made, model = accelerator(), build("causal")
    model, opt = made.prepare(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"must be a fastpost\.SAM"):
        AcceleratedWindow(made, model, opt, language_loss)
    window = AcceleratedWindow(made, model, sam(model), language_loss)
    made.gradient_accumulation_steps = 2
    made.gradient_state._set_sync_gradients(False)
    window(rows_of_text(2))
    with pytest.raises(RuntimeError, match="goes on accumulating"):
        window(rows_of_text(2))
    assert not window.optimizer.is_perturbed


def test_context_parallelism_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = accelerator(), build("causal")
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda _: SimpleNamespace(cp_enabled=True)))
    with pytest.raises(ValueError, match=r"context parallelism.*cuts a batch in place.*first_step\(zero_grad=True\)"):
        AcceleratedWindow(made, model, sam(model), language_loss)


# -- two processes ------------------------------------------------------------------------------------------------------


def _in_two(fraction: float, per_micro_batch: bool = False, **options: Any) -> tuple[float, float, int]:
    """Largest difference from one process on whole batches; backward passes in which gradients were exchanged."""
    os.environ.update(
        RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    reset_accelerate()
    if "fsdp_plugin" in options:  # Accelerate leaves FSDP2 to accelerators; torch's does not mind CPUs
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made = accelerator(2, **options)
    model = build("causal", dtype=torch.float64)
    reference = copy.deepcopy(model)
    shared = []

    class Counted(AcceleratedWindow):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts, per_micro_batch=per_micro_batch)

        def run_pass(self, micro_batch: Any, info: PassInfo) -> Any:
            shared.append(info.sync)
            return super().run_pass(micro_batch, info)

    model, _, losses = train(made, model, loader(20, 4), window=Counted, ascent_fraction=fraction)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LR)
    if per_micro_batch:
        m_sam_by_hand(reference, windows(20, 2, 4), optimizer)
    else:
        sam_by_hand(reference, windows(20, 2, 4), optimizer, RHO, fraction=fraction, clip=1.0, divide_by=2)
    assert len(losses) == 5
    assert all(isinstance(p, DTensor) for p in model.parameters()) == ("fsdp_plugin" in options)
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    worst = largest_difference((whole(named[name]), p) for name, p in reference.named_parameters())
    return worst, losses[0], sum(shared)


def m_sam_by_hand(model: nn.Module, steps: list[list[Tensor]], optimizer: torch.optim.Optimizer) -> None:
    """2302.09693 over windows of two, of which the last one is short."""
    params = list(model.parameters())
    for window in steps:
        second = []
        for rows in window:
            with ascended(params, torch.autograd.grad(language_loss(model, rows) / 2, params), RHO):
                second.append(torch.autograd.grad(language_loss(model, rows) / 2, params))
        for p, *parts in zip(params, *second, strict=True):
            p.grad = torch.stack(parts).sum(0)
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


def ddp() -> Any:
    return _in_two(1.0)


def ddp_half() -> Any:
    return _in_two(0.5)


def _fsdp(fraction: float, **options: Any) -> Any:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
    )
    return _in_two(fraction, fsdp_plugin=plugin, **options)


def fsdp2() -> Any:
    return _fsdp(1.0)


def fsdp2_half() -> Any:
    return _fsdp(0.5)


def fsdp2_m_sam() -> Any:
    """Each micro-batch of both ranks by its own gradient; every pass shares gradients, as FSDP2 keeps apart what waits."""
    return _fsdp(1.0, per_micro_batch=True)


CASES = {"ddp": ddp, "ddp_half": ddp_half, "fsdp2": fsdp2, "fsdp2_half": fsdp2_half, "fsdp2_m_sam": fsdp2_m_sam}


@pytest.fixture(scope="module")
def two() -> Any:
    return run(2, CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(two: Any, case: str) -> None:
    """Three windows, the last one short: gradients are exchanged once per pass."""
    outcomes = two.of(case)
    for worst, _, shared in outcomes:
        assert worst <= 1e-9
        assert shared == (10 if case == "fsdp2_m_sam" else 6)
    assert outcomes[0][1] != outcomes[1][1]  # each has its own half of the data
