"""What trainers are written with: ExternalSAM, a window that makes passes in the trainer's way, and the state of a step."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpost import SAM, PerturbationReport
from fastpost.rng import RandomState
from fastpost.sam import GSAM, ExternalSAM, MomentumSAM, PassInfo, Phase, SAMWindow

from .small import all_bits, loss_of, network, same_state, unchanged

N, RHO, LR = 4, 0.2, 0.1
MICRO = [torch.randn(32, 20, generator=torch.Generator().manual_seed(i)) for i in range(N)]


class Recorded(SAMWindow):
    """Notes which passes are made."""

    def __init__(self, optimizer: SAM, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, self.backward, **options)
        self.network = model
        self.passes: list[tuple[PassInfo, bool]] = []

    def backward(self, x: Tensor) -> Tensor:
        loss = loss_of(self.network, x) / N
        loss.backward()
        return loss.detach()

    def run_pass(self, micro_batch: Tensor, info: PassInfo) -> Any:
        self.passes.append((info, self.optimizer.is_perturbed))
        return super().run_pass(micro_batch, info)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR)


@pytest.mark.parametrize("variant", [None, GSAM])
def test_a_trainer_that_steps_itself_makes_sams_steps_bit_for_bit(variant: Any) -> None:
    mine, theirs = network(0.1), network(0.1)
    optimizer = adamw(mine)
    sam = ExternalSAM(optimizer, rho=RHO, variant=variant and variant())
    opt = SAM(theirs.parameters(), torch.optim.AdamW, rho=RHO, lr=LR, variant=variant and variant())
    for step in range(3):
        torch.manual_seed(step)
        Recorded(sam, mine).run(MICRO)
        made = sam.finish_step(scaled=False)
        optimizer.step()
        torch.manual_seed(step)
        Recorded(opt, theirs).run(MICRO)
        opt.step()
        assert made.ascended
        assert PerturbationReport(*made.sums).as_dict() == opt.report.as_dict()
        assert unchanged(mine, all_bits(theirs))
    assert same_state(optimizer.state_dict(), opt.state_dict())
    assert optimizer.param_groups[0]["sam_steps"] == 3


# The passes of a window as (index, is_replay, sync, is_last), and whether the weights are w + e.
PLAIN = [(i, False, i == 3, i == 3, False) for i in range(4)]
ALL_THEN_AGAIN = [*PLAIN, *((i, True, i == 3, i == 3, True) for i in range(4))]
HALF = [
    (0, False, False, False, False), (1, False, True, False, False),
    (0, True, False, False, True), (1, True, False, False, True),
    (2, False, False, False, True), (3, False, True, True, True),
]  # fmt: skip
ONE_BY_ONE = [(i, again, True, i == 3, again) for i in range(4) for again in (False, True)]


@pytest.mark.parametrize(
    ("options", "window_options", "expected"),
    [
        ({}, {}, ALL_THEN_AGAIN),
        ({"ascent_fraction": 0.5}, {}, HALF),
        ({}, {"per_micro_batch": True}, ONE_BY_ONE),
        ({"variant": MomentumSAM()}, {}, [(i, False, i == 3, i == 3, True) for i in range(4)]),
    ],
    ids=["whole", "half", "one by one", "no ascent pass"],
)
def test_a_window_says_which_pass_it_makes(options: Any, window_options: Any, expected: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    sam = ExternalSAM(optimizer, rho=RHO, interval=2, **options)
    for number in range(3):  # a step without an ascent lies between two with one
        window = Recorded(sam, model, no_sync=contextlib.nullcontext, **window_options)
        window.run(MICRO)
        assert window.fed == N
        made = sam.finish_step(scaled=False)
        optimizer.step()
        passes = [(i.index, i.is_replay, i.sync, i.is_last, perturbed) for i, perturbed in window.passes]
        assert passes == (PLAIN if number % 2 else expected)
        assert made.ascended == (number % 2 == 0 and not (number == 0 and "variant" in options))  # no momentum yet
        assert (made.sums is not None) == made.ascended


def test_first_passes_that_the_trainer_has_made_already() -> None:
    """It feeds each micro-batch afterwards, with the generators as they stood before."""

    class Replays(Recorded):
        def run_pass(self, micro_batch: Tensor, info: PassInfo) -> Any:
            return super().run_pass(micro_batch, info) if info.is_replay else None

    mine, theirs = network(0.3), network(0.3)
    one, two = (SAM(m.parameters(), torch.optim.SGD, rho=RHO, lr=LR) for m in (mine, theirs))
    torch.manual_seed(0)
    window = Replays(one, mine)
    window.open(N)
    for x in MICRO:
        before = window.before(x)
        window.backward(x)
        window.feed(x, before)
    assert not window.is_open
    one.step()
    drawn = torch.rand(1)
    torch.manual_seed(0)
    Recorded(two, theirs).run(MICRO)
    two.step()
    assert torch.equal(drawn, torch.rand(1))
    assert unchanged(mine, all_bits(theirs))


@pytest.mark.parametrize("field", [None, "x"])
def test_a_first_pass_of_the_trainers_that_changes_the_micro_batch_is_refused(field: str | None) -> None:
    model, seen = network(), []

    class Replays(SAMWindow):
        def run_pass(self, micro_batch: Any, info: PassInfo) -> Any:
            return super().run_pass(micro_batch, info) if info.is_replay else None

    def backward(batch: Any) -> None:
        x = batch if field is None else batch.pop(field)
        seen.append(x.mul_(0.5))
        model(x).square().mean().backward()

    window = Replays(ExternalSAM(adamw(model), rho=RHO), backward)
    weights = all_bits(model)
    window.open(1)
    x = MICRO[0].clone()
    batch = x if field is None else {field: x}
    before = window.before(batch)
    backward(batch)
    with pytest.raises(RuntimeError, match="micro-batch 0 was changed in place in its first pass"):
        window.feed(batch, before)
    assert len(seen) == 1
    assert not window.is_open
    assert unchanged(model, weights)


def test_what_a_window_is_not_to_be_fed() -> None:
    model = network()
    window = Recorded(ExternalSAM(adamw(model), rho=RHO), model)
    window.open(3)
    with pytest.raises(TypeError, match=r"what window\.before\(micro_batch\) returns.*not RandomState"):
        window.feed(MICRO[0], RandomState())
    assert not window.passes
    window.feed(MICRO[0], share=0.2)
    with pytest.raises(ValueError, match="some micro-batches of the window come with a share and some without"):
        window.feed(MICRO[1])
    window.feed(MICRO[1], share=0.3)
    window.feed(MICRO[2], share=0.5)
    assert [info.share for info, _ in window.passes] == [0.2, 0.3, 0.5, None, None, None]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("where", ["first", "second"])
def test_a_gradient_that_is_not_finite_skips_the_trainers_step(scaled: bool, where: str) -> None:
    model = network()
    optimizer = adamw(model)
    sam = ExternalSAM(optimizer, rho=RHO)
    before = all_bits(model)

    def backward(x: Tensor) -> None:
        loss = loss_of(model, x)
        (loss * float("inf") if sam.is_perturbed == (where == "second") else loss).backward()

    SAMWindow(sam, backward).run(MICRO[:1])
    step = sam.finish_step(scaled=scaled)
    assert step.ascended
    assert unchanged(model, before)
    assert (sam.skipped_steps, sam.skipped.item(), sam.skipped.dtype) == (1, 1.0, torch.float32)
    if scaled:  # a GradScaler is to see it
        assert not all(p.grad.isfinite().all() for p in model.parameters())
    else:
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        assert unchanged(model, before)


def test_the_phases_of_a_step() -> None:
    """Every transition that `Phase` lists, and that a new step begins where it says so."""
    model = network()
    opt = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR)

    def to(phase: Phase) -> None:
        opt.zero_grad()
        loss_of(model).backward()
        if phase is not Phase.CLEAN:
            opt.first_step(zero_grad=True)
            loss_of(model).backward()
        if phase is Phase.RESTORED:
            opt.restore_()
        assert opt._step.phase is phase

    continues = [
        (Phase.CLEAN, opt.first_step, Phase.PERTURBED),
        (Phase.PERTURBED, opt.end_ascent, Phase.RESTORED),
        (Phase.PERTURBED, opt.restore_, Phase.RESTORED),
        (Phase.PERTURBED, opt.zero_grad, Phase.PERTURBED),
        (Phase.RESTORED, opt.first_step, Phase.PERTURBED),
    ]
    for before, call, after in continues:
        to(before)
        step = opt._step
        call()
        assert (opt._step.phase, opt._step is step) == (after, True), (before, call)
        opt.abandon()
    begins = [(phase, call) for phase in Phase for call in (opt.step, opt.abandon)]
    begins += [(Phase.CLEAN, opt.zero_grad), (Phase.RESTORED, opt.zero_grad)]
    for before, call in begins:
        to(before)
        step, cycle = opt._step, opt.cycle
        call()
        assert opt._step is not step, (before, call)
        assert (opt._step.phase, opt._step.ascended, opt._step.clean) == (Phase.CLEAN, False, {}), (before, call)
        assert opt.cycle > cycle
    to(Phase.CLEAN)
    step = opt._step
    with pytest.raises(KeyError), opt.perturbed():
        raise KeyError
    assert opt._step is not step
    assert opt._step.phase is Phase.CLEAN
